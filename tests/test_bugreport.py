"""Bug reports: what reproduces a problem is inside, what is the user's own is not."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from from_bug_report import NotAReport, reproduce
from models import UNET, kohya_lora, llama, peft_lora, random_arrays, save_base, sd1_pair
from names import small
from support import KOHYA_LORA, ROOT, SD1_BASE, bake, save

from bake.bugreport import make_report
from bake.errors import BakeError
from bake.keys import unet
from bake.plan.build import build_plan
from bake.plan.recipe import AdapterChoice, Recipe

Pair = tuple[Path, Path | None]

SECRETS = {
    "ss_sd_model_name": "/home/jane/models/secret.safetensors",
    "ss_tag_frequency": '{"10_jane doe": {"jane doe": 3}}',
    "ss_training_comment": "trained by jane",
    "ss_network_args": '{"conv_dim": "8", "algo": "locon", "preset": "/home/jane/p.toml", "jane": "doe"}',
    "modelspec.author": "jane",
    "modelspec.architecture": "stable-diffusion-v1/lora",
    "ss_network_module": "/home/jane/networks.py",
    "ss_network_dim": "2",
    "jane doe": "a photo of jane",
}


def fitting(folder: Path) -> Pair:
    base, lora, _ = sd1_pair(folder)
    return lora, base


def misspelt(folder: Path) -> Pair:
    base, _, _ = sd1_pair(folder)
    arrays, _ = kohya_lora(small("sd1"))
    return save(folder / "a.safetensors", {k.replace("proj_in", "proj_im"): v for k, v in arrays.items()}), base


def wrong_shape(folder: Path) -> Pair:
    base, _, _ = sd1_pair(folder)
    arrays, _ = kohya_lora(small("sd1"))
    arrays["lora_unet_mid_block_attentions_0_proj_in.lora_up.weight"] = np.ones((5, 2, 1, 1), np.float16)
    return save(folder / "a.safetensors", arrays), base


def other_family(folder: Path) -> Pair:
    return KOHYA_LORA, save_base(folder / "xl.safetensors", "sdxl")


def alpha_that_is_no_number(folder: Path) -> Pair:
    base, _, _ = sd1_pair(folder)
    arrays, _ = kohya_lora(small("sd1"), alpha=float("nan"))
    return save(folder / "a.safetensors", arrays), base


def quantised(folder: Path) -> Pair:
    _, lora, _ = sd1_pair(folder)
    packed = random_arrays(small("sd1")) | {"a.weight.absmax": np.ones(1, np.float32)}
    return lora, save(folder / "q.safetensors", packed)


def language_model(folder: Path, **config: object) -> Pair:
    shapes = llama()
    names = sorted(shapes)
    index = {}
    for number, part in enumerate((names[:7], names[7:]), 1):
        file = f"jane-{number:05d}-of-00002.safetensors"
        save(folder / "m" / file, random_arrays({name: shapes[name] for name in part}))
        index.update(dict.fromkeys(part, file))
    (folder / "m" / "jane.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    settings = {"model_type": "llama", "_name_or_path": "/home/jane/m", "hidden_size": 8, "architectures": ["X"]}
    (folder / "m" / "config.json").write_text(json.dumps(settings))
    save(folder / "l" / "adapter_model.safetensors", peft_lora(shapes, ["model.layers.0.mlp.up_proj.weight"]))
    peft = {"peft_type": "LORA", "r": 2, "lora_alpha": 7, "base_model_name_or_path": "/home/jane/m", **config}
    (folder / "l" / "adapter_config.json").write_text(json.dumps(peft))
    return folder / "l", folder / "m"


def scale_by_configuration(folder: Path) -> Pair:
    return language_model(folder, use_rslora=True, alpha_pattern={".*up_proj": 3}, target_modules=["up_proj"])


def configuration_of_another_adapter(folder: Path) -> Pair:
    return language_model(folder, rank_pattern={"up_proj": 5})


def unknown_kind(folder: Path) -> Pair:
    return language_model(folder, peft_type="NEWEST")


def diffusers_folder(folder: Path) -> Pair:
    native = {
        name.removeprefix(UNET).removesuffix(".weight"): shape
        for name, shape in small("sd1").items()
        if name.startswith(UNET) and name.endswith(".weight")
    }
    spelled = unet.translate(native)
    arrays = random_arrays({f"{spelled[module]}.weight": shape for module, shape in native.items()})
    save(folder / "d" / "unet" / "diffusion_pytorch_model.fp16.safetensors", arrays)
    (folder / "d" / "unet" / "config.json").write_text(json.dumps({"_class_name": "UNet2DConditionModel"}))
    (folder / "d" / "model_index.json").write_text("{}")
    return KOHYA_LORA, folder / "d"


def pickle(folder: Path) -> Pair:
    base, _, _ = sd1_pair(folder)
    arrays, _ = kohya_lora(small("sd1"), alpha=0.3)
    torch.save({k: torch.from_numpy(np.array(v)) for k, v in arrays.items()}, folder / "a.pt")
    return folder / "a.pt", base


def pickled_list(folder: Path) -> Pair:
    torch.save([torch.ones(8, 2), torch.ones(2, 8), torch.ones(8, 2), torch.ones(2, 8)], folder / "a.pt")
    return folder / "a.pt", save_base(folder / "base.safetensors")


def no_adapter(folder: Path) -> Pair:
    return save(folder / "a.safetensors", {"emb_params": np.ones((2, 2))}), None


def checkpoint(folder: Path) -> Pair:
    return SD1_BASE, None


PROBLEMS: list[Callable[[Path], Pair]] = [
    *(fitting, misspelt, wrong_shape, other_family, alpha_that_is_no_number, quantised, scale_by_configuration),
    *(configuration_of_another_adapter, unknown_kind, diffusers_folder, pickle, pickled_list, no_adapter, checkpoint),
]


@pytest.mark.parametrize("problem", PROBLEMS, ids=lambda problem: problem.__name__)
def test_files_made_from_a_report_have_the_same_problem(problem: Callable[[Path], Pair], tmp_path: Path) -> None:
    report = make_report(*problem(tmp_path))
    again = make_report(*reproduce(json.loads(json.dumps(report)), tmp_path / "again"))
    for side in ("file", "against"):
        for part in (report[side] or {"parts": []})["parts"]:
            part["metadata_keys"] = []  # what was left out cannot come back
    assert again == report
    assert str(tmp_path) not in json.dumps(report)
    assert "jane" not in json.dumps(report).lower()


@pytest.mark.parametrize("problem", [misspelt, wrong_shape, quantised, scale_by_configuration])
def test_fusing_ends_alike(problem: Callable[[Path], Pair], tmp_path: Path) -> None:
    def outcome(file: Path, base: Path | None) -> object:
        assert base is not None
        try:
            plan = build_plan(Recipe(base, (AdapterChoice(file),)))
        except BakeError as refusal:
            return refusal.code, refusal.exit_code
        return plan.components, [(term.module, term.scale) for _, tensor in plan.tensors() for term in tensor.terms]

    pair = problem(tmp_path)
    assert outcome(*reproduce(make_report(*pair), tmp_path / "again")) == outcome(*pair)


def test_refusals_are_in_the_report(tmp_path: Path) -> None:
    report = make_report(*misspelt(tmp_path))
    assert (report["error"]["code"], report["error"]["exit"]) == ("unmatched-modules", 4)
    assert report["diagnosis"]["components"]["unet"] == {"matched": 4, "total": 5}
    adapter, base = unknown_kind(tmp_path / "l")
    for against in (base, None):
        assert make_report(adapter, against)["error"]["code"] == "unsupported"


def test_a_file_that_cannot_be_opened_is_reported_by_its_error(tmp_path: Path) -> None:
    (tmp_path / "jane.safetensors").write_bytes(b"no header")
    report = make_report(tmp_path / "jane.safetensors")
    assert report["file"] is None
    assert report["error"]["exit"] == 3
    assert report["error"]["message"].startswith("FILE: ")


def test_weights_are_not_in_a_report_and_alphas_are_exactly(tmp_path: Path) -> None:
    arrays, _ = kohya_lora(small("sd1"), alpha=0.3)
    weights = {key: np.full_like(value, 0.1234) for key, value in arrays.items() if not key.endswith("alpha")}
    text = json.dumps(make_report(save(tmp_path / "a.safetensors", arrays | weights)))
    assert "0.123" not in text
    numbers = json.loads(text)["file"]["parts"][0]["numbers"]
    assert set(numbers.values()) == {float(np.float16(0.3))}
    assert len(numbers) == 6


def test_nothing_personal_is_in_a_report(tmp_path: Path) -> None:
    arrays, _ = kohya_lora(small("sd1"))
    folder = tmp_path / "jane"
    text = json.dumps(make_report(save(folder / "jane.safetensors", arrays, SECRETS), folder / "none.safetensors"))
    (part,) = json.loads(text)["file"]["parts"]
    assert "jane" not in text.lower()
    assert part["metadata"] == {
        "modelspec.architecture": "stable-diffusion-v1/lora",
        "ss_network_args": '{"conv_dim": "8", "algo": "locon"}',
        "ss_network_dim": "2",
    }
    assert "ss_tag_frequency" in part["metadata_keys"]


def test_the_same_files_give_the_same_report(tmp_path: Path) -> None:
    pair = misspelt(tmp_path)
    one, two = tmp_path / "1.json", tmp_path / "2.json"
    for out in (one, two):
        assert bake("inspect", pair[0], "--against", pair[1], "--bug-report", out).code == 0
    assert one.read_bytes() == two.read_bytes()


def test_a_report_of_an_adapter_takes_a_few_kilobytes(tmp_path: Path) -> None:
    bake("inspect", KOHYA_LORA, "--bug-report", tmp_path / "r.json", "-q")
    assert (tmp_path / "r.json").stat().st_size < 100_000


def test_an_existing_file_is_never_replaced(tmp_path: Path) -> None:
    out = tmp_path / "r.json"
    out.write_text("mine")
    assert bake("inspect", KOHYA_LORA, "--bug-report", out).code == 8
    assert out.read_text() == "mine"
    assert bake("inspect", KOHYA_LORA, "--bug-report", tmp_path / "none" / "r.json").code == 8


def test_a_refused_file_gets_its_report_all_the_same(tmp_path: Path) -> None:
    file, _ = no_adapter(tmp_path)
    done = bake("inspect", file, "--against", SD1_BASE, "--bug-report", tmp_path / "r.json", "--json")
    assert done.code == 2
    assert json.loads((tmp_path / "r.json").read_text())["error"]["code"] == "usage"


def test_hostile_metadata_is_left_out(tmp_path: Path) -> None:
    arrays, _ = kohya_lora(small("sd1"))
    bombs = {"ss_network_args": "[" * 50_000, "lora_adapter_metadata": '{"a":' * 50_000, "software": "{" * 2_000_000}
    report = make_report(save(tmp_path / "a.safetensors", arrays, bombs))
    assert report["file"]["parts"][0]["metadata"] == {}


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda report: report.update(bug_report=99), "schema 99"),
        (lambda report: report["file"]["parts"][0].update(name="../a.safetensors"), "not the name of a file"),
        (lambda report: report["file"]["parts"][0]["tensors"].update(x="F32 99999x99999"), "--zeros"),
    ],
)
def test_a_report_is_a_strangers_file_too(tmp_path: Path, change: Callable[[dict], object], reason: str) -> None:
    report = make_report(KOHYA_LORA)
    change(report)
    with pytest.raises(NotAReport, match=re.escape(reason)):
        reproduce(report, tmp_path / "again")


def test_zeros_are_enough_to_plan_with(tmp_path: Path) -> None:
    lora, base = sd1_pair(tmp_path)[1::-1]
    file, made = reproduce(make_report(lora, base), tmp_path / "again", zeros=True)
    assert file is not None
    assert made is not None
    assert build_plan(Recipe(made, (AdapterChoice(file),))).components["unet"].matched == 5


def test_the_script_prints_the_command_to_run(tmp_path: Path) -> None:
    bake("inspect", KOHYA_LORA, "--against", SD1_BASE, "--bug-report", tmp_path / "r.json", "-q")
    words = [sys.executable, ROOT / "scripts" / "from_bug_report.py", tmp_path / "r.json", tmp_path / "again"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(words, capture_output=True, text=True, env=environment, check=True)
    assert bake(*done.stdout.split()[1:], "--json").json["coverage"]["fits"] is True
    refused = subprocess.run(words, capture_output=True, text=True, env=environment, check=False)
    assert (refused.returncode, refused.stdout) == (1, "")  # the folder is there already
