"""What scripts/bench.py measures is what bake accepts, and its judge sees what is wrong."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import bench_models
import numpy as np
import pytest
from bench import CASES, GROW, table
from bench_exact import judge, read_places
from safetensors.numpy import load_file, save_file
from support import bake


def make(folder: Path, model: str, *adapters: str, scale_down: int = 32, merge: float | None = None) -> dict[str, Any]:
    """A job at small widths."""
    parsed = [bench_models.parse_adapter(text) for text in adapters]
    return json.loads(bench_models.make(folder, model, parsed, folder, scale_down, merge).read_text())


def fused(job: dict[str, Any], folder: Path) -> Path:
    output = folder / ("out" if Path(job["base"]).is_dir() else "out.safetensors")
    loras = [word for adapter in job["adapters"] for word in ("-l", f"{adapter['path']}:{adapter['weight']}")]
    done = bake("fuse", job["base"], *loras, "-o", output, "-q")
    assert done.code == 0, done.err
    return output


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.verb == "fuse"])
def test_bake_accepts_the_files_of_every_case(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    job = make(tmp_path, case.model, *(text.replace(":128:", ":8:") for text in case.adapters))
    modules = {"sdxl": 1052, "llm": 168, "two-percent": 32, "loha": 350, "lokr": 350}.get(name, 264)
    assert {len(adapter["modules"]) for adapter in job["adapters"]} == {modules}
    verdict = judge(job, fused(job, tmp_path))
    assert verdict["equal_share"] > 0.999
    assert verdict["max_ulp"] < 0.6
    assert set(verdict["untouched"]) == {"identical"}


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.verb == "merge"])
def test_bake_merges_the_models_of_every_case(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    job = make(tmp_path, case.model, merge=case.merge)
    output = tmp_path / ("out" if Path(job["base"]).is_dir() else "out.safetensors")
    models = (job["base"], job["other"])
    done = bake("merge", "weighted_sum", *models, "-p", f"alpha={job['alpha']}", "-o", output, "-q")
    assert done.code == 0, done.err
    verdict = judge(job, output)
    assert verdict["equal_share"] == 1
    assert verdict["touched_tensors"] > 200
    assert set(verdict["untouched"]) <= {"identical"}
    assert judge(job, Path(job["base"]))["equal_share"] < 0.2
    places = [read_places(Path(model)) for model in models]
    biggest = max(places[0], key=lambda tensor: math.prod(places[0][tensor].shape))
    old, new = (place[biggest].values() for place in places)
    assert 0.09 < np.sqrt(np.mean((new - old) ** 2) / np.mean(old**2)) < 0.11


@pytest.mark.parametrize("kind", bench_models.KINDS)
def test_updates_are_two_percent_of_the_weights(kind: str, tmp_path: Path) -> None:
    job = make(tmp_path, "sd15", f"{kind}:8:attention:1", scale_down=8)
    name = "model.diffusion_model.input_blocks.8.1.transformer_blocks.0.ff.net.0.proj.weight"
    old = read_places(Path(job["base"]))[name].values()
    delta = read_places(fused(job, tmp_path))[name].values() - old
    share = np.sqrt(np.mean(delta**2) / np.mean(old**2))
    assert 0.01 < share < (0.08 if kind == "dora" else 0.03)  # magnitudes are not those of these very rows


def test_the_judge_sees_one_wrong_element_and_every_kind_of_loss(tmp_path: Path) -> None:
    job = make(tmp_path, "sd15", "lora:4:cross:1")
    arrays = load_file(fused(job, tmp_path))
    touched, *_ = next(iter(job["adapters"][0]["modules"].values()))
    before = judge(job, tmp_path / "out.safetensors")
    arrays[touched] = arrays[touched].copy()
    arrays[touched][0, 0] += np.float16(0.01)
    arrays["betas"] = arrays["betas"] + np.float16(1)
    arrays["alphas_cumprod"] = arrays["alphas_cumprod"].astype(np.float32)
    del arrays["model_ema.decay"]
    save_file(arrays, tmp_path / "wrong.safetensors")
    after = judge(job, tmp_path / "wrong.safetensors")
    assert after["equal_share"] < before["equal_share"]
    assert after["max_ulp"] > 100
    expected = {"changed": 1, "same value": 1, "missing": 1, "identical": before["untouched"]["identical"] - 3}
    assert after["untouched"] == expected


def test_the_judge_knows_tensors_of_another_layout_by_their_bytes(tmp_path: Path) -> None:
    job = make(tmp_path, "sd15", "lora:4:attention:1")
    output, base = fused(job, tmp_path), Path(job["base"])
    for source, folder in ((base, "theirs"), (output, "their-output")):
        (tmp_path / folder / "unet").mkdir(parents=True)
        renamed = {f"x.{name[::-1]}": array for name, array in load_file(source).items()}
        save_file(renamed, tmp_path / folder / "unet" / "model.safetensors")
    here, there = judge(job, output), judge(job, tmp_path / "their-output", tmp_path / "theirs")
    assert there == here
    assert there["touched_tensors"] == 264


def test_a_model_is_made_once_for_all_cases(tmp_path: Path) -> None:
    make(tmp_path, "llm", scale_down=32)
    shards = sorted(path.name for path in (tmp_path / "llm").iterdir())
    assert shards[0] == "config.json"
    assert len(shards) == 5
    shutil.rmtree(tmp_path / "llm")
    (tmp_path / "llm").mkdir()
    make(tmp_path, "llm", scale_down=32)
    assert not list((tmp_path / "llm").iterdir())


@pytest.mark.parametrize("name", ["flux1_dev_original.json", "flux1_dev_diffusers.json", "qwen25_0.5b.json"])
def test_published_name_lists_make_models_too(name: str, shared: Path, tmp_path: Path) -> None:
    job = make(tmp_path, str(shared / "names" / name), "lora:4:everything:1")
    assert judge(job, fused(job, tmp_path))["equal_share"] > 0.999


@pytest.mark.parametrize("text", ["lora:4:nowhere:1", "unheard:4:cross:1", "lora:4"])
def test_words_that_are_no_adapter_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"OVER|unpack"):
        bench_models.parse_adapter(text)


def test_every_adapter_of_every_case_can_be_parsed() -> None:
    for case in (*CASES.values(), *GROW.values()):
        for text in case.adapters:
            assert bench_models.parse_adapter(text).rank > 0


def test_a_table_has_a_row_for_each_command_that_ran() -> None:
    ran = {
        **{"seconds": 2.0, "fastest": 1.0, "slowest": 3.0, "cpu_seconds": 1.0, "peak_bytes": 2**20, "exact": None},
        **{"times_cp": 1.5, "times_cp_and_import": None, "read_bytes": 10**9, "written_bytes": None},
    }
    lines = list(table({"bake": ran, "absent": {"failure": "exit 2"}}))
    assert len(lines) == 3
    assert lines[2].startswith("| bake | 2.00 | 1.00-3.00 | 1.50 |  | 1.0 | 1 | 1.00 |  |")
