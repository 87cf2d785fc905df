"""DoRA around additive updates: against its formula in NumPy, LyCORIS's forward pass and PEFT's merge."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from support import lora_delta, random
from transforms import effective, layer, matrix, randomise

from bake.adapters import dora
from bake.keys.shapes_transforms import magnitude_axis

WEIGHT, UPDATE = random(0, 6, 5, 3, 3), random(1, 6, 5, 3, 3, spread=0.3)


def flat(array):
    return torch.from_numpy(np.ascontiguousarray(array)).flatten(1)


def new_weight(weight, update, magnitude, *, axis, strength=1.0, epsilon=0.0, step=None):
    """All rows of the new weight, `step` rows at a time. weight, update: (out, in, *kernel)."""
    rows = [slice(at, at + (step or len(weight))) for at in range(0, len(weight), step or len(weight))]
    old = weight.flatten(1)
    updated = old + update.flatten(1)
    how = {"strength": strength, "epsilon": epsilon}
    norms = torch.cat([dora.row_norms(updated[some]) for some in rows])
    if axis == 1:
        norms = sum(dora.column_squares(updated[some].clone(), weight.shape[1]) for some in rows).sqrt()
    gain, rest = dora.shares(magnitude, norms, **how)
    if axis == 1:
        taps = old.shape[1] // weight.shape[1]
        gain, rest = (share.repeat_interleave(taps).expand(old.shape) for share in (gain, rest))
    new = old.clone()
    for some in rows:
        dora.blend(new[some], updated[some], gain[some], rest[some])
    return new


def expected_weight(weight, update, magnitude, *, axis, strength=1.0, epsilon=0.0):
    updated = weight + update
    norms = np.sqrt((updated**2).sum(tuple(set(range(weight.ndim)) - {axis}), keepdims=True))
    new = updated * magnitude.reshape(norms.shape) / (norms + epsilon)
    return weight + strength * (new - weight)


@pytest.mark.parametrize("strength", [1.0, 0.7, -0.5])
@pytest.mark.parametrize("epsilon", [0.0, 0.1])
@pytest.mark.parametrize(
    ("axis", "shape"), [(0, (6, 1, 1, 1)), (0, (6,)), (0, (1, 6, 1, 1)), (1, (1, 5, 1, 1)), (1, (5,))]
)
@pytest.mark.parametrize("step", [None, 1, 4])
def test_the_formula_in_float64(strength: float, epsilon: float, axis: int, shape, step: int | None) -> None:
    magnitude = np.abs(random(2, *shape)) + 0.5
    how = {"axis": axis, "strength": strength, "epsilon": epsilon}
    expected = expected_weight(WEIGHT, UPDATE, magnitude, **how)
    weight, update = torch.from_numpy(WEIGHT), torch.from_numpy(UPDATE)
    found = new_weight(weight, update, torch.from_numpy(magnitude), **how, step=step)
    np.testing.assert_allclose(found, flat(expected), rtol=0, atol=1e-13)


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_nothing_changes_at_strength_zero_and_the_dtype_is_the_weights(axis: int, dtype: torch.dtype) -> None:
    weight, update = torch.from_numpy(WEIGHT).to(dtype), torch.from_numpy(UPDATE).to(dtype)
    magnitude = torch.ones(WEIGHT.shape[axis], dtype=torch.float64)
    assert torch.equal(new_weight(weight, update, magnitude, axis=axis, strength=0.0), weight.flatten(1))
    assert new_weight(weight, update, magnitude, axis=axis).dtype == dtype


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("epsilon", [0.0, dora.EPSILON])
@pytest.mark.parametrize("strength", [1.0, 0.7])
def test_where_nothing_is_left_to_give_a_length_the_weight_stays(axis: int, epsilon: float, strength: float) -> None:
    weight, update = torch.from_numpy(WEIGHT), torch.from_numpy(UPDATE.copy())
    update.select(axis, 2).copy_(-weight.select(axis, 2))
    magnitude = torch.ones(WEIGHT.shape[axis], dtype=torch.float64)
    found = new_weight(weight, update, magnitude, axis=axis, epsilon=epsilon, strength=strength).reshape(weight.shape)
    assert found.isfinite().all()
    assert torch.equal(found.select(axis, 2), weight.select(axis, 2))
    assert not torch.equal(found.select(axis, 1), weight.select(axis, 1))


def lycoris_update(algorithm, state, shape):
    """The update by the definition, in NumPy, from the factors that LyCORIS saves."""
    factors = {name.removesuffix(".weight"): value.double().numpy() for name, value in state.items()}
    if algorithm == "locon":
        return lora_delta(factors["lora_up"], factors["lora_down"]).reshape(shape)
    if algorithm == "loha":
        halves = [factors[f"hada_w{i}_a"] @ factors[f"hada_w{i}_b"] for i in (1, 2)]
        return (halves[0] * halves[1]).reshape(shape)
    second = factors["lokr_w2_a"] @ factors["lokr_w2_b"].reshape(len(factors["lokr_w2_b"]), -1)
    return np.kron(factors["lokr_w1"], second).reshape(shape)


@pytest.mark.parametrize("kind", ["linear", "conv 1x1", "conv 3x3"])
@pytest.mark.parametrize("on_out", [False, True])
@pytest.mark.parametrize(
    ("algorithm", "name"), [("locon", "LoConModule"), ("loha", "LohaModule"), ("lokr", "LokrModule")]
)
def test_lycoris_forward_agrees_at_weight_one(kind: str, on_out: bool, algorithm: str, name: str) -> None:
    """At other weights LyCORIS forward gives V (1 + s (g / n - 1)), which is V and not W at 0; bake interpolates."""
    module = pytest.importorskip(f"lycoris.modules.{algorithm}", reason="the LyCORIS oracle is not installed")
    base = layer(kind, 8, 12)
    weight, bias = base.weight.detach().clone(), base.bias.detach().clone()
    trained = getattr(module, name)(
        "x", base, multiplier=1.0, lora_dim=2, alpha=3.0, weight_decompose=True, wd_on_out=on_out, factor=2
    )
    randomise(trained)
    state = {key: value.detach().clone() for key, value in trained.custom_state_dict().items()}
    trained.apply_to()
    found, found_bias = effective(base)
    update = 3.0 / 2 * torch.from_numpy(lycoris_update(algorithm, state, tuple(weight.shape)))
    axis = magnitude_axis("dora_scale", tuple(state["dora_scale"].shape), tuple(weight.shape)).axis
    assert axis == (0 if on_out else 1)
    expected = new_weight(weight.double(), update, state["dora_scale"].double(), axis=axis, epsilon=dora.EPSILON)
    torch.testing.assert_close(matrix(found), expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(found_bias, bias)


@pytest.mark.filterwarnings("ignore")
def test_peft_merge_agrees_on_every_kind_of_layer() -> None:
    """Embeddings and Conv1D are stored (in, out): their output axis is the second one."""
    peft = pytest.importorskip("peft", reason="the PEFT oracle is not installed")
    transformers = pytest.importorskip("transformers", reason="the transformers oracle is not installed")
    torch.manual_seed(0)
    net = torch.nn.ModuleDict(
        {kind.replace(" ", "_"): layer(kind, 8, 12, torch.float64) for kind in ("linear", "conv 1x1", "conv 3x3")}
    )
    net["embedding"] = torch.nn.Embedding(9, 8, dtype=torch.float64)
    net["conv1d"] = transformers.pytorch_utils.Conv1D(12, 8).double()
    weights = {name: part.weight.detach().clone() for name, part in net.items()}
    config = peft.LoraConfig(r=2, lora_alpha=3, use_dora=True, init_lora_weights=False, target_modules=[*net])
    wrapped = peft.get_peft_model(net, config)
    for module in wrapped.modules():
        if type(module).__name__.startswith("Dora"):  # away from the norms that it starts with
            randomise(module)
    state = {
        key.removeprefix("base_model.model."): value.detach().double()
        for key, value in peft.get_peft_model_state_dict(wrapped).items()
    }
    merged = wrapped.merge_and_unload()
    for name, weight in weights.items():
        kind = "lora_embedding_{}" if name == "embedding" else "lora_{}.weight"
        up, down = (state[f"{name}.{kind.format(letter)}"] for letter in "BA")
        update, transposed = 1.5 * up.flatten(1) @ down.flatten(1), name in ("embedding", "conv1d")
        update = (update.T if transposed else update).reshape(weight.shape)
        suffix = "lora_magnitude_vector"
        magnitude = state[f"{name}.{suffix}"]
        axis = magnitude_axis(suffix, tuple(magnitude.shape), tuple(weight.shape), transposed=transposed).axis
        assert axis == (1 if transposed else 0)
        expected = new_weight(weight, update, magnitude, axis=axis)
        torch.testing.assert_close(matrix(merged[name].weight), expected, rtol=0, atol=1e-5)
