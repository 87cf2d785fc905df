"""LoHa, LoKr and DoRA without torch: against their definitions, the chains of torch, and what verify recomputes."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from support import random, save

from bake.errors import NonFinite
from bake.execute.chunk import Chunk
from bake.execute.device import Desk as TorchDesk
from bake.execute.device import Device
from bake.execute.pipeline import work_on
from bake.execute.plain import chains, updates
from bake.execute.plain.chains import Chained, is_chain
from bake.execute.plain.desk import Desk
from bake.execute.plain.rounding import TooLarge
from bake.execute.rounding import Nearest
from bake.execute.survival import NOTHING, Survival
from bake.io.arrays import read_array, stored_dtype
from bake.io.fileset import Expected, FileSet
from bake.keys.factors import Decomposition, as_matrix
from bake.plan.model import Stored, TensorPlan, Term
from bake.verify.rounding import round_once
from bake.verify.updates import rows_after

Doubles = NDArray[np.float64]

HEIGHT, WIDTH = 24, 30
EPSILON = 2.0**-23


@dataclass(frozen=True)
class Given:
    """A term, on all of the tensor unless said otherwise."""

    algorithm: str
    arrays: Mapping[str, NDArray[Any]]
    weight: float = 0.7
    rows: tuple[int, int] | None = None
    columns: tuple[int, int] | None = None
    first: int = 0  # row of the update that goes to the first row of the region
    transposed: bool = False
    turn: int = 0
    axis: int | None = None  # of a magnitude
    rank_limit: int | None = None
    settings: Mapping[str, float] = field(default_factory=dict)

    def update(self) -> Doubles:
        """All of the update at scale 1, as a matrix oriented as the tensor is."""
        arrays = {name: array.astype(np.float64) for name, array in self.arrays.items()}
        whole = {"lora": self._lora, "loha": loha, "lokr": self._lokr}[self.algorithm](arrays)
        matrix = whole.reshape(as_matrix(whole.shape))
        return matrix.T if self.transposed else matrix

    def _lora(self, arrays: Mapping[str, Doubles]) -> Doubles:
        up, down, mid = arrays["up"], arrays["down"], arrays.get("mid")
        if mid is not None:
            return np.einsum("abkl,oa,bi->oikl", mid, up.reshape(len(up), -1), down.reshape(len(down), -1))
        if self.settings:
            expert, experts = int(self.settings["expert"]), int(self.settings["experts"])
            up, down = up[:, expert::experts], np.split(down, experts)[expert]
        return np.tensordot(up.reshape(len(up), -1)[:, : self.rank_limit], down[: self.rank_limit], 1)

    def _lokr(self, arrays: Mapping[str, Doubles]) -> Doubles:
        w1, w2 = (kron_side(arrays, name) for name in ("w1", "w2"))
        if self.settings.get("swapped"):
            return np.stack([np.kron(w2[:, :, tap], w1) for tap in range(w2.shape[2])], axis=2)
        return np.kron(w1.reshape(*w1.shape, *(1 for _ in w2.shape[2:])), w2)


def loha(arrays: Mapping[str, Doubles]) -> Doubles:
    first, second = (product(arrays[f"w{n}_a"], arrays[f"w{n}_b"], arrays.get(f"t{n}")) for n in (1, 2))
    return first * second


def kron_side(arrays: Mapping[str, Doubles], name: str) -> Doubles:
    whole = arrays.get(f"kron_{name}")
    if whole is not None:
        return whole
    core = arrays.get("kron_t2") if name == "w2" else None
    return product(arrays[f"kron_{name}_a"], arrays[f"kron_{name}_b"], core)


def product(a: Doubles, b: Doubles, t: Doubles | None) -> Doubles:
    if t is not None:
        return np.einsum("ijkl,ip,jr->prkl", t, a, b)
    return np.tensordot(a.reshape(a.shape[:2]), b, 1)


SCALE = 0.5  # alpha / rank of every term


class Scene:
    """A tensor and its terms, stored as a run finds them."""

    def __init__(self, folder: Path, base: NDArray[Any], given: Sequence[Given], tag: str = "F16") -> None:
        self.base, self.given, self.tag = base, given, tag
        names = {f"{place}.{name}": array for place, each in enumerate(given) for name, array in each.arrays.items()}
        path = save(folder / "all.safetensors", {"base": base, **names})
        status = path.stat()
        self.files = FileSet([Expected(path, status.st_size, status.st_mtime_ns)])
        with self.files.using(0) as file:
            self.stored = {
                name: Stored(0, name, info.dtype, info.shape, (info.begin, info.end))
                for name, info in file.tensors.items()
            }
        terms = tuple(self._term(place, each) for place, each in enumerate(given))
        self.plan = TensorPlan("a.weight", base.shape, tag, (0, 0), self.stored["base"], "unet", terms)
        self.rows, self.columns = as_matrix(base.shape)

    def _term(self, place: int, each: Given) -> Term:
        height, width = as_matrix(self.base.shape)
        rows = each.rows or (0, height)
        return Term(
            algorithm=each.algorithm,
            factors={name: self.stored[f"{place}.{name}"] for name in each.arrays},
            scale=SCALE,
            weight=each.weight,
            rows=rows,
            columns=each.columns or (0, width),
            part=(each.first, each.first + rows[1] - rows[0]),
            height=each.first + rows[1] - rows[0],
            transposed=each.transposed,
            adapter=0,
            module="a",
            dora=None if each.axis is None else Decomposition(each.axis, EPSILON),
            settings=dict(each.settings),
            rank_limit=each.rank_limit,
            turn=each.turn,
        )

    def exact(self) -> Doubles:
        """The result by definition, all rows at once."""
        values = self.base.astype(np.float64).reshape(self.rows, self.columns)
        for each in self.given:
            values = np.roll(values, -each.turn, axis=0)
            rows, columns = slice(*(each.rows or (0, self.rows))), slice(*(each.columns or (0, self.columns)))
            old = values[rows, columns]
            update = SCALE * each.update()[each.first :][: len(old)]
            values[rows, columns] = old + each.weight * update if each.axis is None else decomposed(each, old, update)
            values = np.roll(values, each.turn, axis=0)
        return values

    def run(self, step: int = 1) -> tuple[bytes, Survival]:
        """What NumPy writes, in blocks of so many tiles, and what survived."""
        desk, out, survival = Desk(), np.empty((self.rows, self.columns), np.uint16), NOTHING
        lying = self.base.reshape(self.rows, self.columns).view(stored_dtype(self.plan.source.dtype))
        with np.errstate(all="ignore"):
            work = Chained(self.plan, self.files, desk, lambda: None)
            for first in range(0, self.rows, step * work.grain):
                rows = slice(first, first + step * work.grain)
                survival += work.fuse(lying[rows], out[rows], first, desk)
        return out.tobytes(), survival

    def run_torch(self) -> tuple[bytes, Survival]:
        """The same of torch."""
        device = Device("cpu")
        work = work_on(self.plan, self.files, device, Nearest(self.tag))
        out = torch.empty((self.rows, self.columns), dtype={"F16": torch.float16, "BF16": torch.bfloat16}[self.tag])
        raw = torch.from_numpy(self.base.reshape(self.rows, self.columns).copy())
        survival = work.fuse(raw, out, Chunk(0, self.rows, self.columns), TorchDesk(device))
        return out.view(torch.int16).numpy().tobytes(), survival

    def recomputed(self, step: int) -> Doubles:
        """What verify takes for right, in blocks of so many rows."""
        source = self.stored["base"]

        def base(rows: range) -> Doubles:
            with self.files.using(0) as file:
                values = read_array(file, source.span[0], source.dtype, (self.rows, self.columns), np.float64)
            return values[rows.start : rows.stop].copy()

        after = rows_after(self.plan, self.files, base)
        blocks = [range(first, min(self.rows, first + step)) for first in range(0, self.rows, step)]
        return np.concatenate([after(block) for block in blocks])

    def check(self) -> None:
        """Hold everything that computes it against the definition and each other."""
        assert is_chain(self.plan.terms)
        exact = self.exact()
        size = np.abs(exact).max()
        np.testing.assert_allclose(self.recomputed(5), exact, rtol=1e-12, atol=1e-13 * size)
        due = round_once(exact, self.tag)
        written, survival = self.run()
        found = torch.frombuffer(bytearray(written), dtype={"F16": torch.float16, "BF16": torch.bfloat16}[self.tag])
        np.testing.assert_array_equal(found.double().numpy().reshape(due.shape), due)
        by_torch, survival_by_torch = self.run_torch()
        assert written == by_torch
        assert survival.numbers == pytest.approx(survival_by_torch.numbers, rel=1e-4, abs=1e-12 * size)
        assert self.run(3)[0] == self.run(1000)[0] == written


def decomposed(given: Given, old: Doubles, update: Doubles) -> Doubles:
    """DoRA at a strength, by docs/formats.md."""
    updated, magnitude = old + update, given.arrays["magnitude"].astype(np.float64).reshape(-1)
    if (given.axis == 1) != given.transposed:
        taps = old.shape[1] // len(magnitude)
        squares = np.square(updated).reshape(len(old), len(magnitude), taps).sum((0, 2))
        lengths, magnitude = np.repeat(np.sqrt(squares), taps), np.repeat(magnitude, taps)
    else:
        lengths = np.sqrt(np.square(updated).sum(1, keepdims=True))
        magnitude = magnitude[given.first :][: len(old), None]
    new = np.where(lengths == 0, old, updated * magnitude / (lengths + EPSILON))
    return old + given.weight * (new - old)


def half(seed: int, *shape: int, spread: float = 0.3) -> NDArray[np.float16]:
    return random(seed, *shape, spread=spread).astype(np.float16)


def sizes(axis_length: int, seed: int = 50) -> dict[str, NDArray[Any]]:
    return {"magnitude": (np.abs(random(seed, axis_length)) + 0.5).astype(np.float32)}


def lora(rows: int = HEIGHT, columns: int = WIDTH, rank: int = 3) -> dict[str, NDArray[Any]]:
    return {"up": half(1, rows, rank), "down": half(2, rank, columns)}


def hada(rows: int = HEIGHT, columns: int = WIDTH) -> dict[str, NDArray[Any]]:
    return {
        "w1_a": half(1, rows, 2),
        "w1_b": half(2, 2, columns),
        "w2_a": half(3, rows, 4),
        "w2_b": half(4, 4, columns),
    }


LINEAR = {
    "loha": [Given("loha", hada())],
    "lokr whole": [Given("lokr", {"kron_w1": half(1, 4, 5), "kron_w2": half(2, 6, 6)})],
    "lokr of factors": [
        Given(
            "lokr",
            {"kron_w1_a": half(1, 4, 2), "kron_w1_b": half(2, 2, 5), "kron_w2_a": half(3, 6, 2)}
            | {"kron_w2_b": half(4, 2, 6)},
        )
    ],
    "transposed": [
        Given("loha", hada(WIDTH, HEIGHT), transposed=True),
        Given(
            "lokr",
            {"kron_w1": half(1, 5, 4), "kron_w2_a": half(2, 6, 3), "kron_w2_b": half(3, 3, 6)},
            transposed=True,
        ),
        Given("lora", lora(WIDTH, HEIGHT), transposed=True, rank_limit=2),
    ],
    "with LoRAs": [
        Given("lora", lora(), rank_limit=2),
        Given("loha", hada(), -0.4),
        Given("lora", lora(rank=6), settings={"expert": 1, "experts": 3}),
    ],
    "parts": [
        Given("loha", hada(rows=40), rows=(5, 21), first=11, columns=(0, WIDTH)),
        Given("lokr", {"kron_w1": half(1, 4, 4), "kron_w2": half(2, 6, 5)}, rows=(3, 20), first=2, columns=(4, 24)),
        Given("lora", lora(rows=2), rows=(22, 24)),
    ],
    "turned": [Given("loha", hada(), turn=12), Given("loha", hada() | sizes(HEIGHT), axis=0, turn=10)],
    "dora by rows": [Given("lora", lora() | sizes(HEIGHT), 1.0, axis=0)],
    "dora by columns": [Given("lora", lora() | sizes(WIDTH), 1.0, axis=1)],
    "dora in part": [Given("loha", hada() | sizes(HEIGHT), axis=0), Given("lora", lora() | sizes(WIDTH), -0.5, axis=1)],
    "dora without effect": [
        Given("lora", lora() | sizes(WIDTH), 0.0, axis=1),
        Given("lora", lora() | sizes(HEIGHT), 0.0, axis=0),
        Given("loha", hada()),
    ],
    "dora of rows of an update": [Given("lora", lora(rows=40) | sizes(40), rows=(5, 21), first=11, axis=0)],
    "dora by columns of a region": [Given("lora", lora(rows=16) | sizes(WIDTH), rows=(5, 21), axis=1)],
    "dora transposed": [
        Given("lora", lora(WIDTH, HEIGHT) | sizes(WIDTH), 1.0, transposed=True, axis=0),
        Given("lora", lora(WIDTH, HEIGHT) | sizes(HEIGHT), 1.0, transposed=True, axis=1),
    ],
    "dora by columns of what came before": [
        Given("lora", lora() | sizes(HEIGHT), 0.9, axis=0),
        Given("lokr", {"kron_w1": half(1, 4, 5), "kron_w2": half(2, 6, 6)} | sizes(WIDTH), 0.8, axis=1),
        Given("lora", lora()),
        Given("loha", hada() | sizes(WIDTH), 0.3, axis=1),
    ],
}
TUCKER = {"t1": half(5, 2, 2, 3, 3), "t2": half(6, 3, 3, 3, 3)}
CONVOLUTIONS = {
    "loha": [Given("loha", hada(HEIGHT, 45) | {"w1_b": half(2, 2, 5, 3, 3), "w2_b": half(4, 4, 5, 3, 3)})],
    "loha with a core": [
        Given(
            "loha",
            {"w1_a": half(1, 2, 24), "w1_b": half(2, 2, 5), "w2_a": half(3, 3, 24), "w2_b": half(4, 3, 5)} | TUCKER,
        )
    ],
    "lokr": [Given("lokr", {"kron_w1": half(1, 4, 1), "kron_w2": half(2, 6, 5, 3, 3)})],
    "lokr of factors": [
        Given("lokr", {"kron_w1": half(1, 4, 5), "kron_w2_a": half(2, 6, 2, 1, 1), "kron_w2_b": half(3, 2, 1, 3, 3)})
    ],
    "lokr with a core": [
        Given(
            "lokr",
            {"kron_w1": half(1, 4, 5), "kron_w2_a": half(2, 2, 6), "kron_w2_b": half(3, 2, 1), "kron_t2": TUCKER["t1"]},
        )
    ],
    "early lokr": [Given("lokr", {"kron_w1": half(1, 4, 9), "kron_w2": half(2, 6, 5)})],
    "lora with a core": [
        Given("lora", {"up": half(1, 24, 2, 1, 1), "down": half(2, 2, 5, 1, 1), "mid": TUCKER["t1"]}),
        Given("loha", hada(HEIGHT, 45)),
    ],
    "dora by columns": [Given("lora", {"up": half(1, 24, 2, 1, 1), "down": half(2, 2, 5, 3, 3)} | sizes(5), axis=1)],
    "dora by rows": [Given("loha", hada(HEIGHT, 45) | sizes(HEIGHT), axis=0)],
}


@pytest.fixture(autouse=True)
def _small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chains, "_TILE_ELEMENTS", 5 * WIDTH)


@pytest.mark.parametrize("name", LINEAR)
def test_matrices(tmp_path: Path, name: str) -> None:
    Scene(tmp_path, half(0, HEIGHT, WIDTH, spread=1.0), LINEAR[name]).check()


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_convolutions(tmp_path: Path, name: str) -> None:
    Scene(tmp_path, half(0, HEIGHT, 5, 3, 3, spread=1.0), CONVOLUTIONS[name]).check()


def test_a_conv1d_of_peft_has_the_factors_of_lokr_in_the_other_order(tmp_path: Path) -> None:
    term = Given("lokr", {"kron_w1": half(1, 4, 5), "kron_w2": half(2, 6, 2, 3)}, settings={"swapped": 1})
    Scene(tmp_path, half(0, HEIGHT, 10, 3, spread=1.0), [term]).check()


@pytest.mark.parametrize("name", ["lokr of factors", "transposed"])
def test_a_large_side_of_lokr_is_made_as_it_is_needed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(updates, "_SETTLED", 0)
    Scene(tmp_path, half(0, HEIGHT, WIDTH, spread=1.0), LINEAR[name]).check()


@pytest.mark.parametrize("tag", ["F16", "BF16"])
@pytest.mark.parametrize("name", ["loha", "dora by rows", "dora by columns"])
def test_from_float32(tmp_path: Path, tag: str, name: str) -> None:
    Scene(tmp_path, random(0, HEIGHT, WIDTH).astype(np.float32), LINEAR[name], tag).check()


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("weight", [1.0, 0.6])
def test_dora_leaves_what_has_no_direction(tmp_path: Path, axis: int, weight: float) -> None:
    """Rows and channels that are 0 in W and in the update; and where the update takes away all of W."""
    base, factors = half(0, HEIGHT, WIDTH, spread=1.0), lora(rank=1)
    base[7], base[:, 11] = 0, 0
    factors["up"][7], factors["down"][:, 11] = 0, 0
    if axis == 0:  # W = (1, 0, ... 0), of which the update makes 0
        factors["up"][3], factors["down"][0, 0] = 1, -2
        factors["down"][0, 1:] = 0
        base[3] = np.eye(1, WIDTH)[0]
    scene = Scene(tmp_path, base, [Given("lora", factors | sizes((HEIGHT, WIDTH)[axis]), weight, axis=axis)])
    scene.check()
    written = np.frombuffer(scene.run()[0], np.float16).reshape(base.shape)
    assert np.array_equal(written[3], base[3]) == (axis == 0)
    assert not written[7].any()
    assert not written[:, 11].any()


@pytest.mark.parametrize("name", ["loha", "lokr whole", "dora by rows", "dora by columns"])
@pytest.mark.parametrize("place", ["base", "factor", "weight"])
@pytest.mark.parametrize("tag", ["F16", "BF16"])
def test_what_is_no_number_or_too_large_is_left_to_torch(tmp_path: Path, name: str, place: str, tag: str) -> None:
    (term,) = LINEAR[name]
    base, arrays = random(0, HEIGHT, WIDTH).astype(np.float32), dict(term.arrays)
    if place == "base":
        base[-1, 4] = np.nan if tag == "F16" else np.inf
    elif place == "factor":
        factor = "magnitude" if "magnitude" in arrays else next(iter(arrays))
        arrays[factor] = arrays[factor].copy()
        arrays[factor].reshape(-1)[-1] = np.inf
    weight = 1e300 if place == "weight" else term.weight
    with pytest.raises(TooLarge):
        Scene(tmp_path, base, [Given(term.algorithm, arrays, weight, axis=term.axis)], tag).run()


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("weight", [1.0, 0.5])
def test_rows_too_long_to_be_measured_do_not_become_zero(tmp_path: Path, axis: int, weight: float) -> None:
    arrays = {name: np.full(array.shape, 1e38, np.float32) for name, array in hada().items()}
    magnitude = sizes((HEIGHT, WIDTH)[axis])
    base = random(0, HEIGHT, WIDTH).astype(np.float32)
    scene = Scene(tmp_path, base, [Given("loha", arrays | magnitude, weight, axis=axis)], "BF16")
    scene.check()
    terms = (dataclasses.replace(scene.plan.terms[0], scale=1e20),)
    scene.plan = dataclasses.replace(scene.plan, terms=terms)
    with pytest.raises(TooLarge):
        scene.run()
    with pytest.raises(NonFinite, match="the update is not finite"):
        scene.run_torch()


def test_what_cannot_be_applied_here_is_told_from_what_can() -> None:
    def of(algorithm: str, *factors: str) -> Any:
        stored = dict.fromkeys(factors, Stored(0, "a", "F16", (1,), (0, 2)))
        return Term(algorithm, stored, 1.0, 1.0, (0, 1), (0, 1), (0, 1), 1, False, 0, "a")

    lora, tucker, dora = (
        of("lora", "up", "down"),
        of("lora", "up", "down", "mid"),
        of("lora", "up", "down", "magnitude"),
    )
    for terms in ([lora], [lora, tucker], [dora, of("oft", "oft_blocks")], [dora, of("full", "diff")], []):
        assert not is_chain(terms)
    for terms in ([dora], [lora, dora], [tucker, of("loha")], [of("lokr")]):
        assert is_chain(terms)
