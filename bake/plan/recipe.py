"""What was asked for, before anything is opened."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from bake.errors import UsageError
from bake.plan.selection import Selection, Setting

EVERY = "all"  # stands for every component in a mapping of dtypes
# "fast" is to nearest without recomputing in float64 what float32 cannot decide.
ROUNDINGS = ("nearest", "stochastic", "fast")

LAYOUTS = ("keep", "original", "diffusers")
EMA = ("keep", "use")

# What becomes of token embeddings that travel in adapters: files of their own, part of the model, left out.
EMBEDDING_MODES = ("beside", "add", "drop")


@dataclass(frozen=True, slots=True)
class AdapterChoice:
    """One adapter with the weights the user typed. Every finite weight is allowed; 0 leaves out."""

    path: Path
    weight: float = 1.0
    te: float | None = None  # for the text encoders; None: as `weight`
    unet: float | None = None  # for everything else; None: as `weight`
    rank_limit: int | None = None  # A1111's dyn: use only the first ranks of LoRA factors
    selection: Selection | None = None  # what the weight is multiplied by, tensor by tensor; None: 1 everywhere

    def weight_for(self, component: str) -> float:
        """The weight that counts for modules of `component`."""
        chosen = self.te if is_text_encoder(component) else self.unet
        return self.weight if chosen is None else chosen

    @property
    def is_off(self) -> bool:
        """True if no module of any component has a weight."""
        return self.weight_for("te1") == 0 and self.weight_for("unet") == 0


def is_text_encoder(component: str) -> bool:
    """True for te1, te2, te3."""
    return component.rstrip("0123456789") == "te"


@dataclass(frozen=True, slots=True)
class Layers:
    """Layers [first, end) of one of several models, counted from 0."""

    model: int  # its place among them, counted from 0
    first: int
    end: int

    @classmethod
    def parse(cls, text: str) -> Layers:
        """What MODEL=FIRST:END means, where models are counted from 1. Raises UsageError."""
        found = re.fullmatch(r"\s*(\d{1,6})\s*=\s*(\d{1,6})\s*:\s*(\d{1,6})\s*", text)
        if found is None:
            raise UsageError(f"{text!r} is not MODEL=FIRST:END, such as 2=8:32 for layers 8 to 31 of the second model")
        return cls(int(found[1]) - 1, int(found[2]), int(found[3]))

    def __str__(self) -> str:
        return f"{self.model + 1}={self.first}:{self.end}"


@dataclass(frozen=True)
class MergeChoice:
    """Models that are merged, and how. The result has the layout of the first: of the base, if there is one."""

    method: str  # a row of bake.merges.METHODS
    models: tuple[Path, ...]  # in the order of the method's roles
    base: Path | None = None  # for the role of that name
    parameters: Mapping[str, Setting] = field(default_factory=dict)
    only: tuple[str, ...] = ()  # merge these components alone; "te" is every text encoder
    allow_missing: bool = False  # what one model lacks stays the first one's; what only others have is left out
    layers: tuple[Layers, ...] = ()  # of passthrough: those of the models that are put one above the other

    def wants(self, component: str) -> bool:
        """True if the tensors of `component` are to be merged."""
        return _is_among(self.only, component)


@dataclass(frozen=True)
class Recipe:
    """One bake: a base, adapters and how to write the result. Nothing is rounded before everything is done."""

    base: Path | MergeChoice
    adapters: tuple[AdapterChoice, ...] = ()
    also: tuple[Path, ...] = ()  # further files of a split stack
    replaced: Mapping[str, Path] = field(default_factory=dict)  # component -> the checkpoint that it is taken from
    layout: str = "keep"  # one of LAYOUTS
    like: Path | None = None  # a diffusers folder whose configuration, tokenizer and scheduler files are taken
    shard_size: int | None = None  # bytes of a shard, at most; 0: one file; None: as the base is
    # What is left out of the base: components, "te" for every text encoder; ema, training, rest.
    drop: tuple[str, ...] = ()
    ema: str = "keep"  # one of EMA: averaged weights that the base carries stay beside the others, or take their place
    dtype: str | Mapping[str, str] = "keep"  # "keep" or a key of OUTPUT_DTYPES; or component -> these, see `dtype_for`
    only: tuple[str, ...] = ()  # fuse into these components alone; "te" is every text encoder
    allow_unmatched: bool = False
    metadata: Mapping[str, str] = field(default_factory=dict)  # added to the output's
    record: bool = True  # write names, weights and digests of the inputs into the output
    embeddings: str = "beside"  # one of EMBEDDING_MODES
    rounding: str = "nearest"  # one of ROUNDINGS
    seed: int = 0  # of stochastic rounding, and of merges by chance
    allow_nonfinite_base: bool = False  # elements of the base that are NaN or infinite stay as they are
    strict: bool = False  # refuse adapters that are in the base already

    @property
    def dtypes(self) -> Mapping[str, str]:
        """Component, "te" for every text encoder, or EVERY -> its dtype."""
        return {EVERY: self.dtype} if isinstance(self.dtype, str) else self.dtype

    @property
    def rearranges(self) -> bool:
        """True if names, files or components are to be others than the base's."""
        return bool(self.layout != "keep" or self.drop or self.ema != "keep" or self.shard_size is not None)

    @property
    def converts(self) -> bool:
        """True if any dtype is to change."""
        return any(dtype != "keep" for dtype in self.dtypes.values())

    @property
    def plain_dtype(self) -> str | dict[str, str]:
        """The dtypes as JSON data, in one way for requests that mean the same."""
        dtypes = dict(sorted(self.dtypes.items()))
        return dtypes.get(EVERY, "keep") if dtypes.keys() <= {EVERY} else dtypes

    def dtype_for(self, component: str) -> str:
        """The dtype asked for `component`, where the narrowest name counts: "te1", then "te", then EVERY."""
        names = (component, "te", EVERY) if is_text_encoder(component) else (component, EVERY)
        return next((self.dtypes[name] for name in names if name in self.dtypes), "keep")

    def wants(self, component: str) -> bool:
        """True if modules of `component` are to be fused."""
        return _is_among(self.only, component)


def _is_among(only: tuple[str, ...], component: str) -> bool:
    return not only or component in only or ("te" in only and is_text_encoder(component))
