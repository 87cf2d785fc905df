"""Merges from end to end: every class of method against its definition, layouts, parts of models, determinism."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
from pathlib import Path

import numpy as np
import pytest
from folders import UNET, components, save_folder
from merge_formulas import FORMULAS
from merging import GIVEN
from models import llama, random_arrays
from names import small
from support import Arrays, bake, load, metadata, random, raw, rounded, save, ulps

from bake import Selection, build_merge_plan, check_output, merge
from bake.errors import NonFinite, VerificationFailed
from bake.plan.model import Plan

LAYER = "model.layers.1.mlp.up_proj.weight"
TE = "cond_stage_model.transformer.text_model.encoder.layers.0.mlp.fc1.weight"


def tuned(arrays: Arrays, seed: int, spread: float = 0.01) -> Arrays:
    """The same model after some training."""
    return {
        name: array
        if array.dtype.kind != "f"
        else (array + random(seed + place, *array.shape, spread=spread)).astype(array.dtype)
        for place, (name, array) in enumerate(arrays.items())
    }


def save_models(folder: Path, arrays: Arrays, count: int) -> list[Path]:
    return [save(folder / f"m{n}.safetensors", tuned(arrays, 1000 * n), {"format": "pt"}) for n in range(count)]


@pytest.fixture
def language(tmp_path: Path) -> list[Path]:
    return save_models(tmp_path, random_arrays(llama()), 5)


@pytest.fixture(scope="module")
def sd1(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return save_models(tmp_path_factory.mktemp("sd1"), random_arrays(small("sd1")), 2)


def sha(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


# One of each reach, and what they need.
CLASSES = [
    ("weighted_sum", 2, False),
    ("linear", 3, False),
    ("add_difference", 3, False),
    ("extract_features", 3, False),
    ("slerp", 2, False),
    ("model_stock", 4, True),
    ("crossover", 2, False),
    ("sce", 3, True),
]


@pytest.mark.parametrize(("name", "count", "has_base"), CLASSES)
def test_every_element_is_the_definition_rounded_once(
    language, tmp_path: Path, name: str, count: int, has_base: bool
) -> None:
    given = GIVEN.get(name, {})
    base, models = (language[0], language[1 : count + 1]) if has_base else (None, language[:count])
    if name in ("linear", "model_stock"):
        models = sorted(models)  # the definition weighs them in this order
    result = merge(name, models, tmp_path / "out.safetensors", base=base, parameters=given, verify="full")
    assert result.report is not None
    assert result.report.equal_share == 1
    stored = [load(path) for path in ([base] if base else []) + models]
    written = load(tmp_path / "out.safetensors")
    for tensor, found in written.items():
        arrays = [model[tensor] for model in stored]
        with np.errstate(all="ignore"):
            exact = FORMULAS[name](arrays, **given)
        # formulas written in another way differ in the last bits of float64, and halves tie often
        assert ulps(found, exact, exact) < 0.5 + 1e-9, tensor


def test_similarities_of_all_tensors_together_make_the_limits(sd1, tmp_path: Path) -> None:
    one = merge("cosine_b", sd1, tmp_path / "one.safetensors", parameters={"alpha": 0.2}, verify="full")
    assert one.report is not None
    assert one.report.ok
    merge("cosine_b", sd1, tmp_path / "part.safetensors", parameters={"alpha": 0.2}, only=["te"])
    both = load(tmp_path / "one.safetensors"), load(tmp_path / "part.safetensors")
    assert not np.array_equal(both[0][TE], both[1][TE])


def test_bf16_and_fp32_are_rounded_once_too(language, tmp_path: Path) -> None:
    a, b = load(language[0]), load(language[1])
    for dtype in ("bf16", "fp32"):
        out = tmp_path / f"{dtype}.safetensors"
        merge("weighted_sum", language[:2], out, parameters={"alpha": 0.3}, dtype=dtype, verify="full")
        exact = a[LAYER] + (b[LAYER] - a[LAYER]) * 0.3
        if dtype == "fp32":
            np.testing.assert_array_equal(load(out)[LAYER], exact.astype(np.float32).astype(np.float64))
        else:  # half of the distance to the neighbour at most
            step = 2.0 ** (np.floor(np.log2(np.abs(exact))) - 7)
            assert (np.abs(load(out)[LAYER] - exact) <= step / 2).all()


@pytest.mark.parametrize(
    ("name", "parameters", "place"),
    [
        ("weighted_sum", {"alpha": 0.0}, 0),
        ("weighted_sum", {"alpha": 1.0}, 1),
        ("linear", {"weight": [0.0, 3.0]}, 1),
        ("passthrough", {}, 0),
    ],
)
def test_a_model_that_counts_alone_is_copied_byte_for_byte(
    language, tmp_path: Path, name: str, parameters, place: int
) -> None:
    count = 1 if name == "passthrough" else 2
    result = merge(name, language[:count], tmp_path / "out.safetensors", parameters=parameters)
    assert raw(tmp_path / "out.safetensors") == raw(language[place])
    assert not any(tensor.is_computed for _, tensor in result.plan.tensors())


@pytest.mark.parametrize(
    ("name", "parameters", "has_base"),
    [
        ("weighted_sum", {"alpha": 0.3}, False),
        ("slerp", {"alpha": 0.3}, False),
        ("dare_ties", {"density": 0.5}, True),
        ("della", {"density": 0.5}, True),
        ("cosine_a", {"alpha": 0.3}, False),
        ("crossover", {"alpha": 0.3}, False),
    ],
)
def test_bytes_do_not_depend_on_memory_threads_or_the_process(
    language, tmp_path: Path, name: str, parameters, has_base: bool
) -> None:
    what = {"base": language[0] if has_base else None, "parameters": parameters, "verify": "none"}
    shas = set()
    for number, (memory, threads) in enumerate([(1 << 29, 2), (1 << 21, 1), (1 << 24, 3)]):
        out = tmp_path / f"{number}.safetensors"
        merge(name, language[1:3], out, memory=memory, threads=threads, **what)
        shas.add(sha(out))
    words = [each for key, value in parameters.items() for each in ("-p", f"{key}={value}")]
    base = ("--base", language[0]) if has_base else ()
    done = bake("merge", name, *language[1:3], *base, *words, "-o", tmp_path / "again.safetensors", "--json")
    assert done.code == 0, done.err
    assert {sha(tmp_path / "again.safetensors")} == shas


@pytest.mark.parametrize("name", ["weighted_sum", "slerp", "crossover"])
def test_large_tensors_are_made_in_parts_with_the_same_bytes(
    sd1, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    shas = set()
    for number, elements in enumerate((1 << 24, 100)):
        for limit in ("_PART_ELEMENTS", "_CHUNK_ELEMENTS", "_SMALLEST_CHUNK"):
            monkeypatch.setattr(f"bake.execute.merging.pipeline.{limit}", elements)
        out = tmp_path / f"{number}.safetensors"
        merge(name, sd1, out, dtype="fp32", parameters={"alpha": 0.3}, threads=2, only=["unet"], memory=1 << 30)
        shas.add(sha(out))
    assert len(shas) == 1


def test_elements_beyond_fp8_are_counted_over_all_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bake.execute.merging.pipeline._PART_ELEMENTS", 64)
    monkeypatch.setattr("bake.execute.merging.pipeline._CHUNK_ELEMENTS", 16)
    monkeypatch.setattr("bake.execute.merging.pipeline._SMALLEST_CHUNK", 16)
    arrays = random_arrays(llama()) | {LAYER: np.full((20, 8), 1000, np.float16)}
    models = [save(tmp_path / f"{n}.safetensors", arrays) for n in range(2)]
    result = merge("weighted_sum", models, tmp_path / "out.safetensors", dtype="fp8_e4m3fn", threads=2)
    assert result.clamped == {"model": {LAYER: 160}}


def test_chance_goes_by_the_seed(language, tmp_path: Path) -> None:
    shas = []
    for number, seed in enumerate((0, 0, 1)):
        out = tmp_path / f"{number}.safetensors"
        merge("dare_linear", language[1:3], out, base=language[0], parameters={"density": 0.5}, seed=seed, record=False)
        shas.append(sha(out))
    assert shas[0] == shas[1] != shas[2]


@pytest.mark.parametrize("name", ["linear", "karcher", "dare_ties"])
def test_the_order_of_typing_changes_no_byte_of_a_symmetric_method(language, tmp_path: Path, name: str) -> None:
    base = language[0] if name == "dare_ties" else None
    weights = dict(zip(language[1:4], (0.5, 1.5, -0.25), strict=True))
    shas = set()
    for number, models in enumerate(itertools.permutations(language[1:4])):
        parameters = {} if name == "karcher" else {"weight": [weights[model] for model in models]}
        if base is not None:
            parameters["density"] = 0.6
        out = tmp_path / f"{number}.safetensors"
        merge(name, models, out, base=base, parameters=parameters, verify="none")
        shas.add(sha(out))
    assert len(shas) == 1


@pytest.mark.parametrize("name", ["linear", "task_arithmetic"])
def test_copies_of_one_model_are_told_apart_by_what_is_asked_for_them(language, tmp_path: Path, name: str) -> None:
    copies = [save(tmp_path / folder / "m.safetensors", random_arrays(llama())) for folder in ("one", "two")]
    base = language[1] if name == "task_arithmetic" else None
    shas = set()
    for weights in ([0.3, 0.9], [0.9, 0.3]):
        merge(name, copies, tmp_path / "out.safetensors", base=base, parameters={"weight": weights}, overwrite=True)
        shas.add(sha(tmp_path / "out.safetensors"))
    assert len(shas) == 1


def test_block_weights_set_alpha_for_each_block(sd1, tmp_path: Path) -> None:
    # By hand: BASE, IN00 to IN11, M00, OUT00 to OUT11; supermerger counts time_embed as IN00, out as OUT11.
    values = [round(0.04 * n, 2) for n in range(26)]
    out = tmp_path / "out.safetensors"
    done = bake(
        *("merge", "weighted_sum", *sd1, "-o", out, "--verify", "full", "--json"),
        *("-p", f"alpha:lbw={','.join(map(str, values))}"),
    )
    assert done.code == 0, done.err
    a, b, found = load(sd1[0]), load(sd1[1]), load(out)
    by_hand = {
        "cond_stage_model.": values[0],
        UNET + "time_embed.": values[1],
        **{f"{UNET}input_blocks.{n}.": values[1 + n] for n in range(12)},
        UNET + "middle_block.": values[13],
        **{f"{UNET}output_blocks.{n}.": values[14 + n] for n in range(12)},
        UNET + "out.": values[25],
        "first_stage_model.": 0.0,
    }
    seen = set()
    for tensor, array in found.items():
        prefix = next((prefix for prefix in by_hand if tensor.startswith(prefix)), None)
        is_merged = prefix is not None and array.size > 1 and not tensor.endswith("position_ids")
        alpha = by_hand[prefix] if is_merged else 0.0
        np.testing.assert_array_equal(
            array, rounded(a[tensor] + (b[tensor] - a[tensor]) * alpha, np.float16), err_msg=tensor
        )
        seen.add(prefix)
    assert seen >= set(by_hand)


def test_parts_of_a_model_have_numbers_of_their_own(sd1, tmp_path: Path) -> None:
    out = tmp_path / "out.safetensors"
    words = "alpha=0.5:te=0.25:vae=1:names=*middle_block*=0.75:lbwe=IN04:attn2:0"
    done = bake("merge", "weighted_sum", *sd1, "-p", words, "-o", out, "--json")
    assert done.code == 0, done.err
    a, b, found = load(sd1[0]), load(sd1[1]), load(out)
    attn = "input_blocks.4.1.transformer_blocks.0.attn2.to_k.weight"
    expected = {
        TE: 0.25,
        UNET + attn: 0.0,
        UNET + attn.replace("attn2", "attn1"): 0.5,
        UNET + "middle_block.0.in_layers.2.weight": 0.75,
        "first_stage_model.encoder.conv_in.weight": 1.0,
    }
    for tensor, alpha in expected.items():
        np.testing.assert_array_equal(found[tensor], rounded(a[tensor] + (b[tensor] - a[tensor]) * alpha, np.float16))


def test_gradients_go_through_the_layers_for_each_model_apart(tmp_path: Path) -> None:
    paths = save_models(tmp_path, random_arrays(llama(layers=3)), 2)
    weight = [Selection.parse(gradient="0,0.5,1"), 0.5]
    merge("linear", paths, tmp_path / "out.safetensors", parameters={"weight": weight, "normalize": False})
    a, b, found = load(paths[0]), load(paths[1]), load(tmp_path / "out.safetensors")
    for layer, share in enumerate((0.0, 0.5, 1.0)):
        tensor = f"model.layers.{layer}.mlp.up_proj.weight"
        np.testing.assert_array_equal(found[tensor], rounded(a[tensor] * share + b[tensor] * 0.5, np.float16))


def test_a_component_is_merged_alone(sd1, tmp_path: Path) -> None:
    merge("weighted_sum", sd1, tmp_path / "out.safetensors", parameters={"alpha": 0.5}, only=["te"])
    before, after = raw(sd1[0]), raw(tmp_path / "out.safetensors")
    changed = {name for name in before if before[name] != after[name]}
    assert changed
    assert all(name.startswith("cond_stage_model.") for name in changed)


def test_layouts_of_one_family_merge_as_if_they_were_one(tmp_path: Path) -> None:
    shapes = {name: shape for name, shape in small("sdxl").items() if not name.endswith("position_ids")}
    one, two = (tuned(random_arrays(shapes), seed) for seed in (0, 5000))
    a, b = save(tmp_path / "a.safetensors", one), save(tmp_path / "b.safetensors", two)
    parameters = {"parameters": {"alpha": 0.3}, "verify": "full"}
    merge("weighted_sum", [a, b], tmp_path / "same.safetensors", **parameters)
    folder = save_folder(tmp_path / "folder", two)
    result = merge("weighted_sum", [a, folder], tmp_path / "mixed.safetensors", **parameters)
    assert all(part.matched == part.total for part in result.plan.components.values())
    same, mixed = raw(tmp_path / "same.safetensors"), raw(tmp_path / "mixed.safetensors")
    assert mixed == same

    merge("weighted_sum", [save_folder(tmp_path / "first", one), b], tmp_path / "out", **parameters)
    expected = components(
        {name: array.astype(np.float16) for name, array in load(tmp_path / "same.safetensors").items()}
    )
    for name, tensors in expected.items():
        (path,) = (tmp_path / "out" / name).glob("*.safetensors")
        found = load(path)
        assert found.keys() == tensors.keys()
        for tensor, array in tensors.items():
            np.testing.assert_array_equal(found[tensor], array, err_msg=f"{name}/{tensor}")


def test_one_models_tensors_are_put_together_from_another_layout_bit_for_bit(tmp_path: Path) -> None:
    shapes = {name: shape for name, shape in small("sdxl").items() if not name.endswith("position_ids")}
    one, two = (tuned(random_arrays(shapes), seed) for seed in (0, 5000))
    a, folder = save(tmp_path / "a.safetensors", one), save_folder(tmp_path / "folder", two)
    merge("weighted_sum", [a, folder], tmp_path / "out.safetensors", parameters={"alpha": 1.0}, verify="full")
    found = raw(tmp_path / "out.safetensors")
    due = raw(save(tmp_path / "b.safetensors", two))
    logit = "conditioner.embedders.1.model.logit_scale"  # diffusers has none
    assert {name for name in due if found[name] != due[name] and two[name].size > 1} == set()
    assert found[logit] == raw(a)[logit]


def test_a_tied_head_that_only_one_model_stores_is_its_embedding(tmp_path: Path) -> None:
    arrays = random_arrays(llama())
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "tie_word_embeddings": True}
    folders = []
    for name, own in (("a", arrays), ("b", tuned(arrays, 7))):
        stored = dict(own, **{"lm_head.weight": own["model.embed_tokens.weight"]})
        if name == "b":
            del stored["lm_head.weight"]
        save(tmp_path / name / "model.safetensors", stored, {"format": "pt"})
        (tmp_path / name / "config.json").write_text(json.dumps(config))
        folders.append(tmp_path / name)
    for order in (folders, folders[::-1]):
        out = tmp_path / f"{order[0].name}-out"
        merge("weighted_sum", order, out, parameters={"alpha": 0.3}, verify="full")
        found = load(out / "model.safetensors")
        if "lm_head.weight" in found:
            np.testing.assert_array_equal(found["lm_head.weight"], found["model.embed_tokens.weight"])
        assert json.loads((out / "config.json").read_text()) == config


def test_inpainting_models_keep_their_further_channels(tmp_path: Path) -> None:
    shapes = small("sd1")
    first = UNET + "input_blocks.0.0.weight"
    wide = {**shapes, first: (shapes[first][0], 9, 3, 3)}
    a = save(tmp_path / "a.safetensors", random_arrays(wide))
    b, c = save_models(tmp_path, random_arrays(shapes), 2)
    result = merge("add_difference", [a, b, c], tmp_path / "out.safetensors", parameters={"alpha": 0.7}, verify="full")
    assert any(first in note for note in result.plan.notes)
    arrays = [load(path)[first] for path in (a, b, c)]
    exact = arrays[0].copy()
    exact[:, :4] += 0.7 * (arrays[1] - arrays[2])
    np.testing.assert_array_equal(load(tmp_path / "out.safetensors")[first], rounded(exact, np.float16))


@pytest.mark.parametrize("seed", range(3))
def test_further_channels_stay_whichever_model_comes_first_by_content(tmp_path: Path, seed: int) -> None:
    shapes = small("sd1")
    first = UNET + "input_blocks.0.0.weight"
    a = save(tmp_path / "a.safetensors", random_arrays({**shapes, first: (shapes[first][0], 9, 3, 3)}))
    b = save(tmp_path / "b.safetensors", tuned(random_arrays(shapes), 1000 * seed))
    merge("linear", [a, b], tmp_path / "out.safetensors", only=["unet"])
    one, two = load(a)[first], load(b)[first]
    exact = one.copy()
    exact[:, :4] = (one[:, :4] + two) / 2
    np.testing.assert_array_equal(load(tmp_path / "out.safetensors")[first], rounded(exact, np.float16))


def test_what_is_stored_the_other_way_round_is_read_in_chunks_and_looked_at(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shapes = {name: shape for name, shape in small("sdxl").items() if not name.endswith("position_ids")}
    name = "conditioner.embedders.1.model.text_projection"
    one, two = (tuned(random_arrays(shapes), seed) for seed in (0, 5000))
    a, folder = save(tmp_path / "a.safetensors", one), save_folder(tmp_path / "folder", two)
    monkeypatch.setattr("bake.execute.merging.pipeline._CHUNK_ELEMENTS", 16)
    monkeypatch.setattr("bake.execute.merging.pipeline._SMALLEST_CHUNK", 16)
    merge("weighted_sum", [a, folder], tmp_path / "out.safetensors", parameters={"alpha": 0.5}, only=["te2"])
    exact = (one[name].astype(np.float64) + two[name]) / 2
    np.testing.assert_array_equal(load(tmp_path / "out.safetensors")[name], rounded(exact, np.float16))
    two[name][-1, -1] = np.nan
    broken = save_folder(tmp_path / "broken", two)
    with pytest.raises(NonFinite, match="broken holds NaN"):
        merge("weighted_sum", [a, broken], tmp_path / "none.safetensors", only=["te2"])


def test_the_recipe_replays(sd1, tmp_path: Path) -> None:
    out = tmp_path / "out.safetensors"
    merge("weighted_sum", sd1, out, parameters={"alpha": Selection.parse("GRAD_V")}, seed=3)
    report = check_output(out, search=[sd1[0].parent], full=True)
    assert report.ok
    assert report.elements > 10_000
    merged = json.loads(metadata(out)["bake.recipe"])["merge"]
    assert merged["method"] == "weighted_sum"
    assert [model["files"][0]["sha256"] for model in merged["models"]] == [sha(path) for path in sd1]
    done = bake("verify", out, "--search", sd1[0].parent, "--json")
    assert done.code == 0, done.err


def test_recipes_of_chance_and_of_several_weights_replay(language, tmp_path: Path) -> None:
    out = tmp_path / "out.safetensors"
    parameters = {"density": 0.5, "weight": [0.7, Selection(number=0.5, components=(("model", 0.25),))]}
    merge("dare_ties", language[1:3], out, base=language[0], parameters=parameters, seed=11, rounding="stochastic")
    assert check_output(out, search=[tmp_path], full=True).ok


def test_web_uis_find_what_they_expect(sd1, tmp_path: Path) -> None:
    merge("weighted_sum", sd1, tmp_path / "one.safetensors", parameters={"alpha": 0.25})
    merge("add_difference", [tmp_path / "one.safetensors", *sd1], tmp_path / "two.safetensors")
    found = metadata(tmp_path / "two.safetensors")
    recipe, models = json.loads(found["sd_merge_recipe"]), json.loads(found["sd_merge_models"])
    assert recipe["interp_method"] == "Add difference"
    assert recipe["primary_model_hash"] == sha(tmp_path / "one.safetensors")
    assert [recipe["secondary_model_hash"], recipe["tertiary_model_hash"]] == [sha(path) for path in sd1]
    assert set(models) == {sha(tmp_path / "one.safetensors"), *map(sha, sd1)}
    assert models[sha(tmp_path / "one.safetensors")]["sd_merge_recipe"]["multiplier"] == 0.25
    assert found["modelspec.title"] == "add_difference: one + m0 + m1"


def test_without_a_recipe_nothing_tells_of_the_models(sd1, tmp_path: Path) -> None:
    merge("weighted_sum", sd1, tmp_path / "out.safetensors", record=False)
    assert not {key for key in metadata(tmp_path / "out.safetensors") if "merge" in key or "recipe" in key}


def test_a_plan_is_the_same_after_json(language) -> None:
    plan = build_merge_plan("ties", language[1:3], base=language[0], parameters={"density": 0.5, "weight": [1, 0.5]})
    again = Plan.from_json(json.loads(json.dumps(plan.to_json())))
    assert again == plan
    assert again.digest() == plan.digest()


def test_damage_is_found(language, tmp_path: Path) -> None:
    out = tmp_path / "out.safetensors"
    merge("slerp", language[:2], out)
    content = bytearray(out.read_bytes())
    length = int.from_bytes(content[:8], "little")
    begin, _ = json.loads(content[8 : 8 + length])[LAYER]["data_offsets"]
    content[8 + length + begin] ^= 1
    out.write_bytes(content)
    report = check_output(out, search=[tmp_path])
    assert not report.ok
    assert LAYER in report.findings[0]


def test_a_run_that_computes_something_else_is_not_published(
    language, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from bake.execute.merging import maths

    def wrong(plan, tensor):
        values = {**tensor.merge.values, "alpha": 0.31}
        return real(plan, dataclasses.replace(tensor, merge=dataclasses.replace(tensor.merge, values=values)))

    real = maths.merge_of
    for lane in ("plain", "pipeline"):
        monkeypatch.setattr(f"bake.execute.merging.{lane}.merge_of", wrong)
    with pytest.raises(VerificationFailed):
        merge("weighted_sum", language[:2], tmp_path / "out.safetensors", parameters={"alpha": 0.3})
    assert not (tmp_path / "out.safetensors").exists()
