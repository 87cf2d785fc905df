"""Combining and resizing: what is printed is what the files say."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from models import SD1_MODULES, kohya_lora, save_base, sd1_pair
from names import small
from numpy.typing import NDArray
from support import Arrays, bake, load, lora_delta, metadata, random, raw, save

from bake import combine, fuse, resize
from bake.errors import FamilyMismatch, NonFinite, ShapeMismatch, Unsupported, UsageError


def updates(path: Path) -> dict[str, NDArray[np.float64]]:
    """module -> its update in float64, of a file in kohya's names."""
    arrays = load(path)
    found = {}
    for name in arrays:
        if name.endswith(".lora_up.weight"):
            module = name.removesuffix(".lora_up.weight")
            down = arrays[f"{module}.lora_down.weight"]
            alpha = float(arrays.get(f"{module}.alpha", np.array(down.shape[0])))
            found[module] = alpha / down.shape[0] * lora_delta(arrays[name], down)
    return found


def lora(folder: Path, name: str, seed: int, rank: int = 2, alpha: float | None = 1.0) -> Path:
    return save(folder / f"{name}.safetensors", kohya_lora(small("sd1"), rank=rank, alpha=alpha, seed=seed)[0])


def relative(found: dict[str, NDArray[np.float64]], exact: dict[str, NDArray[np.float64]]) -> float:
    lost = sum(float(((found[name] - exact[name]) ** 2).sum()) for name in exact)
    return float(np.sqrt(lost / sum(float((each**2).sum()) for each in exact.values())))


@pytest.mark.parametrize("weights", [(1.0, 1.0), (0.5, -2.0), (1.0, 4.0)])
@pytest.mark.parametrize("names", ["kohya", "diffusers"])
def test_side_by_side_is_fusing_both_to_the_last_bit(weights: tuple[float, float], names: str, tmp_path: Path) -> None:
    """Weights that are powers of two are exact in any dtype."""
    base = save_base(tmp_path / "base.safetensors")
    one, two = lora(tmp_path, "one", 1), lora(tmp_path, "two", 900, rank=3, alpha=3.0)
    # Without alpha the factors themselves are halved, and the smallest half floats have no half.
    dtype = "keep" if names == "kohya" else "fp32"
    done = combine(list(zip((one, two), weights, strict=True)), tmp_path / "both.safetensors", names=names, dtype=dtype)
    assert done.error == 0
    assert done.ranks == (5,)
    fuse(base, list(zip((one, two), weights, strict=True)), tmp_path / "a.safetensors")
    fuse(base, [done.output], tmp_path / "b.safetensors")
    assert raw(tmp_path / "a.safetensors") == raw(tmp_path / "b.safetensors")


def test_other_weights_are_exact_where_they_are_common_and_rounded_once_elsewhere(tmp_path: Path) -> None:
    one, two = lora(tmp_path, "one", 1), lora(tmp_path, "two", 900)
    assert combine([(one, 0.3), (two, 0.3)], tmp_path / "same.safetensors").error < 1e-7
    done = combine([(one, 0.3), (two, 0.7)], tmp_path / "both.safetensors")
    exact = {name: 0.3 * first + 0.7 * updates(two)[name] for name, first in updates(one).items()}
    assert done.error == pytest.approx(relative(updates(done.output), exact), rel=1e-6)
    assert 0 < done.error < 1e-3


def test_a_module_of_one_adapter_alone_is_kept(tmp_path: Path) -> None:
    first, *rest = SD1_MODULES
    whole = lora(tmp_path, "whole", 1)
    part = save(
        tmp_path / "part.safetensors", {name: each for name, each in load(whole).items() if name.startswith(first)}
    )
    done = combine([whole, part], tmp_path / "both.safetensors")
    found = updates(done.output)
    np.testing.assert_allclose(found[first], 2 * updates(whole)[first])
    np.testing.assert_array_equal(found[rest[0]], updates(whole)[rest[0]])


@pytest.mark.parametrize("method", ["svd", "linear"])
def test_the_best_of_a_rank(method: str, tmp_path: Path) -> None:
    one, two = lora(tmp_path, "one", 1), lora(tmp_path, "two", 900)
    weights = (0.8, -0.4)
    done = combine(
        list(zip((one, two), weights, strict=True)), tmp_path / "b.safetensors", method=method, rank=3, dtype="fp32"
    )
    first, second = updates(one), updates(two)
    exact = {name: weights[0] * first[name] + weights[1] * second[name] for name in first}
    for name, found in updates(done.output).items():
        values = exact[name].reshape(len(exact[name]), -1)
        left, sizes, right = np.linalg.svd(values, full_matrices=False)
        np.testing.assert_allclose(found.reshape(values.shape), (left[:, :3] * sizes[:3]) @ right[:3], atol=2e-6)
    assert done.error == pytest.approx(relative(updates(done.output), exact), rel=1e-6)


@pytest.mark.parametrize("method", ["ties", "magnitude_prune", "dare_linear", "dare_ties"])
def test_the_methods_that_thin_out(method: str, tmp_path: Path) -> None:
    from bake.factoring.sums import combined  # held against PEFT in tests/factoring

    one, two = lora(tmp_path, "one", 1), lora(tmp_path, "two", 900)
    how = {"method": method, "density": 0.5, "rank": 100, "dtype": "fp32", "seed": 3}
    done = combine([(one, 1.0), (two, 0.5)], tmp_path / "b.safetensors", **how)  # type: ignore[arg-type]
    import torch

    first, second = updates(one), updates(two)
    for name, found in updates(done.output).items():
        pair = [torch.from_numpy(each[name]).float().flatten(1) for each in (first, second)]
        expected = combined(method, pair, [1.0, 0.5], 0.5, 3, [f"{place}\0{name}" for place in range(2)])
        np.testing.assert_allclose(found.reshape(expected.shape), expected.numpy(), atol=1e-5)
    assert done.error < 1e-5
    again = combine([(one, 1.0), (two, 0.5)], tmp_path / "c.safetensors", **how)  # type: ignore[arg-type]
    assert raw(again.output) == raw(done.output)


def test_peft_combines_whole_updates_alike(tmp_path: Path) -> None:
    """add_weighted_adapter of PEFT, in the forms that work on updates, gives the same weights."""
    peft = pytest.importorskip("peft")
    import torch

    torch.manual_seed(1)
    model = torch.nn.Sequential(torch.nn.Linear(12, 10, bias=False))
    config = {"r": 3, "lora_alpha": 6, "target_modules": ["0"], "init_lora_weights": False}
    wrapped = peft.get_peft_model(model, peft.LoraConfig(**config), adapter_name="one")
    wrapped.add_adapter("two", peft.LoraConfig(**config))
    for name in ("one", "two"):
        wrapped.save_pretrained(tmp_path, selected_adapters=[name])
    for method, peft_method in (("svd", "svd"), ("ties", "ties_svd"), ("magnitude_prune", "magnitude_prune_svd")):
        density = None if method == "svd" else 0.5
        how = {} if density is None else {"density": density}
        wrapped.add_weighted_adapter(
            ["one", "two"], [0.7, 0.4], method, combination_type=peft_method, svd_rank=8, **how
        )
        layer = wrapped.base_model.model[0]
        expected = layer.get_delta_weight(method).detach().numpy()
        base = save(tmp_path / "base.safetensors", {"0.weight": np.zeros((10, 12), np.float32)})
        done = combine(
            [(tmp_path / "one", 0.7), (tmp_path / "two", 0.4)],
            *(tmp_path / f"out-{method}",),
            **{"method": method, "density": density, "rank": 8, "dtype": "fp32", "names": "peft"},  # type: ignore[arg-type]
        )
        fuse(base, [done.output], tmp_path / "f.safetensors", overwrite=True)
        np.testing.assert_allclose(load(tmp_path / "f.safetensors")["0.weight"], expected, atol=2e-5)


def test_the_rank_is_that_of_the_largest_unless_named_and_factors_are_cut_where_asked(tmp_path: Path) -> None:
    one, two = lora(tmp_path, "one", 1), lora(tmp_path, "two", 900, rank=3)
    for method, density in (("svd", None), ("ties", 0.5)):
        plain = combine([one, two], tmp_path / f"{method}.safetensors", method=method, density=density)
        assert plain.ranks == (3,)
        cut = combine(
            *([one, two], tmp_path / f"{method}-cut.safetensors"),
            **{"method": method, "density": density, "clamp_quantile": 0.8},  # type: ignore[arg-type]
        )
        assert cut.error > plain.error


def test_what_there_is_no_sum_of_is_refused(tmp_path: Path) -> None:
    one, out = load(lora(tmp_path, "one", 1)), tmp_path / "o.safetensors"
    module = "lora_unet_down_blocks_0_resnets_0_conv1"
    up, down = one[f"{module}.lora_up.weight"], one[f"{module}.lora_down.weight"]
    rest = {name: values for name, values in one.items() if not name.startswith(module)}
    whole = {f"{module}.diff": np.ones((len(up), *down.shape[1:]))}
    dora = one | {f"{module}.dora_scale": np.ones((len(up), 1, 1, 1))}
    files = [save(tmp_path / f"{n}.safetensors", each) for n, each in enumerate((one, rest | whole, dora))]
    with pytest.raises(Unsupported, match="only LoRAs with LoRAs"):
        combine(files[:2], out)
    with pytest.raises(Unsupported, match="there is no sum of them"):
        combine([files[0], files[2]], out)
    norms = [
        save(tmp_path / f"norm{size}.safetensors", one | {"lora_unet_conv_norm_out.w_norm": np.ones(size)})
        for size in (4, 5)
    ]
    with pytest.raises(ShapeMismatch, match="of several shapes"):
        combine(norms, out)
    assert not out.exists()


def test_stored_differences_are_added(tmp_path: Path) -> None:
    name = "lora_unet_conv_norm_out"
    files = [
        save(
            tmp_path / f"{place}.safetensors",
            load(lora(tmp_path, "l", 1)) | {f"{name}.{end}": random(place, 4) for end in ("w_norm", "b_norm")},
        )
        for place in range(2)
    ]
    done = combine([(files[0], 2.0), (files[1], -1.0)], tmp_path / "o.safetensors", dtype="fp32")
    found = load(done.output)
    for end in ("w_norm", "b_norm"):
        np.testing.assert_allclose(found[f"{name}.{end}"], 2 * random(0, 4) - random(1, 4), atol=1e-6)


def test_resizing_is_the_best_of_its_rank_and_keeps_the_scale(tmp_path: Path) -> None:
    old = lora(tmp_path, "old", 1, rank=4, alpha=2.0)
    done = resize(old, tmp_path / "new.safetensors", rank=2, dtype="fp32")
    exact = updates(old)
    for name, found in updates(done.output).items():
        values = exact[name].reshape(len(exact[name]), -1)
        left, sizes, right = np.linalg.svd(values, full_matrices=False)
        np.testing.assert_allclose(found.reshape(values.shape), (left[:, :2] * sizes[:2]) @ right[:2], atol=1e-6)
        assert float(load(done.output)[f"{name}.alpha"]) == 1.0
    assert done.error == pytest.approx(relative(updates(done.output), exact), rel=1e-6)
    assert metadata(done.output)["ss_network_dim"] == "2"


def test_resizing_to_its_own_rank_changes_nothing(tmp_path: Path) -> None:
    old = lora(tmp_path, "old", 1, rank=4)
    done = resize(old, tmp_path / "new.safetensors", rank=16)
    assert raw(done.output) == raw(old)
    assert done.error == 0
    assert done.counts == {"kept": len(SD1_MODULES)}


def test_resizing_to_its_own_rank_still_does_what_else_is_asked(tmp_path: Path) -> None:
    old = lora(tmp_path, "old", 1, rank=4)
    done = resize(old, tmp_path / "bf16.safetensors", rank=4, dtype="bf16")
    assert {kind for name, (kind, *_) in raw(done.output).items() if "lora_" in name} == {"BF16"}
    assert 0 < done.error < 0.01
    assert resize(old, tmp_path / "cut.safetensors", rank=4, clamp_quantile=0.9).error > 0.01


def test_resizing_a_lora_that_changes_nothing_leaves_it_a_rank(tmp_path: Path) -> None:
    arrays = load(lora(tmp_path, "old", 1, rank=4))
    first, second, *_ = SD1_MODULES
    arrays[f"{first}.lora_up.weight"][:] = 0
    arrays[f"{second}.alpha"] = arrays[f"{second}.alpha"].reshape(1)
    done = resize(save(tmp_path / "zero.safetensors", arrays), tmp_path / "new.safetensors", rank=3)
    found = load(done.output)
    assert {each.module: each.rank for each in done.modules} == {
        module: 1 + 2 * (module != first) for module in SD1_MODULES
    }
    assert found[f"{first}.lora_up.weight"].shape[1] == found[f"{first}.lora_down.weight"].shape[0] == 1
    assert found[f"{second}.alpha"].shape == (1,)
    fuse(save_base(tmp_path / "base.safetensors"), [done.output], tmp_path / "out.safetensors")


def test_resizing_what_has_no_ranks_of_its_own_is_refused(tmp_path: Path) -> None:
    factors = {
        f"model.layers.0.self_attn.q_proj.lora_{end}": np.ones(shape) for end, shape in (("a", (8, 2)), ("b", (2, 8)))
    }
    save(tmp_path / "mlx" / "adapters.safetensors", factors)
    (tmp_path / "mlx" / "adapter_config.json").write_text(
        json.dumps({"fine_tune_type": "lora", "num_layers": 1, "lora_parameters": {"rank": 2, "scale": 1.0}})
    )
    with pytest.raises(Unsupported, match="bake convert --names peft"):
        resize(tmp_path / "mlx", tmp_path / "out", rank=1)


def test_resizing_leaves_parts_that_share_an_alpha_as_they_are(tmp_path: Path) -> None:
    name = "lora_unet_double_blocks_0_img_attn_qkv"
    parts: Arrays = {f"{name}.lora_up.{part}.weight": random(part, 8, 2) for part in range(3)}
    parts |= {f"{name}.lora_down.{part}.weight": random(9 + part, 2, 8) for part in range(3)}
    parts |= {f"{name}.alpha": np.ones(())}
    pair = {
        f"lora_unet_img_in.lora_{end}.weight": random(20, *shape) for end, shape in (("up", (8, 2)), ("down", (2, 4)))
    }
    old = save(tmp_path / "old.safetensors", parts | pair)
    found = resize(old, tmp_path / "new.safetensors", rank=1).output
    assert {key: raw(found)[key] for key in parts} == {key: raw(old)[key] for key in parts}
    assert load(found)["lora_unet_img_in.lora_up.weight"].shape == (8, 1)


@pytest.mark.parametrize(
    ("module", "factors", "says"),
    [
        ("model.layers.0.mlp.experts", {"lora_A.weight": (4, 8), "lora_B.weight": (12, 4)}, "stacked experts"),
        ("model.layers.0.mlp.up_proj", {"fourierft_spectrum": (4,)}, "FourierFT"),
    ],
)
def test_resizing_what_its_configuration_cannot_say_is_refused(
    tmp_path: Path, module: str, factors: dict[str, tuple[int, ...]], says: str
) -> None:
    arrays: Arrays = {f"base_model.model.{module}.{leaf}": random(1, *shape) for leaf, shape in factors.items()}
    layer = "base_model.model.model.layers.0.self_attn.q_proj"
    arrays |= {f"{layer}.lora_A.weight": random(2, 2, 8), f"{layer}.lora_B.weight": random(3, 8, 2)}
    save(tmp_path / "peft" / "adapter_model.safetensors", arrays)
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_parameters": ["mlp.experts.down_proj"]}
    (tmp_path / "peft" / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(Unsupported, match=says):
        resize(tmp_path / "peft", tmp_path / "out", rank=1)
    assert not (tmp_path / "out").exists()


def test_resizing_by_a_rule_gives_each_module_its_own_rank(tmp_path: Path) -> None:
    arrays = load(lora(tmp_path, "old", 1, rank=4))
    name = next(iter(SD1_MODULES))
    arrays[f"{name}.lora_up.weight"][:, 1:] *= 0.01  # one strong direction
    old = save(tmp_path / "uneven.safetensors", arrays)
    done = resize(old, tmp_path / "new.safetensors", keep="fro=0.99", conv_rank=3)
    ranks = {each.module: each.rank for each in done.modules}
    assert ranks[name] == 1
    assert len(done.ranks) > 1
    assert metadata(done.output)["ss_network_dim"] == "Dynamic"


def test_resizing_copies_what_is_no_lora_and_refuses_where_there_is_none(tmp_path: Path) -> None:
    arrays: Arrays = load(lora(tmp_path, "old", 1)) | {"lora_unet_conv_norm_out.w_norm": random(1, 4)}
    old = save(tmp_path / "mixed.safetensors", arrays)
    done = resize(old, tmp_path / "new.safetensors", rank=1)
    assert raw(done.output)["lora_unet_conv_norm_out.w_norm"] == raw(old)["lora_unet_conv_norm_out.w_norm"]
    assert any("copied" in note for note in done.notes)
    norms = {"lora_unet_conv_norm_out.w_norm": random(1, 4), "lora_unet_conv_norm_out.b_norm": random(2, 4)}
    with pytest.raises(Unsupported, match="no LoRA in it"):
        resize(save(tmp_path / "norms.safetensors", norms), tmp_path / "x.safetensors", rank=1)


def test_a_tucker_core_goes_into_the_down_factor(tmp_path: Path) -> None:
    module = "lora_unet_down_blocks_0_resnets_0_conv1"
    up, mid, down = random(1, 4, 3, 1, 1), random(2, 3, 3, 3, 3), random(3, 3, 4, 1, 1)
    arrays = {f"{module}.lora_{name}.weight": each for name, each in (("up", up), ("mid", mid), ("down", down))}
    old = save(tmp_path / "old.safetensors", arrays | {f"{module}.alpha": np.array(1.5)})
    done = resize(old, tmp_path / "new.safetensors", rank=2, dtype="fp32")
    exact = lora_delta(up, down, mid) / 2
    found = updates(done.output)[module]
    assert done.error == pytest.approx(np.linalg.norm(found - exact) / np.linalg.norm(exact), rel=1e-5)
    assert f"{module}.lora_mid.weight" not in raw(done.output)


def test_requests_that_are_refused(tmp_path: Path) -> None:
    one = lora(tmp_path, "one", 1)
    out = tmp_path / "o.safetensors"
    with pytest.raises(UsageError, match="at least two"):
        combine([one], out)
    for weight in (0.0, float("nan")):
        with pytest.raises(UsageError, match="weight"):
            combine([one, (one, weight)], out)
    for how in ({"method": "ties"}, {"density": 0.5}, {"method": "ties", "density": 2.0}, {"method": "x"}, {"rank": 2}):
        with pytest.raises(UsageError, match=r"--method|--density"):
            combine([one, one], out, **how)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="--rank"):
        resize(one, out)
    wide = {name: np.repeat(each, 2, 0) if "lora_up" in name else each for name, each in load(one).items()}
    with pytest.raises(ShapeMismatch, match="in the adapters"):
        combine([one, save(tmp_path / "wide.safetensors", wide)], out)
    flux = {
        f"lora_unet_double_blocks_0_img_attn_qkv.lora_{end}.weight": np.ones(shape)
        for end, shape in (("up", (24, 2)), ("down", (2, 8)))
    } | {"lora_unet_single_blocks_0_modulation_lin.lora_up.weight": np.ones((24, 2))}
    flux["lora_unet_single_blocks_0_modulation_lin.lora_down.weight"] = np.ones((2, 8))
    with pytest.raises(FamilyMismatch, match="Flux"):
        combine([one, save(tmp_path / "flux.safetensors", flux, {"ss_base_model_version": "flux1"})], out)
    bad = {name: each * np.nan if "lora_up" in name else each for name, each in load(one).items()}
    for verb in (lambda path: combine([one, path], out), lambda path: resize(path, out, rank=1)):
        with pytest.raises(NonFinite):
            verb(save(tmp_path / "bad.safetensors", bad))
    assert not out.exists()


def test_the_command_lines(tmp_path: Path) -> None:
    _, one, _ = sd1_pair(tmp_path)
    two = lora(tmp_path, "two", 900, rank=4)
    done = bake("combine", f"{one}:0.5", f"{two}:-1.5", "-o", tmp_path / "both.safetensors", "--json")
    assert done.code == 0
    assert done.json["ranks"] == [6]
    record = json.loads(metadata(tmp_path / "both.safetensors")["bake.adapter"])
    assert record["settings"]["weights"] == [0.5, -1.5]
    assert record["settings"]["error"] == done.json["error"]
    text = bake(
        "resize", tmp_path / "both.safetensors", "-o", tmp_path / "small.safetensors", "--rank", 2, "--no-recipe"
    )
    assert text.code == 0
    assert "worst" in text.out
    assert "bake.adapter" not in metadata(tmp_path / "small.safetensors")
    assert bake("combine", f"{one}:0.5:te=1", two, "-o", tmp_path / "x.safetensors").code == 2
    assert bake("resize", one, "-o", tmp_path / "x.safetensors", "--keep", "fro=2").code == 2
