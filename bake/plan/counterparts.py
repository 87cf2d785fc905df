"""What corresponds to a tensor of one model in another one of its family, whatever layout that has."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

from bake.dtypes import DTYPES
from bake.errors import FamilyMismatch, ShapeMismatch, Unsupported
from bake.identify.checkpoint import BaseIdentity
from bake.identify.families import FAMILIES, title
from bake.identify.tied import Tie
from bake.io.checkpoint import Checkpoint, CheckpointFile
from bake.io.header import TensorInfo
from bake.io.tensorfile import read_tensor_bytes
from bake.keys.factors import as_matrix
from bake.keys.modules import Component, split_by_component
from bake.keys.places import Place, split_parameter
from bake.plan.base import Base
from bake.plan.composed import cut, share_of
from bake.plan.heads import base_of
from bake.plan.model import Share

_UNETS = ("ldm unet", "diffusers unet")
_FIRST_LAYERS = ("input_blocks.0.0.weight", "conv_in.weight")  # of a UNet: inpainting models have more channels there
_LATENT_CHANNELS = 4
# Constants that models carry, and that newer versions of the same model leave out.
_CONSTANTS = ("position_ids", "rotary_emb.inv_freq", "attn.masked_bias")
_VOCABULARIES = ("embed", "wte", "shared", "head")  # part of the names of tensors with a row for each word
_MASK = "attn.bias"  # of GPT-2, a mask with four axes


def is_constant(name: str, info: TensorInfo) -> bool:
    """True for what was computed from the configuration, not trained: no two models of an architecture differ there."""
    return name.endswith(_CONSTANTS) or (name.endswith(_MASK) and len(info.shape) == 4)


def is_merged(name: str, info: TensorInfo) -> bool:
    """True for tensors of trained numbers; integers, markers of one element and constants are copied."""
    return DTYPES[info.dtype].computable and math.prod(info.shape) > 1 and not is_constant(name, info)


class _Piece(NamedTuple):
    """Rows [begin, begin + rows) of a tensor of the first model, and the tensor of the other that has them."""

    begin: int
    rows: int
    tensor: str
    first: int  # row of that tensor
    transposed: bool


@dataclass(frozen=True)
class Opened:
    """A model that takes part in a merge."""

    name: str  # for messages
    checkpoint: Checkpoint
    identity: BaseIdentity
    inputs: int  # place of its first file in Plan.inputs
    content: str  # orders models by what they hold

    @cached_property
    def _base_and_tie(self) -> tuple[Base, Tie | None]:
        return base_of(self.checkpoint, self.identity)

    @property
    def base(self) -> Base:
        """Its tensors, a tied head that is not stored among them, and every spelling of its modules."""
        return self._base_and_tie[0]

    @property
    def tied_head(self) -> str | None:
        """The output head that is the embedding again."""
        tie = self._base_and_tie[1]
        return None if tie is None else tie.head

    @cached_property
    def _files(self) -> dict[str, tuple[int, CheckpointFile, str]]:
        """full name -> (place of its file in Plan.inputs, file, what stands for it there)."""
        places = {part.relative: self.inputs + place for place, part in enumerate(self.checkpoint.files)}
        found = {
            full: (places[part.relative], part, full.removeprefix(part.group))
            for full, part, _ in self.checkpoint.tensors()
        }
        tie = self._base_and_tie[1]
        if tie is not None and tie.head in self.base.tensors:
            found.setdefault(tie.head, found[tie.embedding])
        return found

    @cached_property
    def owned(self) -> dict[str, tuple[Component, list[str]]]:
        """component -> its full tensor names."""
        split = split_by_component(self.identity.components, self.base.tensors)
        return {component.name: (component, names) for component, names in split}

    def stored(self, full: str, first: int = 0, count: int | None = None) -> Share:
        """Rows [first, first + count) of a tensor; None: all."""
        place, part, name = self._files[full]
        share = share_of(part, place, name)
        if count is None or count == as_matrix(self.base.tensors[full].shape)[0]:
            return share
        return cut(share, (first, first + count))

    def read(self, full: str) -> tuple[str, bytes]:
        """(dtype, bytes) of a small tensor."""
        _, part, name = self._files[full]
        return self.base.tensors[full].dtype, read_tensor_bytes(part.file, name)


def check_alike(first: Opened, other: Opened) -> None:
    """Raise FamilyMismatch if both models are known and of different families."""
    one, two = first.identity, other.identity
    is_known = all(each.family in FAMILIES or each.language_model for each in (one, two))
    if is_known and one.family != two.family and "language-model" not in (one.family, two.family):
        raise FamilyMismatch(
            f"{first.name} is {title(one.family)}, {other.name} is {title(two.family)}: only models of one family can "
            f"be merged.",
            families=[one.family, two.family],
        )


class Counterparts:
    """Finds what another model has for the tensors of the first, component by component."""

    def __init__(self, first: Opened, other: Opened) -> None:
        self._first, self._other = first, other
        self._used: set[str] = set()
        self._reversed: dict[str, dict[str, list[_Piece]]] = {}

    def component_for(self, component: str) -> Component | None:
        """The other model's component of this name of the first's; None if it has none."""
        mine, _ = self._first.owned[component]
        for theirs in self._other.identity.components:
            if theirs.name == mine.name or theirs.answers((mine.name, *mine.also)):
                return theirs
        return None

    def share(self, full: str, component: str) -> Share | None:
        """What the other model has for the first's tensor `full`; None if it has nothing.

        Raises ShapeMismatch if it does not fit, Unsupported if it is not stored as plain floats.
        """
        mine, _ = self._first.owned[component]
        theirs = self.component_for(component)
        if theirs is None:
            return None
        path = full[len(mine.prefix) :]
        pieces: Sequence[_Piece] = ()
        if mine.naming == theirs.naming and theirs.prefix + path in self._other.base.tensors:
            height = as_matrix(self._other.base.tensors[theirs.prefix + path].shape)[0]
            pieces = [_Piece(0, height, theirs.prefix + path, 0, False)]
        else:
            found = [self._forward(path, theirs.name), self._backward(full, mine, theirs)]
            pieces = next((each for each in found if any(piece.transposed for piece in each)), found[0] or found[1])
        if not pieces:
            return None
        self._used.update(piece.tensor for piece in pieces)
        return self._fitted(full, theirs, pieces)

    def left_over(self, components: Iterable[str]) -> list[str]:
        """Trained tensors of these components of the other model that nothing of the first corresponds to."""
        theirs = {found.name for found in map(self.component_for, components) if found is not None}
        names = [name for each in theirs for name in self._other.owned[each][1]]
        known = self._used | ({self._other.tied_head} if self._other.tied_head is not None else set())
        tensors = self._other.base.tensors
        return sorted(name for name in names if name not in known and is_merged(name, tensors[name]))

    def _forward(self, path: str, component: str) -> list[_Piece]:
        """By the other model's spellings of the first's name."""
        module, parameter = split_parameter(path)
        places = self._other.base.index.spellings[component].get(module, {}).get(parameter, ())
        pieces: dict[int, _Piece] = {}  # copies of a tied embedding have the same rows
        for place, height in self._plain(places, self._other.base):
            first, last = place.rows or (0, height)
            begin = place.part[0] if place.part is not None else 0
            pieces.setdefault(begin, _Piece(begin, last - first, place.tensor, first, place.transposed))
        return sorted(pieces.values())

    def _backward(self, full: str, mine: Component, theirs: Component) -> list[_Piece]:
        """By the first model's spellings of the other's names."""
        if mine.name not in self._reversed:
            self._reversed[mine.name] = self._all_backward(mine, theirs)
        return sorted(self._reversed[mine.name].get(full, []))

    def _all_backward(self, mine: Component, theirs: Component) -> dict[str, list[_Piece]]:
        spellings = self._first.base.index.spellings[mine.name]
        found: dict[str, list[_Piece]] = {}
        for name in self._other.owned[theirs.name][1]:
            module, parameter = split_parameter(name[len(theirs.prefix) :])
            for place, height in self._plain(spellings.get(module, {}).get(parameter, ()), self._first.base):
                begin, last = place.rows or (0, height)
                first = place.part[0] if place.part is not None else 0
                pieces = found.setdefault(place.tensor, [])
                if all(piece.begin != begin for piece in pieces):
                    pieces.append(_Piece(begin, last - begin, name, first, place.transposed))
        return found

    @staticmethod
    def _plain(places: Iterable[Place], base: Base) -> Iterator[tuple[Place, int]]:
        """The places that are rows of a tensor, with the height of that."""
        for place in places:
            if not (place.stacked or place.turn):
                yield place, as_matrix(base.tensors[place.tensor].shape)[0]

    def _fitted(self, full: str, theirs: Component, pieces: Sequence[_Piece]) -> Share:
        """The pieces as they are stored, if together they have the shape of the first's tensor."""
        info, tensors = self._first.base.tensors[full], self._other.base.tensors
        for piece in pieces:
            dtype = tensors[piece.tensor].dtype
            if not DTYPES[dtype].computable:
                raise Unsupported(
                    f"{self._other.name}: {piece.tensor} is stored as {dtype}, which cannot be merged: use the 16-bit "
                    f"original.",
                    tensor=piece.tensor,
                    model=self._other.name,
                )
        if pieces[0].transposed:
            shape = tensors[pieces[0].tensor].shape
            if len(pieces) == 1 and tuple(reversed(shape)) == info.shape:
                return replace(self._other.stored(pieces[0].tensor), transposed=True)
            raise self._misfit(full, pieces)
        height, width = as_matrix(info.shape)
        widths = {math.prod(tensors[piece.tensor].shape[1:]) for piece in pieces}
        ends = [0, *(piece.begin + piece.rows for piece in pieces)]
        if ends[:-1] != [piece.begin for piece in pieces] or ends[-1] != height:
            raise self._misfit(full, pieces)
        if widths != {width} and not self._is_first_layer(full, theirs, tensors[pieces[0].tensor].shape):
            raise self._misfit(full, pieces)
        parts = [self._other.stored(piece.tensor, piece.first, piece.rows) for piece in pieces]
        return Share(tuple(stored for part in parts for stored in part.stored))

    def _is_first_layer(self, full: str, theirs: Component, shape: tuple[int, ...]) -> bool:
        """True for the first layer of a plain UNet that is merged into that of an inpainting model.

        As in AUTOMATIC1111, modules/extras.py: the further channels stay the first model's.
        """
        mine = self._first.base.tensors[full].shape
        wider = len(mine) == 4 and mine[2:] == shape[2:] and mine[1] > shape[1] == _LATENT_CHANNELS
        return wider and theirs.naming in _UNETS and full.endswith(_FIRST_LAYERS)

    def _misfit(self, full: str, pieces: Sequence[_Piece]) -> ShapeMismatch:
        info, tensors = self._first.base.tensors[full], self._other.base.tensors
        stored = " + ".join(f"{piece.tensor} {list(tensors[piece.tensor].shape)}" for piece in pieces)
        rest = [list(tensors[piece.tensor].shape[1:]) for piece in pieces]
        is_vocabulary = (
            len(info.shape) == 2 and rest == [list(info.shape[1:])] and any(each in full for each in _VOCABULARIES)
        )
        why = "Their vocabularies differ" if is_vocabulary else "They are models of different sizes or variants"
        return ShapeMismatch(
            f"{full} is {list(info.shape)} in {self._first.name}, and {stored} in {self._other.name}. {why}, and "
            f"cannot be merged.",
            tensor=full,
            models=[self._first.name, self._other.name],
        )
