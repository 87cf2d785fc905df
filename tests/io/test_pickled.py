"""Pickles: tensors come out, code does not."""

from __future__ import annotations

import collections
import pickle
import zipfile
from pathlib import Path

import pytest
import torch

from bake.errors import InputError, PickleRefused
from bake.io.tensorfile import open_tensors, read_tensor_bytes


class Attack:
    """Writes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_a_state_dict_shows_names_shapes_and_bytes(tmp_path: Path, zipped: bool) -> None:
    tensor = torch.arange(12, dtype=torch.float16).reshape(3, 4)
    state = collections.OrderedDict(a=tensor, b=torch.tensor(3.0), empty=torch.empty(0, 2), c=tensor.T)
    torch.save(state, tmp_path / "a.pt", _use_new_zipfile_serialization=zipped)
    file = open_tensors(tmp_path / "a.pt")
    assert {name: (info.dtype, info.shape) for name, info in file.tensors.items()} == {
        "a": ("F16", (3, 4)),
        "b": ("F32", ()),
        "empty": ("F32", (0, 2)),
        "c": ("F16", (4, 3)),
    }
    assert read_tensor_bytes(file, "a") == tensor.numpy().tobytes()
    assert read_tensor_bytes(file, "c") == tensor.T.contiguous().numpy().tobytes()
    assert read_tensor_bytes(file, "empty") == b""


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_whatever_torch_saves_of_plain_tensors_is_read(tmp_path: Path, zipped: bool) -> None:
    shared = torch.arange(12.0)
    dtypes = (torch.float64, torch.bfloat16, torch.int8, torch.int64, torch.uint8, torch.bool)
    if zipped:  # torch cannot load what it saves otherwise
        dtypes += (torch.float8_e4m3fn,)
    state = {str(dtype): torch.ones(3).to(dtype) for dtype in dtypes} | {
        "parameter": torch.nn.Parameter(torch.ones(2)),
        "tied": shared,
        "tied again": shared,
        "view": shared[3:6],
        "turned": shared.view(3, 4).T,
    }
    module = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.BatchNorm1d(3)).state_dict()  # has metadata of its own
    more = {"steps": [1, 2], "sizes": torch.Size([1, 2]), "counts": collections.Counter("aab"), "none": None}
    content = {"state": state, "module": module, **more}
    torch.save(content, tmp_path / "a.pt", _use_new_zipfile_serialization=zipped)
    file = open_tensors(tmp_path / "a.pt")
    for name, tensor in {
        **{f"state.{n}": t for n, t in state.items()},
        **{f"module.{n}": t for n, t in module.items()},
    }.items():
        stored = tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        assert read_tensor_bytes(file, name) == stored, name
    assert file.metadata == {
        "steps.0": "1",
        "steps.1": "2",
        "sizes.0": "1",
        "sizes.1": "2",
        "counts.a": "2",
        "counts.b": "1",
    }


def test_a_range_across_several_tensors_is_read(tmp_path: Path) -> None:
    torch.save({"a": torch.arange(4.0), "none": torch.empty(0), "b": torch.arange(4.0, 8.0)}, tmp_path / "a.pt")
    file = open_tensors(tmp_path / "a.pt")
    buffer = bytearray(16)
    file.read_into(8, memoryview(buffer))
    assert bytes(buffer) == torch.arange(2.0, 6.0).numpy().tobytes()


def test_a_checkpoint_wrapper_is_taken_off_and_numbers_become_metadata(tmp_path: Path) -> None:
    torch.save({"state_dict": {"w": torch.ones(2)}, "epoch": 3}, tmp_path / "a.ckpt")
    assert list(open_tensors(tmp_path / "a.ckpt").tensors) == ["w"]
    torch.save({"string_to_param": {"*": torch.ones(2)}, "name": "flower", "step": 7}, tmp_path / "b.pt")
    file = open_tensors(tmp_path / "b.pt")
    assert list(file.tensors) == ["string_to_param.*"]
    assert file.metadata == {"name": "flower", "step": "7"}


def test_a_list_gives_numbers_for_names(tmp_path: Path) -> None:
    torch.save([torch.ones(2, 1), torch.ones(1, 2)], tmp_path / "a.pt")
    file = open_tensors(tmp_path / "a.pt")
    assert list(file.tensors) == ["0", "1"]


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_a_pickle_that_wants_code_is_refused_by_the_name_of_what_it_wants(tmp_path: Path, zipped: bool) -> None:
    path, victim = tmp_path / "evil.pt", tmp_path / "owned"
    torch.save({"w": torch.ones(2), "x": Attack(victim)}, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(PickleRefused, match="open") as caught:
        open_tensors(path)
    assert caught.value.exit_code == 3
    assert not victim.exists()


def test_a_bare_pickle_that_wants_code_is_refused(tmp_path: Path) -> None:
    victim = tmp_path / "owned"
    (tmp_path / "evil.bin").write_bytes(pickle.dumps(Attack(victim), protocol=2))
    with pytest.raises(InputError):
        open_tensors(tmp_path / "evil.bin")
    assert not victim.exists()


def test_a_compressed_archive_is_refused_before_it_is_unpacked(tmp_path: Path) -> None:
    path = tmp_path / "bomb.pt"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", bytes(50_000_000))
    assert path.stat().st_size < 100_000
    with pytest.raises(PickleRefused, match="unpack to"):
        open_tensors(path)


@pytest.mark.parametrize("content", [b"PK\x03\x04 and nothing else", b"\x80\x02.", b"\x80\x04garbage", b"\x80"])
def test_damaged_pickles_are_input_errors(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "a.pt"
    path.write_bytes(content)
    with pytest.raises(InputError):
        open_tensors(path)


def test_a_truncated_archive_is_an_input_error(tmp_path: Path) -> None:
    torch.save({"w": torch.ones(1000)}, tmp_path / "a.pt")
    content = (tmp_path / "a.pt").read_bytes()
    (tmp_path / "a.pt").write_bytes(content[: len(content) // 2])
    with pytest.raises(InputError):
        open_tensors(tmp_path / "a.pt")
