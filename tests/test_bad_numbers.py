"""NaN, infinity and overflow: refused by name, or allowed by name, never passed on in silence."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from models import random_arrays, save_base
from names import small
from support import Arrays, Done, bake, drafts, metadata, random, save, save_torch

import bake as library
from bake.errors import NonFinite, UsageError

Q = "model.layers.0.self_attn.q_proj"
K = "model.layers.0.self_attn.k_proj"
NORM = "model.norm.weight"
MODULE = f"base_model.model.{Q}"
NAN, INFINITY = math.nan, math.inf

TORCH = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64}
TORCH |= {"F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2}


def numbers(height: int = 8, width: int = 8, seed: int = 0) -> torch.Tensor:
    return torch.from_numpy(random(seed, height, width, spread=0.5)).float()


def write_base(path: Path, dtype: str = "F16", **places: float) -> Path:
    """A base with numbers of its own at places of q_proj, given as r1c2=value."""
    weight = numbers()
    for place, value in places.items():
        row, column = place.removeprefix("r").split("c")
        weight[int(row), int(column)] = value
    tensors = {f"{Q}.weight": weight, f"{K}.weight": numbers(seed=1), NORM: torch.ones(8)}
    return save_torch(path, {name: tensor.to(TORCH[dtype]) for name, tensor in tensors.items()})


def write_lora(path: Path, spread: float = 0.1, **changed: Any) -> Path:
    up, down = random(5, 8, 2, spread=spread), random(6, 2, 8, spread=spread)
    arrays = {f"{MODULE}.lora_A.weight": down, f"{MODULE}.lora_B.weight": up}
    arrays |= {f"{MODULE}.{name}": value for name, value in changed.items()}
    return save(path, {name: np.asarray(array, np.float32) for name, array in arrays.items()})


def q_of(path: Path) -> torch.Tensor:
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        return file.get_tensor(f"{Q}.weight")


def refused(done: Done, *says: str) -> None:
    assert done.code == 7, done.err or done.out
    assert done.out == ""
    assert done.err.count("\n") == 1
    for text in says:
        assert text in done.err


@pytest.fixture
def lora(tmp_path: Path) -> Path:
    return write_lora(tmp_path / "in" / "style.safetensors")


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out.safetensors"


class TestBase:
    @pytest.mark.parametrize("dtype", TORCH)
    @pytest.mark.parametrize("bad", [NAN, INFINITY, -INFINITY])
    def test_what_is_no_number_is_refused_with_the_tensors_name(
        self, dtype: str, bad: float, tmp_path: Path, lora: Path, out: Path
    ) -> None:
        if dtype == "F8_E4M3" and not math.isnan(bad):
            return  # it knows no infinity
        base = write_base(tmp_path / "in" / "base.safetensors", dtype, r3c2=bad)
        refused(bake("fuse", base, "-l", lora, "-o", out), f"{Q}.weight", "--allow-nonfinite-base")
        assert not out.exists()
        assert not drafts(tmp_path)

    @pytest.mark.parametrize("dtype", TORCH)
    @pytest.mark.parametrize("algorithm", ["sum", "chain"])
    def test_where_it_is_allowed_it_stays_and_everything_else_is_as_without_it(
        self, dtype: str, algorithm: str, tmp_path: Path, out: Path
    ) -> None:
        bad = {"r0c0": NAN, "r3c2": -NAN} | ({} if dtype == "F8_E4M3" else {"r3c5": INFINITY, "r7c7": -INFINITY})
        base = write_base(tmp_path / "in" / "bad.safetensors", dtype, **bad)
        clean = write_base(tmp_path / "in" / "clean.safetensors", dtype, **dict.fromkeys(bad, 0.0))
        if algorithm == "sum":
            lora = write_lora(tmp_path / "in" / "style.safetensors")
        else:  # a LoHa is no thin product
            factors = {name: random(place, *shape, spread=0.3) for place, (name, shape) in enumerate(LOHA.items())}
            lora = save(tmp_path / "in" / "style.safetensors", factors)
        done = bake("fuse", base, "-l", lora, "-o", out, "--allow-nonfinite-base", "--verify", "full", "--json")
        assert done.code == 0, done.out
        assert all(0 <= share <= 1 for share in done.json["survival"].values())
        library.fuse(clean, [lora], tmp_path / "reference.safetensors")
        before, after, reference = q_of(base), q_of(out), q_of(tmp_path / "reference.safetensors")
        kept = ~before.double().isfinite()
        assert int(kept.sum()) == len(bad)
        assert as_bytes(after)[kept].equal(as_bytes(before)[kept])
        assert as_bytes(after)[~kept].equal(as_bytes(reference)[~kept])

    def test_the_recipe_says_so_and_verification_replays_it(self, tmp_path: Path, lora: Path, out: Path) -> None:
        base = write_base(tmp_path / "in" / "base.safetensors", r3c2=NAN)
        assert bake("fuse", base, "-l", lora, "-o", out, "--allow-nonfinite-base").code == 0
        assert '"allow_nonfinite_base":true' in metadata(out)["bake.recipe"]
        assert bake("verify", out, "--full").code == 0
        words = ("verify", out, "--base", base, "-l", lora)
        assert bake(*words, "--allow-nonfinite-base").code == 0
        assert bake(*words, "--full").code == 9  # nobody said that it may be there

    def test_verification_sees_a_number_in_its_place_and_it_in_the_place_of_a_number(
        self, tmp_path: Path, lora: Path, out: Path
    ) -> None:
        base = write_base(tmp_path / "in" / "base.safetensors", r3c2=NAN)
        library.fuse(base, [lora], out, allow_nonfinite_base=True)
        words = ("verify", out, "--base", base, "-l", lora, "--allow-nonfinite-base", "--full")
        for row, column, value in ((3, 2, 1.0), (3, 2, INFINITY), (4, 4, NAN)):
            changed = q_of(out).clone()
            changed[row, column] = value
            content = bytearray(out.read_bytes())
            start = content.index(as_bytes(q_of(out)).numpy().tobytes())
            content[start : start + changed.numel() * 2] = as_bytes(changed).numpy().tobytes()
            good = out.read_bytes()
            out.write_bytes(content)
            assert bake(*words).code == 9, (row, column, value)
            out.write_bytes(good)
        assert bake(*words).code == 0

    def test_tensors_that_are_only_copied_are_not_looked_at(self, tmp_path: Path, lora: Path, out: Path) -> None:
        other = save(
            tmp_path / "in" / "other.safetensors",
            {name.replace("q_proj", "k_proj"): array for name, array in arrays_of(lora).items()},
        )
        base = write_base(tmp_path / "in" / "base.safetensors", r3c2=NAN)
        assert bake("fuse", base, "-l", other, "-o", out).code == 0
        assert as_bytes(q_of(out)).equal(as_bytes(q_of(base)))

    def test_tensors_that_change_their_dtype_are(self, tmp_path: Path, out: Path) -> None:
        base = write_base(tmp_path / "in" / "base.safetensors", "F32", r3c2=NAN, r1c1=INFINITY)
        refused(bake("fuse", base, "--dtype", "bf16", "-o", out), f"{Q}.weight: the base holds NaN")
        assert bake("fuse", base, "--dtype", "bf16", "-o", out, "--allow-nonfinite-base").code == 0
        after = q_of(out)
        assert bool(after[3, 2].isnan())
        assert after[1, 1] == INFINITY
        assert int((~after.isfinite()).sum()) == 2

    def test_infinity_that_the_dtype_does_not_know_is_refused_all_the_same(self, tmp_path: Path, out: Path) -> None:
        name = "model.diffusion_model.input_blocks.4.1.transformer_blocks.0.attn1.to_q.weight"
        weight = random_arrays(small("sd1"))[name]
        weight[1, 1] = INFINITY
        base = save_base(tmp_path / "base.safetensors", **{name: weight})
        words = ("fuse", base, "--dtype", "unet=fp8_e4m3fn", "-o", out, "--allow-nonfinite-base")
        refused(bake(*words), f"{name}: the base holds infinity, which F8_E4M3 has no number for")
        weight[1, 1] = NAN
        save_base(tmp_path / "base.safetensors", **{name: weight})
        assert bake(*words).code == 0

    def test_it_may_not_spread(self, tmp_path: Path, out: Path) -> None:
        base = write_base(tmp_path / "in" / "base.safetensors", r3c2=NAN)
        rotations = save(tmp_path / "in" / "oft.safetensors", {f"diffusion_model.{Q}.oft_blocks": random(3, 2, 4, 4)})
        done = bake("fuse", base, "-l", rotations, "-o", out, "--allow-nonfinite-base")
        refused(done, f"{Q}.weight", "spreads to other elements")
        dora = write_lora(tmp_path / "in" / "dora.safetensors", lora_magnitude_vector=np.ones(8))
        refused(bake("fuse", base, "-l", dora, "-o", out, "--allow-nonfinite-base"), "spreads to other elements")

    def test_it_excuses_nobody_else(self, tmp_path: Path, lora: Path, out: Path) -> None:
        base = write_base(tmp_path / "in" / "base.safetensors", r3c2=NAN)
        allow = ("-o", out, "--allow-nonfinite-base")
        refused(bake("fuse", base, "-l", f"{lora}:1e7", *allow), "F16 ends at 65504")
        bad = write_lora(tmp_path / "in" / "bad.safetensors", **{"lora_B.weight": with_nan(8, 2)})
        refused(bake("fuse", base, "-l", bad, *allow), "NaN or infinity")
        clean = write_base(tmp_path / "in" / "clean.safetensors")
        refused(bake("fuse", clean, "-l", bad, *allow), "an adapter holds NaN")
        # at the very place where the base has one too
        difference = np.zeros((8, 8), np.float32)
        difference[3, 2] = NAN
        stored = save(tmp_path / "in" / "diff.safetensors", {f"diffusion_model.{Q}.diff": difference})
        refused(bake("fuse", base, "-l", stored, *allow), "an adapter holds NaN")


class TestAdapter:
    @pytest.mark.parametrize("bad", [NAN, INFINITY])
    @pytest.mark.parametrize("factor", ["lora_A.weight", "lora_B.weight", "lora_magnitude_vector", "diff"])
    def test_factors(self, factor: str, bad: float, tmp_path: Path, out: Path) -> None:
        base = write_base(tmp_path / "in" / "base.safetensors")
        shape = {"lora_A.weight": (2, 8), "lora_B.weight": (8, 2), "lora_magnitude_vector": (8,), "diff": (8, 8)}[
            factor
        ]
        if factor == "diff":
            lora = save(tmp_path / "in" / "bad.safetensors", {f"diffusion_model.{Q}.diff": with_nan(*shape, bad=bad)})
        else:
            lora = write_lora(tmp_path / "in" / "bad.safetensors", **{factor: with_nan(*shape, bad=bad)})
        refused(bake("fuse", base, "-l", lora, "-o", out), f"{Q}.weight", "an adapter holds NaN")

    @pytest.mark.parametrize("bad", [NAN, INFINITY, -INFINITY])
    def test_alpha(self, bad: float, tmp_path: Path, out: Path) -> None:
        base = write_base(tmp_path / "in" / "base.safetensors")
        lora = write_lora(tmp_path / "in" / "bad.safetensors", alpha=np.array(bad))
        for command in (("plan", base), ("fuse", base, "-o", out)):
            refused(bake(*command, "-l", lora), "alpha")

    def test_ranks_and_alphas_of_zero_change_nothing_and_say_so(self, tmp_path: Path, out: Path) -> None:
        base = write_base(tmp_path / "in" / "base.safetensors")
        none = {"lora_A.weight": np.zeros((0, 8)), "lora_B.weight": np.zeros((8, 0))}
        for changed, says in ((none, "the rank is 0 in 1 of 1 modules"), ({"alpha": np.zeros(())}, "alpha is 0 in 1")):
            lora = write_lora(tmp_path / "in" / "zero.safetensors", **changed)
            done = bake("fuse", base, "-l", lora, "-o", out, "--overwrite")
            assert done.code == 0, done.err
            assert says in done.out
            assert as_bytes(q_of(out)).equal(as_bytes(q_of(base)))

    def test_a_rotation_that_floating_point_cannot_compute(self, tmp_path: Path, out: Path) -> None:
        base = write_base(tmp_path / "in" / "base.safetensors", "F32")
        # of rank 2: the other directions are in I alone, which is lost beside such numbers
        blocks = (1e30 * random(3, 2, 4, 1) * random(4, 2, 1, 4)).astype(np.float32)
        lora = save(tmp_path / "in" / "oft.safetensors", {f"diffusion_model.{Q}.oft_blocks": blocks})
        refused(bake("fuse", base, "-l", lora, "-o", out), f"{Q}.weight", "I - Q is singular")

    def test_embeddings(self, tmp_path: Path, out: Path) -> None:
        base = write_base(tmp_path / "in" / "base.safetensors")
        words = {"bundle_emb.flower.string_to_param.*": with_nan(2, 8)}
        lora = save(tmp_path / "in" / "words.safetensors", arrays_of(write_lora(tmp_path / "x.safetensors")) | words)
        refused(bake("fuse", base, "-l", lora, "-o", out), "the embedding holds NaN")
        assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "x.safetensors"]


class TestWeights:
    @pytest.mark.parametrize("weight", [NAN, INFINITY, -INFINITY])
    def test_a_weight_that_is_no_number(self, weight: float, tmp_path: Path, lora: Path, out: Path) -> None:
        base = write_base(tmp_path / "in" / "base.safetensors")
        for words in (f"{lora}:{weight}", f"{lora}:te={weight}", f"{lora}:1:unet={weight}"):
            done = bake("fuse", base, "-l", words, "-o", out)
            assert done.code == 2
            assert "finite" in done.err
        with pytest.raises(UsageError, match="finite"):
            library.fuse(base, [(lora, weight)], out)

    @pytest.mark.parametrize("dtype", ["F16", "BF16", "F32", "F64"])
    def test_a_weight_without_measure(self, dtype: str, tmp_path: Path, out: Path) -> None:
        base = write_base(tmp_path / "in" / "base.safetensors", dtype)
        lora = write_lora(tmp_path / "in" / "style.safetensors", spread=1e10)
        refused(bake("fuse", base, "-l", f"{lora}:1e300", "-o", out), f"{Q}.weight")


class TestOverflow:
    @pytest.mark.parametrize(("dtype", "largest"), [("F16", 65504.0), ("BF16", 3.3e38), ("F32", 3.3e38)])
    def test_of_the_sum_is_refused_where_each_alone_would_fit(
        self, dtype: str, largest: float, tmp_path: Path, out: Path
    ) -> None:
        base = write_base(tmp_path / "in" / "base.safetensors", dtype)
        ones = {"lora_A.weight": np.ones((1, 8)), "lora_B.weight": np.full((8, 1), 0.75 * largest)}
        lora = write_lora(tmp_path / "in" / "large.safetensors", **ones)
        assert bake("fuse", base, "-l", lora, "-o", out).code == 0
        refused(bake("fuse", base, "-l", lora, "-l", lora, "-o", out, "--overwrite"), f"{dtype} ends at")

    def test_on_the_way_to_a_sum_that_fits_is_none(self, tmp_path: Path, out: Path) -> None:
        base = write_base(tmp_path / "in" / "base.safetensors")
        lora = write_lora(tmp_path / "in" / "large.safetensors", spread=300.0)
        again = write_lora(tmp_path / "in" / "again.safetensors", spread=300.0)
        assert bake("fuse", base, "-l", f"{lora}:5", "-l", f"{again}:-5", "-o", out).code == 0
        assert as_bytes(q_of(out)).equal(as_bytes(q_of(base)))

    @pytest.mark.parametrize(("dtype", "largest"), [("F8_E4M3", 448.0), ("F8_E5M2", 57344.0)])
    def test_of_fp8_is_clamped_and_counted(self, dtype: str, largest: float, tmp_path: Path, out: Path) -> None:
        base = write_base(tmp_path / "in" / "base.safetensors", dtype)
        ones = {"lora_A.weight": np.ones((1, 8)), "lora_B.weight": np.full((8, 1), 2 * largest)}
        lora = write_lora(tmp_path / "in" / "large.safetensors", **ones)
        done = bake("fuse", base, "-l", lora, "-o", out, "--json")
        assert done.code == 0
        assert done.json["clamped"] == {"model": {f"{Q}.weight": 64}}
        assert bool((q_of(out).float() == largest).all())


def test_tensors_without_elements_are_carried_through(tmp_path: Path, lora: Path, out: Path) -> None:
    tensors = {f"{Q}.weight": numbers().half(), "empty.weight": torch.empty(0, 8).half(), "flag": torch.empty(0)}
    base = save_torch(tmp_path / "in" / "base.safetensors", tensors)
    assert bake("fuse", base, "-l", lora, "-o", out, "--verify", "full").code == 0
    assert bake("fuse", base, "-l", lora, "-o", out, "--dtype", "bf16", "--overwrite", "--verify", "full").code == 0


def test_a_module_for_a_tensor_without_elements_does_not_fit_or_changes_nothing(tmp_path: Path, out: Path) -> None:
    base = save_torch(tmp_path / "in" / "base.safetensors", {f"{Q}.weight": torch.empty(0, 8), NORM: torch.ones(8)})
    lora = write_lora(tmp_path / "in" / "style.safetensors")
    assert bake("fuse", base, "-l", lora, "-o", out).code == 5
    fitting = write_lora(tmp_path / "in" / "none.safetensors", **{"lora_B.weight": np.zeros((0, 2))})
    assert bake("fuse", base, "-l", fitting, "-o", out).code in (0, 5)


def test_a_rotation_is_checked_where_it_is_made() -> None:
    from bake.adapters.rotations import cayley, skew

    exact = cayley(skew(torch.from_numpy(random(1, 3, 16, 16, spread=100.0))))
    assert float((exact @ exact.transpose(1, 2) - torch.eye(16)).abs().max()) < 1e-9
    for bad in (1e30, NAN, INFINITY):
        with pytest.raises(NonFinite, match="singular"):
            cayley(skew(torch.from_numpy(random(1, 1, 5, 5)) * bad))


LOHA = {
    f"diffusion_model.{Q}.{name}": shape
    for name, shape in {"hada_w1_a": (8, 2), "hada_w1_b": (2, 8), "hada_w2_a": (8, 2), "hada_w2_b": (2, 8)}.items()
}


def with_nan(*shape: int, bad: float = NAN) -> Any:
    values = random(9, *shape, spread=0.1).astype(np.float32)
    values.reshape(-1)[-1] = bad
    return values


def arrays_of(path: Path) -> Arrays:
    from safetensors.numpy import load_file

    return load_file(path)


def as_bytes(values: torch.Tensor) -> torch.Tensor:
    """The bits of each element."""
    kind = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[values.element_size()]
    return values.view(kind)
