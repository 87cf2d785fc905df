"""Block weights from the command line to the bytes, against factors and sums scaled by hand."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from models import SD1_MODULES, kohya_lora, llama, lora_factors, peft_lora, random_arrays, save_base, sd1_pair
from names import small
from support import KOHYA_LORA, SD1_BASE, bake, load, lora_delta, raw, rounded, save

from bake import build_plan, fuse
from bake.api import check_output, stored_recipe
from bake.plan.recipe import AdapterChoice
from bake.plan.replay import recipe_from_record
from bake.plan.selection import Selection

# The blocks of the modules of `models.SD1_MODULES`, and what MIDD says of them, written down by hand.
MIDD = dict(zip(SD1_MODULES.values(), (0.0, 0.0, 1.0, 0.0, 0.0, 1.0), strict=True))
# IN04, OUT11, M00, IN01, OUT02, BASE in a list of 26.
VALUES = [0.0] * 26
for place, value in ((5, 0.5), (25, -0.25), (13, 2.0), (2, 1.0), (16, 0.0), (0, 0.125)):
    VALUES[place] = value
BY_HAND = dict(zip(SD1_MODULES.values(), (0.5, -0.25, 2.0, 1.0, 0.0, 0.125), strict=True))
LIST = ",".join(map(str, VALUES))


@pytest.fixture
def pair(tmp_path: Path):
    return sd1_pair(tmp_path)


def run(out: Path, base: Path, *words: object):
    done = bake("fuse", base, *words, "-o", out, "--json", "--verify", "full")
    assert done.code == 0, done.err
    return done.json


def check_exact(out: Path, base: Path, deltas: dict, ratios: dict[str, float], weight: float = 1.0) -> None:
    """Every element is the float64 sum, rounded once; what has ratio 0 has the base's bytes."""
    written, stored = load(out), load(base)
    for name, delta in deltas.items():
        expected = rounded(stored[name] + weight * ratios[name] * delta, np.float16)
        np.testing.assert_array_equal(written[name], expected, err_msg=name)
    off = [name for name in stored if not ratios.get(name)]
    before, after = raw(base), raw(out)
    assert {name: after[name] for name in off} == {name: before[name] for name in off}


@pytest.mark.parametrize(("words", "ratios"), [("MIDD", MIDD), (LIST, BY_HAND)], ids=["MIDD", "26 values"])
def test_every_update_counts_times_the_value_of_its_block(pair, tmp_path: Path, words: str, ratios: dict) -> None:
    base, lora, deltas = pair
    run(tmp_path / "out.safetensors", base, "-l", f"{lora}:0.75:lbw={words}")
    check_exact(tmp_path / "out.safetensors", base, deltas, ratios, 0.75)


def test_scaling_the_factors_by_hand_gives_the_same_bytes(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base.safetensors")
    arrays, _ = kohya_lora(small("sd1"))
    lora = save(tmp_path / "style.safetensors", arrays)
    by_module = dict(zip(SD1_MODULES, BY_HAND.values(), strict=True))
    scaled = {  # powers of two: nothing is rounded here
        key: array * np.float16(by_module[key.partition(".")[0]]) if ".lora_up" in key else array
        for key, array in arrays.items()
    }
    by_hand = save(tmp_path / "by_hand.safetensors", scaled)
    run(tmp_path / "a.safetensors", base, "-l", f"{lora}:lbw={LIST}")
    run(tmp_path / "b.safetensors", base, "-l", by_hand)
    assert raw(tmp_path / "a.safetensors") == raw(tmp_path / "b.safetensors")


def test_weights_of_components_are_multiplied_too(pair, tmp_path: Path) -> None:
    base, lora, deltas = pair
    run(tmp_path / "out.safetensors", base, "-l", f"{lora}:0.5:te=2:lbw={LIST}")
    weights = {name: ratio * (4 if name.startswith("cond") else 1) for name, ratio in BY_HAND.items()}
    check_exact(tmp_path / "out.safetensors", base, deltas, weights, 0.5)


def extension(key: str, values: list[float], deep: tuple[list[str], str, float] | None) -> float:
    """The ratio of a module by sd-webui-lora-block-weight's ratiodealer, from A1111's name for it."""
    ids = ["BASE", *(f"IN{n:02d}" for n in range(12)), "M00", *(f"OUT{n:02d}" for n in range(12))]
    marks = ["encoder", *(f"input_blocks_{n}_" for n in range(12)), "middle_block_"]
    marks += [f"output_blocks_{n}_" for n in range(12)]
    ratio, block = 1.0, ""
    for value, name, mark in zip(values, ids, marks, strict=True):
        if mark in key:
            ratio, block = value, name
    if deep is not None and block in deep[0] and deep[1] in key:
        ratio = deep[2]
    return ratio


DEEP = [*(f"IN{n:02d}" for n in range(5, 12)), "M00", *(f"OUT{n:02d}" for n in range(6))]
SHORT = (0, 2, 3, 5, 6, 8, 9, 13, *range(17, 26))  # where the 17 values go among the 26


@pytest.mark.parametrize("rules", [None, ("ATTNDEEPOFF", (DEEP, "attn", 0.0)), ("PROJDEEPOFF", (DEEP, "proj", 0.0))])
@pytest.mark.parametrize("preset", ["INALL", "MIDD", "OUTS", "ALL0.5"])
def test_every_module_of_a_lora_gets_the_ratio_of_the_web_uis_extension(preset: str, rules) -> None:
    given = Selection.parse(preset).values
    values = [0.0] * 26
    for place, value in zip(SHORT, given, strict=True):
        values[place] = value
    words = f"{KOHYA_LORA}:0.5:lbw={preset}:blocks=webui" + (f":lbwe={rules[0]}" if rules else "")
    plan = bake("plan", SD1_BASE, "-l", words, "--json", "-v").json["plan"]
    everything = bake("plan", SD1_BASE, "-l", KOHYA_LORA, "--json", "-v").json["plan"]
    found = {tensor["name"]: tensor["terms"] for tensor in plan["files"][0]["tensors"]}
    touched = [tensor["name"] for tensor in everything["files"][0]["tensors"] if tensor["terms"]]
    assert len(touched) == 264
    for name in touched:
        expected = 0.5 * extension(name.replace(".", "_"), values, rules and rules[1])
        assert [term["weight"] for term in found[name]] == ([expected] if expected else []), name


def test_what_is_switched_off_is_said(pair, tmp_path: Path) -> None:
    base, lora, _ = pair
    document = run(tmp_path / "out.safetensors", base, "-l", f"{lora}:0.75:lbw=MIDD")
    assert document["skipped"] == [
        {"adapter": "style.safetensors", "component": "unet", "modules": 4, "reason": "switched off by lbw=MIDD"}
    ]
    assert document["components"] == {"unet": {"matched": 1, "total": 1}, "te1": {"matched": 1, "total": 1}}
    assert document["adapters"][0]["selection"]["preset"] == "MIDD"
    said = bake("plan", base, "-l", f"{lora}:0.75:te=1:lbw=MIDD:lbwe=M00:proj:0.5").out
    assert "at 0.75 (te 1, lbw=MIDD lbwe=M00:proj:0.5)" in said
    assert "skipped   4 modules of unet (style.safetensors): switched off by lbw=MIDD" in said


def test_a_prompt_says_the_same(pair, tmp_path: Path) -> None:
    base, lora, _ = pair
    run(tmp_path / "a.safetensors", base, "-l", f"{lora}:0.75:te=0.5:lbw=MIDD")
    run(tmp_path / "b.safetensors", base, "--prompt", "<lora:style:0.5:0.75:lbw=MIDD>", "--lora-dir", tmp_path)
    assert raw(tmp_path / "a.safetensors") == raw(tmp_path / "b.safetensors")


def test_the_order_of_one_adapter_in_two_selections_changes_no_byte(pair, tmp_path: Path) -> None:
    base, lora, deltas = pair
    words = ("-l", f"{lora}:0.75:lbw={LIST}", "-l", f"{lora}:0.75:lbw=MIDD", "-l", f"{lora}:0.75")
    run(tmp_path / "a.safetensors", base, *words)
    run(tmp_path / "b.safetensors", base, *(words[place] for place in (4, 5, 2, 3, 0, 1)))
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()
    check_exact(tmp_path / "a.safetensors", base, deltas, {name: 1 + MIDD[name] + BY_HAND[name] for name in MIDD}, 0.75)


@pytest.mark.parametrize(
    "words",
    ["lbw=MIDD", f"lbw={LIST}:blocks=webui", "names=*attn1*=0.5,*proj_in*=0", "lbwe=NOT BASE:attn:0", "gradient=0,1"],
)
def test_a_recipe_remembers_the_selection(pair, tmp_path: Path, words: str) -> None:
    base, lora, _ = pair
    out = tmp_path / "out" / "x.safetensors"
    out.parent.mkdir()
    document = run(out, base, "-l", f"{lora}:0.75:{words}")
    recipe = recipe_from_record(stored_recipe(out), [tmp_path], str(out))
    assert recipe.adapters[0].selection is not None
    assert recipe.adapters[0].selection.to_json() == document["adapters"][0]["selection"]
    assert check_output(out, search=[tmp_path], full=True).ok
    replayed = build_plan(base, recipe.adapters)
    assert replayed.to_json() == bake("plan", base, "-l", f"{lora}:0.75:{words}", "--json", "-v").json["plan"]
    assert type(replayed).from_json(json.loads(json.dumps(replayed.to_json()))) == replayed


def test_a_damaged_selection_in_a_recipe_is_an_input_error(pair, tmp_path: Path) -> None:
    base, lora, _ = pair
    out = tmp_path / "out.safetensors"
    fuse(base, [AdapterChoice(lora, selection=Selection.parse("MIDD"))], out)
    content = out.read_bytes()
    out.write_bytes(content.replace(b'\\"preset\\"', b'\\"presex\\"', 1))
    assert out.read_bytes() != content
    done = bake("verify", out, "--search", tmp_path)
    assert done.code == 3
    assert "its recipe is malformed" in done.err


@pytest.mark.parametrize("words", ["lbw=NONE", "lbwe=::0,IN02::1"])
def test_an_adapter_that_is_switched_off_everywhere_is_refused_alone(pair, tmp_path: Path, words: str) -> None:
    base, lora, deltas = pair
    done = bake("plan", base, "-l", f"{lora}:{words}")
    assert done.code == 4
    assert "Every adapter module is left out" in done.err
    assert f"5 of unet (style.safetensors) left out: switched off by {words[:4]}" in done.err
    run(tmp_path / "out.safetensors", base, "-l", f"{lora}:{words}", "-l", f"{lora}:0.5")
    check_exact(tmp_path / "out.safetensors", base, deltas, dict.fromkeys(deltas, 0.5))


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        ("lbw=1,0,1", 2, "3 block values"),
        ("lbw=FLUXALL", 2, "61 block values (FLUXALL)"),
        ("lbw=MIDDLE", 2, "no preset"),
        ("lbwe=IN12::1", 2, "no block 'IN12'"),
        ("names=*nose*=1", 2, "pattern '*nose*'"),
        ("gradient=nose=1", 2, "gradient 'nose=1'"),
        ("lbw=R,1", 6, "drawn by chance"),
        ("start=5", 6, "during sampling"),
    ],
)
def test_a_selection_that_cannot_be_meant_is_one_clear_error(
    pair, tmp_path: Path, words: str, code: int, says: str
) -> None:
    base, lora, _ = pair
    done = bake("fuse", base, "-l", f"{lora}:0.5:{words}", "-o", tmp_path / "out.safetensors")
    assert (done.code, says in done.err, done.out) == (code, True, "")
    assert not (tmp_path / "out.safetensors").exists()


def test_layers_of_a_language_model_fade_in(tmp_path: Path) -> None:
    shapes = llama(3)
    names = [f"model.layers.{layer}.mlp.up_proj.weight" for layer in range(3)]
    base = save(tmp_path / "base.safetensors", random_arrays(shapes))
    adapter = save(tmp_path / "adapter" / "adapter_model.safetensors", peft_lora(shapes, names)).parent
    (adapter / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 2}))
    document = run(tmp_path / "out.safetensors", base, "-l", f"{adapter}:gradient=0,1")
    factors = [lora_factors(shapes[name], 2, 100 * place, np.float32) for place, name in enumerate(names)]
    deltas = {name: lora_delta(up, down) for name, (up, down) in zip(names, factors, strict=True)}
    check_exact(tmp_path / "out.safetensors", base, deltas, dict(zip(names, (0, 0.5, 1), strict=True)))
    assert document["skipped"][0]["reason"] == "switched off by gradient=0,1"


def test_one_module_may_be_switched_off_in_part(tmp_path: Path) -> None:
    """A fused projection of the adapter that the base stores in three tensors."""
    shapes = {
        name: shape for name, shape in llama(1).items() if "self_attn.v" not in name and "self_attn.k" not in name
    }
    shapes |= {f"model.layers.0.self_attn.{name}_proj.weight": (8, 8) for name in "kv"}
    base = save(tmp_path / "base.safetensors", random_arrays(shapes))
    fused = "model.layers.0.self_attn.qkv_proj.weight"
    arrays = peft_lora({fused: (24, 8)}, [fused])
    adapter = save(tmp_path / "adapter" / "adapter_model.safetensors", arrays).parent
    (adapter / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 2}))
    document = run(tmp_path / "out.safetensors", base, "-l", f"{adapter}:names=*k_proj*=0,*v_proj*=0.5")
    delta = lora_delta(*lora_factors((24, 8), 2, 0, np.float32))
    parts = {f"model.layers.0.self_attn.{name}_proj.weight": delta[8 * i : 8 * i + 8] for i, name in enumerate("qkv")}
    check_exact(tmp_path / "out.safetensors", base, parts, dict(zip(parts, (1, 0, 0.5), strict=True)))
    assert any("1 modules are switched off in part by names=" in note for note in document["notes"])
