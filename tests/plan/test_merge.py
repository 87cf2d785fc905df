"""What a merge is refused for, before anything is written; and what is left as it is, with a note."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from models import llama, random_arrays, save_base
from names import small
from support import Arrays, save

from bake import Selection, build_merge_plan
from bake.errors import BakeError, FamilyMismatch, Mismatch, OutputRefused, ShapeMismatch, Unsupported, UsageError
from bake.merging import merge

UNET, TE, VAE = "model.diffusion_model.", "cond_stage_model.", "first_stage_model."


@pytest.fixture
def a(tmp_path: Path) -> Path:
    return save(tmp_path / "a.safetensors", random_arrays(llama()))


@pytest.fixture
def b(tmp_path: Path) -> Path:
    return save(tmp_path / "b.safetensors", {name: array * 2 for name, array in random_arrays(llama()).items()})


def refused(kind: type[BakeError], method: str, *models: Path, **what: Any) -> str:
    with pytest.raises(kind) as caught:
        build_merge_plan(method, models, **what)
    return caught.value.message


@pytest.mark.parametrize(
    ("method", "what", "says"),
    [
        ("weigthed_sum", {}, "is it weighted_sum?"),
        ("add_difference", {}, "takes a, b, c, and 2 models are named"),
        ("ties", {}, "ties needs a base"),
        ("weighted_sum", {"base": "a"}, "weighted_sum has no base"),
        ("weighted_sum", {"parameters": {"beta": 1.0}}, "has no parameter beta; it has: alpha"),
        ("weighted_sum", {"parameters": {"alpha": "much"}}, "alpha is 'much'"),
        ("geometric_sum", {"parameters": {"alpha": 2.0}}, "alpha is 2.0; it can be: from 0 to 1"),
        ("nearswap", {}, "nearswap needs t"),
        ("linear", {"parameters": {"weight": [1.0, 2.0, 3.0]}}, "3 numbers for 2 models"),
        ("linear", {"parameters": {"weight": [1.0, -1.0]}}, "add up to 0"),
        ("slerp", {"parameters": {"norms": Selection(number=1.0)}}, "the same for all tensors"),
        ("nearswap", {"parameters": {"t": Selection(components=(("model", 1.0),))}}, "say what counts elsewhere"),
        ("weighted_sum", {"parameters": {"alpha": Selection(components=(("te", 1.0),))}}, "no component of the base"),
        ("weighted_sum", {"parameters": {"alpha": Selection.parse("GRAD_V")}}, "lists of block values"),
        ("geometric_sum", {"parameters": {"alpha": Selection.parse(gradient="0,2")}}, "it can be: from 0 to 1 (for "),
        ("weighted_sum", {"only": ["unet"]}, "--only unet"),
        ("weighted_sum", {"dtype": "fp4"}, "--dtype fp4"),
        ("ties", {"parameters": {"vote": Selection(number=1.0)}, "base": "a"}, "the same for all tensors"),
        ("weighted_sum", {"rounding": "fast"}, "merges have nearest and stochastic"),
    ],
)
def test_what_cannot_be_meant_is_refused(a: Path, b: Path, method: str, what: dict[str, Any], says: str) -> None:
    what = {key: a if key == "base" else value for key, value in what.items()}
    assert says in refused(UsageError, method, a, b, **what)


def test_models_of_different_families_are_refused(tmp_path: Path) -> None:
    sd1, sdxl = (save_base(tmp_path / f"{family}.safetensors", family) for family in ("sd1", "sdxl"))
    message = refused(FamilyMismatch, "weighted_sum", sd1, sdxl)
    assert "sd1.safetensors is Stable Diffusion 1" in message
    assert "sdxl.safetensors is Stable Diffusion XL" in message


def test_other_sizes_are_refused_with_tensor_and_models(a: Path, tmp_path: Path) -> None:
    wide = save(tmp_path / "wide.safetensors", random_arrays(llama(width=10)))
    message = refused(ShapeMismatch, "weighted_sum", a, wide)
    assert "a.safetensors" in message
    assert "wide.safetensors" in message
    assert "different sizes" in message


def test_vocabularies_of_other_lengths_are_refused(a: Path, tmp_path: Path) -> None:
    arrays = random_arrays(llama())
    grown = {name: np.concatenate([arrays[name]] * 2) for name in ("model.embed_tokens.weight", "lm_head.weight")}
    longer = save(tmp_path / "longer.safetensors", arrays | grown)
    assert "Their vocabularies differ" in refused(ShapeMismatch, "weighted_sum", a, longer, only=["model"])


def hf_folder(folder: Path, arrays: Arrays, words: dict[str, int]) -> Path:
    save(folder / "model.safetensors", arrays, {"format": "pt"})
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "architectures": ["LlamaForCausalLM"]}))
    (folder / "tokenizer.json").write_text(json.dumps({"model": {"vocab": words}, "added_tokens": []}))
    return folder


def test_vocabularies_with_other_words_are_refused(tmp_path: Path) -> None:
    arrays = random_arrays(llama())
    one = hf_folder(tmp_path / "one", arrays, {"cat": 0, "dog": 1})
    two = hf_folder(tmp_path / "two", arrays, {"cat": 1, "dog": 0})
    assert "'cat' is number 0 and number 1" in refused(Mismatch, "weighted_sum", one, two)
    same = hf_folder(tmp_path / "same", arrays, {"dog": 1, "cat": 0})
    assert build_merge_plan("weighted_sum", [one, same]).components["model"].matched


@pytest.mark.parametrize(
    ("file", "words", "others", "says"),
    [
        ("tokenizer.json", [["cat", -1.0], ["dog", -2.0]], [["dog", -1.0], ["cat", -2.0]], "number 0 and number 1"),
        ("tokenizer.json", {"cat": 0, "dog": 1}, {"cat": 0, "cow": 1}, "'cow' is no word and number 1"),
        ("vocab.json", {"cat": 0, "dog": 1}, {"cat": 0}, "'dog' is number 1 and no word"),
    ],
)
def test_vocabularies_are_compared_however_they_are_stored(
    tmp_path: Path, file: str, words: Any, others: Any, says: str
) -> None:
    arrays = random_arrays(llama())
    one, two, none = (hf_folder(tmp_path / name, arrays, {}) for name in ("one", "two", "none"))
    for folder, found in ((one, words), (two, others)):
        (folder / "tokenizer.json").unlink()
        (folder / file).write_text(json.dumps(found if file == "vocab.json" else {"model": {"vocab": found}}))
    assert says in refused(Mismatch, "weighted_sum", one, two)
    assert build_merge_plan("weighted_sum", [one, none]).components["model"].matched


def test_a_quantised_model_is_refused(a: Path, tmp_path: Path) -> None:
    name = "model.layers.0.mlp.up_proj.weight.absmax"
    other = save(tmp_path / "q.safetensors", random_arrays(llama()) | {name: np.ones(4, np.float32)})
    assert "bitsandbytes" in refused(Unsupported, "weighted_sum", a, other)


def test_a_tensor_that_a_model_lacks_is_refused_or_kept(a: Path, b: Path, tmp_path: Path) -> None:
    arrays = random_arrays(llama())
    lost = "model.layers.1.self_attn.q_proj.weight"
    short = save(tmp_path / "short.safetensors", {name: array for name, array in arrays.items() if name != lost})
    assert f"{lost} is not in short.safetensors" in refused(Mismatch, "weighted_sum", a, short)
    assert f"{lost} is only in b.safetensors" in refused(Mismatch, "weighted_sum", short, b)
    plan = build_merge_plan("weighted_sum", [a, short], allow_missing=True)
    (kept,) = [tensor for _, tensor in plan.tensors() if tensor.name == lost]
    assert kept.is_copy
    assert any(lost in note for note in plan.notes)
    plan = build_merge_plan("weighted_sum", [short, b], allow_missing=True)
    assert any(f"{lost} is only in b.safetensors" in note for note in plan.notes)


def test_models_of_one_name_are_told_apart_by_their_folders(a: Path, tmp_path: Path) -> None:
    arrays = random_arrays(llama())
    del arrays["model.norm.weight"]
    other = save(tmp_path / "other" / a.name, arrays)
    assert f"model.norm.weight is not in {other}" in refused(Mismatch, "weighted_sum", a, other)


def test_more_layers_are_refused(a: Path, tmp_path: Path) -> None:
    deep = save(tmp_path / "deep.safetensors", random_arrays(llama(layers=3)))
    assert "model.layers.2." in refused(Mismatch, "weighted_sum", a, deep)


def test_a_component_that_a_model_lacks_stays_with_a_note(tmp_path: Path) -> None:
    whole = save_base(tmp_path / "whole.safetensors")
    arrays = {name: array for name, array in random_arrays(small("sd1")).items() if name.startswith(UNET)}
    unet = save(tmp_path / "unet.safetensors", arrays)
    plan = build_merge_plan("weighted_sum", [whole, unet])
    merged = {tensor.component for _, tensor in plan.tensors() if tensor.merge is not None}
    assert merged == {"unet"}
    assert any("unet.safetensors has no te1" in note for note in plan.notes)
    assert any("unet.safetensors has no vae" in note for note in plan.notes)
    # the other way round, the output is a UNet
    assert {tensor.component for _, tensor in build_merge_plan("weighted_sum", [unet, whole]).tensors()} == {"unet"}


def test_models_without_a_common_component_are_refused(tmp_path: Path) -> None:
    arrays = random_arrays(small("sd1"))
    one = save(tmp_path / "unet.safetensors", {name: a for name, a in arrays.items() if name.startswith(UNET)})
    two = save(tmp_path / "te.safetensors", {name: a for name, a in arrays.items() if name.startswith(TE)})
    assert "nothing to merge" in refused(Mismatch, "weighted_sum", one, two)


def test_a_part_that_is_not_blended_need_not_be_there(tmp_path: Path) -> None:
    whole = save_base(tmp_path / "whole.safetensors")
    arrays = {name: array for name, array in random_arrays(small("sd1")).items() if not name.startswith(VAE)}
    lean = save(tmp_path / "lean.safetensors", arrays)
    alpha = Selection(number=0.5, components=(("vae", 0.0),))
    plan = build_merge_plan("weighted_sum", [whole, lean], parameters={"alpha": alpha})
    assert not any("vae" in note for note in plan.notes)


def test_integers_are_copied_and_differences_reported(tmp_path: Path) -> None:
    one = save_base(tmp_path / "one.safetensors")
    name = "cond_stage_model.transformer.text_model.embeddings.position_ids"
    other = {name: random_arrays(small("sd1"))[name] + 1}
    two = save_base(tmp_path / "two.safetensors", **other)
    plan = build_merge_plan("weighted_sum", [one, two])
    (kept,) = [tensor for _, tensor in plan.tensors() if tensor.name == name]
    assert kept.is_copy
    assert any(name in note for note in plan.notes)


def test_scaled_fp8_is_refused_with_the_remedy(a: Path, tmp_path: Path) -> None:
    import torch
    from support import save_torch

    tensors: dict[str, Any] = {}
    for name, array in random_arrays(llama()).items():
        tensors[name] = torch.from_numpy(array)
        if name.endswith("proj.weight"):
            tensors[name] = tensors[name].to(torch.float8_e4m3fn)
            tensors[name.removesuffix("weight") + "weight_scale"] = torch.tensor(0.5)
    scaled = save_torch(tmp_path / "scaled.safetensors", tensors)
    assert "bake fuse" in refused(Unsupported, "weighted_sum", a, scaled)


def test_the_output_may_not_be_a_model(a: Path, b: Path) -> None:
    with pytest.raises(OutputRefused):
        merge("weighted_sum", [a, b], b, overwrite=True)


def test_a_whole_tensor_that_does_not_fit_is_refused_with_what_it_takes(a: Path, b: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"crossover sees a tensor at once.*--memory 1MiB"):
        merge("crossover", [a, b], tmp_path / "out.safetensors", memory=4096, device="cpu")
    assert not (tmp_path / "out.safetensors").exists()


def test_numbers_that_are_none_are_refused_with_model_and_tensor(a: Path, tmp_path: Path) -> None:
    arrays = random_arrays(llama())
    arrays["model.norm.weight"][3] = np.nan
    broken = save(tmp_path / "broken.safetensors", arrays)
    with pytest.raises(BakeError, match=r"model\.norm\.weight: broken\.safetensors holds NaN") as caught:
        merge("weighted_sum", [a, broken], tmp_path / "out.safetensors")
    assert caught.value.exit_code == 7


def test_results_that_overflow_are_refused(a: Path, b: Path, tmp_path: Path) -> None:
    with pytest.raises(BakeError, match="F16 ends at 65504") as caught:
        merge("weighted_sum", [a, b], tmp_path / "out.safetensors", parameters={"alpha": 1e8})
    assert caught.value.exit_code == 7


def test_directions_that_cancel_out_are_refused(tmp_path: Path) -> None:
    signs = (1, 1, -1, -1)
    models = [
        save(tmp_path / f"{n}.safetensors", {"layer.weight": np.full((3, 4), sign, np.float16)})
        for n, sign in enumerate(signs)
    ]
    with pytest.raises(Mismatch, match=r"layer\.weight: "):
        merge("multislerp", models, tmp_path / "out.safetensors")


def test_the_published_layouts_of_every_family_correspond(shared: Path) -> None:
    """Every tensor that is merged has a counterpart of its shape in the other layout, both ways."""
    from listed import checkpoint_of_list

    from bake.identify.checkpoint import identify_checkpoint
    from bake.plan.counterparts import Counterparts, Opened, is_merged

    found = 0
    for original in sorted((shared / "names").glob("*_original.json*")):
        pattern = original.name.split("_original")[0] + "_diffusers.json*"
        diffusers = next(iter((shared / "names").glob(pattern)), None)
        if diffusers is None or "incl_clips" in original.name:
            continue
        opened = [
            Opened(path.name, checkpoint, identify_checkpoint(checkpoint), 0, "")
            for path in (original, diffusers)
            for checkpoint in [checkpoint_of_list(path)]
        ]
        for one, two in (opened, opened[::-1]):
            counterparts = Counterparts(one, two)
            for component, (_, names) in one.owned.items():
                if counterparts.component_for(component) is None:
                    continue
                lost = [
                    name
                    for name in names
                    if is_merged(name, one.base.tensors[name]) and counterparts.share(name, component) is None
                ]
                found += len(names)
                lost = [name for name in lost if not name.endswith(UNPAIRED) and ".resblocks.23." not in name]
                assert lost == [], one.name
    assert found > 10_000


# What one layout has and the other lacks; see tests/keys/test_lists.py.
UNPAIRED = ("norm_final.weight", "text_projection", "text_projection.weight", "logit_scale")
