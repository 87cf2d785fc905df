"""What decides the ranks of an adapter that bake makes, and what became of its modules."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from bake.errors import OutputRefused, UsageError
from bake.keys.spoken import Names

DEFAULT_RANK = 64
ADAPTER_DTYPES = {"fp16": "F16", "bf16": "BF16", "fp32": "F32"}
SVD_METHODS = ("auto", "exact", "randomised")

# rule -> (the smallest and largest parameter that makes sense, whether it needs all singular values)
_RULES = {
    "fixed": (0.0, 0.0, False),
    "ratio": (1.0, float("inf"), False),
    "cumulative": (0.0, 1.0, True),
    "quantile": (0.0, 1.0, True),
    "fro": (0.0, 1.0, False),
    "threshold": (0.0, float("inf"), False),
}
RULES = tuple(rule for rule in _RULES if rule != "fixed")


@dataclass(frozen=True, slots=True)
class Ranks:
    """How many singular values of each module are kept."""

    rank: int | None = None  # at most; None: DEFAULT_RANK where an adapter is extracted, no limit where it is resized
    conv_rank: int | None = None  # the same for convolutions larger than 1x1; None: as `rank`
    rule: str = "fixed"  # see bake.factoring.ranks
    parameter: float = 0.0  # the rule's
    clamp: float | None = None  # a quantile: factors are cut off at the magnitude that this share stays within
    svd: str = "auto"  # one of SVD_METHODS
    seed: int = 0  # of randomised SVD

    def __post_init__(self) -> None:
        low, high, _ = _RULES[self.rule]
        if self.rule != "fixed" and not low < self.parameter <= high:
            raise UsageError(f"--keep {self.rule}={self.parameter:g}: the number is above {low:g}, at most {high:g}")
        if any(rank is not None and rank < 1 for rank in (self.rank, self.conv_rank)):
            raise UsageError("a rank is at least 1")
        if self.clamp is not None and not 0 < self.clamp <= 1:
            raise UsageError(f"--clamp-quantile {self.clamp:g}: a share above 0, at most 1")
        if self.svd not in SVD_METHODS:
            raise UsageError(f"--svd {self.svd}: unknown; it is {', '.join(SVD_METHODS)}")

    @property
    def method(self) -> str:
        """The SVD method, exact where the rule needs every singular value."""
        return "exact" if _RULES[self.rule][2] else self.svd

    def limit(self, shape: tuple[int, ...]) -> int | None:
        """The largest rank for a weight of `shape`; None: as many as it has."""
        is_large = any(size > 1 for size in shape[2:])
        return self.conv_rank if is_large and self.conv_rank is not None else self.rank


def parse_rule(text: str) -> tuple[str, float]:
    """(rule, parameter) of RULE=NUMBER; raises UsageError."""
    rule, _, number = text.partition("=")
    if rule not in RULES:
        raise UsageError(f"--keep {text}: unknown; it is {', '.join(f'{rule}=NUMBER' for rule in RULES)}")
    try:
        return rule, float(number)
    except ValueError:
        raise UsageError(f"--keep {text}: it is RULE=NUMBER, with {', '.join(RULES)} for RULE") from None


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of one difference. Norms are Frobenius norms."""

    module: str
    component: str
    parameter: str
    kind: str  # "lora", "full" (stored as it is), "left-out", "unchanged", or "kept" (copied from the input)
    shape: tuple[int, ...]
    rank: int | None
    norm: float  # of what was to be expressed
    residual: float  # of what the adapter does not express

    @property
    def error(self) -> float:
        """|residual| / |norm|; 0 where there was nothing to express."""
        return self.residual / self.norm if self.norm else 0.0


def check_name(output: Path, names: Names) -> None:
    """Raise OutputRefused if the output's name is not that of what is written: a file, or a folder for PEFT."""
    is_file = output.suffix == ".safetensors"
    if names == "peft" and is_file:
        raise OutputRefused(f"{output}: a PEFT adapter is a folder; give a name without .safetensors")
    if names != "peft" and not is_file:
        raise OutputRefused(f"{output}: the output is a safetensors file; let its name end in .safetensors")
