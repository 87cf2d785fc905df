"""Judge what a tool made of a job of scripts/bench_models.py, element by element, in float64 NumPy.

    python scripts/bench_exact.py JOB.json OUTPUT [--base BASE] [--every N]

Knows nothing of bake: its own reader, formulas and rounding. OUTPUT and BASE may be in another layout than the job's
base (a diffusers folder, say) if BASE holds the same values: tensors are then recognised by their bytes. Prints JSON:
how many elements of the touched tensors are the float64 result rounded once, the worst error in units of the last
place (of the larger of |old| and |new|, so that results near zero do not count as huge errors), and what became of
all other tensors.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

# Stored significand bits and exponent of the smallest normal number.
FLOATS = {"F64": (52, -1022), "F32": (23, -126), "F16": (10, -14), "BF16": (7, -126)}
_STORED = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2", "I64": "<i8", "I32": "<i4"}
_BLOCK = 1 << 21  # elements compared at once
_EPSILON = float(np.finfo(np.float32).eps)  # LyCORIS adds it to the lengths of DoRA


class Place(NamedTuple):
    """One tensor on disk."""

    path: Path
    dtype: str
    shape: tuple[int, ...]
    start: int  # byte of the file

    @property
    def width(self) -> int:
        return math.prod(self.shape[1:])

    def raw(self) -> NDArray[Any]:
        """The stored numbers, flat, mapped."""
        count = math.prod(self.shape)
        if not count:
            return np.zeros(0, _STORED[self.dtype])
        return np.memmap(self.path, _STORED[self.dtype], "r", self.start, (count,))

    def values(self, rows: slice = slice(None)) -> Floats:
        """Some rows as a float64 matrix, (rows, everything else)."""
        stored = self.raw().reshape(-1, self.width)[rows] if self.shape else self.raw().reshape(1, 1)
        if self.dtype == "BF16":
            return (stored.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
        return stored.astype(np.float64)


def read_places(path: Path) -> dict[str, Place]:
    """name -> tensor, of a file or of every file in a folder, those of sub-folders as `folder/name`."""
    files = sorted(path.rglob("*.safetensors")) if path.is_dir() else [path]
    found = {}
    for file in files:
        with file.open("rb") as opened:
            length = int.from_bytes(opened.read(8), "little")
            header = json.loads(opened.read(length))
        header.pop("__metadata__", None)
        inside = "" if file.parent == path or file == path else f"{file.parent.relative_to(path)}/"
        for name, entry in header.items():
            begin = 8 + length + entry["data_offsets"][0]
            found[inside + name] = Place(file, entry["dtype"], tuple(entry["shape"]), begin)
    return found


class Term:
    """One adapter module on one tensor."""

    def __init__(self, adapter: Mapping[str, Any], module: str, factors: Mapping[str, Place]) -> None:
        _, self.first, self.last = adapter["modules"][module]
        self.kind: str = adapter["kind"]
        self._scale = float(adapter["scale"]) * float(adapter["weight"])
        prefix = f"{module}."
        self._factors = {key.removeprefix(prefix): place for key, place in factors.items() if key.startswith(prefix)}

    def factor(self, *names: str) -> Place:
        """The factor under whichever of its names is there."""
        return next(self._factors[name] for name in names if name in self._factors)

    def update(self, shape: tuple[int, ...]) -> Floats:
        """All rows of the update of a tensor (or some of its rows) of `shape`, as a matrix."""
        if self.kind == "loha":
            one, two = (self.factor(f"hada_w{n}_a").values() @ self.factor(f"hada_w{n}_b").values() for n in (1, 2))
            return np.asarray(self._scale * one * two)
        if self.kind == "lokr":
            small = self.factor("lokr_w1").values()
            large = self.factor("lokr_w2_a").values() @ self.factor("lokr_w2_b").values()
            large = large.reshape(shape[0] // small.shape[0], shape[1] // small.shape[1], -1)
            product = np.einsum("ij,pqt->ipjqt", small, large)
            return np.asarray(self._scale * product.reshape(shape[0], -1))
        up, down = self.factor("lora_up.weight", "lora_B.weight"), self.factor("lora_down.weight", "lora_A.weight")
        return np.asarray(self._scale * (up.values() @ down.values()))

    def apply(self, old: Floats, shape: tuple[int, ...]) -> Floats:
        """All rows of the tensor after this module. DoRA is defined here for weight 1 only."""
        if self.kind != "dora":
            return old + self.update(shape)
        new = old + self.update(shape)
        lengths = np.linalg.norm(new, axis=1, keepdims=True) + _EPSILON
        return np.asarray(new * self.factor("dora_scale").values() / lengths)


class Mix:
    """The tensor of a second model, of which some is wanted."""

    def __init__(self, other: Place, alpha: float) -> None:
        self.first, self.last = 0, None
        self._other, self._alpha = other, alpha

    def apply(self, old: Floats, shape: tuple[int, ...]) -> Floats:
        """All rows of the weighted sum."""
        del shape
        return np.asarray((self._other.values() - old) * self._alpha + old)


def read_terms(job: Mapping[str, Any]) -> dict[str, list[Term]] | dict[str, list[Mix]]:
    """tensor name of the job's base -> what is done to it."""
    if "other" in job:
        base, other = (read_places(Path(job[model])) for model in ("base", "other"))
        changed = (name for name, place in base.items() if not np.array_equal(place.raw(), other[name].raw()))
        return {name: [Mix(other[name], job["alpha"])] for name in changed}
    found: dict[str, list[Term]] = {}
    for adapter in job["adapters"]:
        by_module: dict[str, dict[str, Place]] = {}
        factors = read_places(Path(adapter["file"]))
        for key, place in factors.items():
            module = next(head for head in _heads(key) if head in adapter["modules"])
            by_module.setdefault(module, {})[key] = place
        for module, (tensor, _, _) in adapter["modules"].items():
            found.setdefault(tensor, []).append(Term(adapter, module, by_module[module]))
    return found


def _heads(key: str) -> Iterator[str]:
    head, dot, _ = key.rpartition(".")
    while dot:
        yield head
        head, dot, _ = head.rpartition(".")


def expected(old: Place, terms: Sequence[Term | Mix]) -> Floats:
    """The exact new values of one tensor, as a matrix."""
    new = old.values()
    for term in terms:
        rows = slice(term.first, term.last)
        new[rows] = term.apply(new[rows], (len(new[rows]), *old.shape[1:]))
    return new


def spacing(values: Floats, tag: str) -> Floats:
    """The distance between neighbouring numbers of dtype `tag` at `values`."""
    bits, smallest = FLOATS[tag]
    exponent = np.maximum(np.frexp(values)[1] - 1, smallest)
    return np.asarray(np.ldexp(1.0, exponent - bits))


class Verdict:
    """What was seen so far."""

    def __init__(self) -> None:
        self.tensors = self.elements = self.equal = 0
        self.worst = 0.0
        self.untouched = Counter[str]()

    def compare(self, old: Floats, exact: Floats, found: Floats, tag: str) -> None:
        """Count some elements of a touched tensor, stored as `tag`."""
        step = spacing(exact, tag)
        self.elements += exact.size
        self.equal += int(np.count_nonzero(np.rint(exact / step) * step == found))
        error = np.abs(found - exact) / spacing(np.maximum(np.abs(exact), np.abs(old)), tag)
        self.worst = max(self.worst, float(np.nan_to_num(error, nan=np.inf).max(initial=0.0)))

    def document(self) -> dict[str, Any]:
        return {
            **{"touched_tensors": self.tensors, "elements": self.elements},
            **{"equal_share": self.equal / self.elements if self.elements else 1.0, "max_ulp": round(self.worst, 3)},
            "untouched": dict(self.untouched),
        }


def judge(job: Mapping[str, Any], output: Path, base: Path | None = None, every: int = 1) -> dict[str, Any]:
    """The verdict on `output`.

    base: the job's base in the layout of `output`, where that is another. every: recompute each Nth touched tensor.
    """
    terms, origin = read_terms(job), read_places(Path(job["base"]))
    start = origin if base is None else read_places(base)
    found = read_places(output)
    same = {name: name for name in start} if base is None else _recognised(start, origin, terms)
    verdict = Verdict()
    for name, old in start.items():
        new = found.get(name)
        touched = terms.get(same.get(name, ""))
        if new is None:
            verdict.untouched["missing" if touched is None else "touched but missing"] += 1
        elif touched is None:
            verdict.untouched[_fate(old, new)] += 1
        else:
            verdict.tensors += 1
            if (verdict.tensors - 1) % every:
                continue
            before, exact = old.values(), expected(origin[same[name]], touched)
            step = max(1, _BLOCK // max(1, old.width))
            for rows in (slice(first, first + step) for first in range(0, before.shape[0], step)):
                verdict.compare(before[rows], exact[rows], new.values(rows), new.dtype)
    if verdict.tensors != len(terms):
        verdict.untouched["touched but not found"] += len(terms) - verdict.tensors
    return verdict.document()


def _fate(old: Place, new: Place) -> str:
    if (old.dtype, math.prod(old.shape)) == (new.dtype, math.prod(new.shape)):
        stored = old.raw().view(np.uint8), new.raw().view(np.uint8)
        return "identical" if np.array_equal(*stored) else "changed"
    equal = math.prod(old.shape) == math.prod(new.shape) and np.array_equal(old.values().ravel(), new.values().ravel())
    return "same value" if equal else "changed"


def _recognised(start: Mapping[str, Place], origin: Mapping[str, Place], wanted: Mapping[str, Any]) -> dict[str, str]:
    """name in the other layout -> name in the job's base, for `wanted` tensors, by their bytes."""
    digests = {_digest(origin[name]): name for name in wanted}
    found = ((name, digests.get(_digest(place))) for name, place in start.items())
    return {name: theirs for name, theirs in found if theirs is not None}


def _digest(place: Place) -> bytes:
    return hashlib.blake2b(place.raw().view(np.uint8).data, digest_size=16).digest()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("job", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--base", type=Path, help="the job's base in the layout of OUTPUT")
    parser.add_argument("--every", type=int, default=1, help="recompute each Nth touched tensor; default: all")
    arguments = parser.parse_args()
    job = json.loads(arguments.job.read_text("utf-8"))
    print(json.dumps(judge(job, arguments.output, arguments.base, arguments.every)))


if __name__ == "__main__":
    main()
