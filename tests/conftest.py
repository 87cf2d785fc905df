"""Fixtures for every test: small models, and the data that only some machines have."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import layouts
import pytest
from crashing import Server
from hypothesis import settings
from models import write_random
from scenes import KINDS, Scene, prepare
from support import DIFFUSERS_LORA, KOHYA_LORA, ROOT, SD1_BASE

from bake.execute import kernels
from bake.execute.merging import plain as plain_merging
from bake.execute.plain import crew
from bake.execute.plain import pipeline as plain_pipeline

# The same examples in every run: a red build is somebody's change, never the dice. No deadline: machines are shared.
settings.register_profile("bake", deadline=None, derandomize=True)
settings.load_profile("bake")

_BIG_FREE_BYTES = 30 * 10**9


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--runs",
        type=int,
        default=120,
        help="How many points of a run crash tests kill, interrupt and disturb, in all kinds of runs together.",
    )


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What bake remembers between runs is kept apart from the user's, also by the processes that tests start."""
    folder = str(tmp_path_factory.mktemp("cache"))
    with pytest.MonkeyPatch.context() as patch:
        for name in ("XDG_CACHE_HOME", "LOCALAPPDATA"):
            patch.setenv(name, folder)
        yield


@pytest.fixture(scope="session", autouse=True)
def _no_copies_of_pytest() -> Iterator[None]:
    """What tests replace and count is in this process: its workers are threads; processes have tests of their own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(crew, "can_fork", lambda: False)
        yield


@pytest.fixture(scope="module", params=["numpy", "compiled"])
def loops(request: pytest.FixtureRequest) -> Iterator[str]:
    """What goes through all elements where torch does not: NumPy, or the loops in C."""
    if request.param == "compiled" and kernels.compiled is None:
        pytest.skip("the loops in C were not built")
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "numpy":
            patch.setattr(kernels, "compiled", None)
        yield str(request.param)


@pytest.fixture(params=["numpy", "torch"])
def lane(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The part of bake that computes on the processor, once without and once with torch."""
    if request.param == "torch":
        monkeypatch.setattr(plain_pipeline, "suits", lambda plan, device: False)
    return str(request.param)


@pytest.fixture(params=["numpy", "torch"])
def merge_lane(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The part of bake that merges on the processor, once without and once with torch."""
    if request.param == "torch":
        monkeypatch.setattr(plain_merging, "suits", lambda plan, device: False)
    return str(request.param)


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A process that forks bakes to be killed, interrupted and disturbed."""
    if sys.platform != "linux":
        pytest.skip("looks into /proc, and forks a process that has torch")
    started = Server(tmp_path_factory.mktemp("server"))
    yield started
    started.close()


@pytest.fixture(scope="session", params=KINDS)
def scene(request: pytest.FixtureRequest, server: Server, tmp_path_factory: pytest.TempPathFactory) -> Scene:
    """Every kind of output that a run can have, and what stood in its place before."""
    return prepare(server, request.param, tmp_path_factory.mktemp("scene"))


@pytest.fixture
def runs(request: pytest.FixtureRequest) -> int:
    """How many points of each kind of run are to be tried."""
    return max(1, int(request.config.getoption("--runs")) // len(KINDS))


@pytest.fixture
def sd1_base() -> Path:
    """A checkpoint with every tensor name of Stable Diffusion 1.5."""
    return SD1_BASE


@pytest.fixture
def kohya_lora() -> Path:
    """A LoRA for UNet and text encoder in kohya's names."""
    return KOHYA_LORA


@pytest.fixture
def diffusers_lora() -> Path:
    """A LoRA for the UNet in diffusers names."""
    return DIFFUSERS_LORA


@pytest.fixture
def shared() -> Path:
    """A folder with real adapters, name lists and cases, where there is one beside the repository."""
    folder = Path(os.environ.get("BAKE_TEST_DATA", ROOT.parent / "shared"))
    if not (folder / "data").is_dir():
        pytest.skip("no folder with real adapters and name lists (BAKE_TEST_DATA) on this machine")
    return folder


@pytest.fixture
def big_space(tmp_path: Path) -> Iterator[Path]:
    """A folder on a disk with room for several full-size models, emptied afterwards."""
    if shutil.disk_usage(tmp_path).free < _BIG_FREE_BYTES:
        pytest.skip("full-size models need 30 GB of free disk")
    yield tmp_path
    shutil.rmtree(tmp_path)


@pytest.fixture(scope="module")
def sd15(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A Stable Diffusion 1.5 checkpoint of full size, 2.1 GB of random fp16 values."""
    folder = tmp_path_factory.mktemp("sd15")
    if shutil.disk_usage(folder).free < _BIG_FREE_BYTES:
        pytest.skip("full-size models need 30 GB of free disk")
    yield write_random(folder / "sd15.safetensors", layouts.sd1())
    shutil.rmtree(folder)
