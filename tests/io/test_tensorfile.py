"""Opening files by content, and reading the small numbers inside."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from support import save, save_torch

from bake.errors import HeaderError, InputError, Unsupported
from bake.io.tensorfile import SafetensorsFile, open_tensors, read_number, read_numbers, read_tensor_bytes


def test_bytes_of_a_tensor_are_read_by_name(tmp_path: Path) -> None:
    array = np.arange(12, dtype=np.float32).reshape(3, 4)
    file = open_tensors(save(tmp_path / "a.safetensors", {"x": array, "y": array + 1}))
    assert read_tensor_bytes(file, "y") == (array + 1).tobytes()


def test_a_closed_file_opens_again_when_it_is_read(tmp_path: Path) -> None:
    file = open_tensors(save(tmp_path / "a.safetensors", {"x": np.ones(3, np.float32)}))
    file.close()
    file.close()
    assert read_tensor_bytes(file, "x") == np.ones(3, np.float32).tobytes()
    file.close()


def test_opening_leaves_no_descriptor_open(tmp_path: Path) -> None:
    path = save(tmp_path / "a.safetensors", {"x": np.ones(3, np.float32)})
    before = len(os.listdir("/proc/self/fd")) if Path("/proc/self/fd").is_dir() else 0
    held = [SafetensorsFile(path) for _ in range(50)]
    after = len(os.listdir("/proc/self/fd")) if Path("/proc/self/fd").is_dir() else 0
    assert len(held) == 50
    assert after <= before + 1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int64])
@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
def test_alpha_is_read_in_any_dtype_and_shape(tmp_path: Path, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    file = open_tensors(save_torch(tmp_path / "a.safetensors", {"alpha": torch.full(shape, 8, dtype=dtype)}))
    assert read_number(file, "alpha") == 8.0


def test_a_number_that_is_several_is_refused(tmp_path: Path) -> None:
    file = open_tensors(save(tmp_path / "a.safetensors", {"alpha": np.ones(2, np.float32)}))
    with pytest.raises(InputError, match="should be one number"):
        read_number(file, "alpha")


@pytest.mark.parametrize("length", [0x80, 0x280, 0x480])
def test_a_header_as_long_as_the_mark_of_a_pickle_is_still_a_header(tmp_path: Path, length: int) -> None:
    text = b'{"x":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}'
    path = tmp_path / "a.safetensors"
    path.write_bytes(length.to_bytes(8, "little") + text.ljust(length) + b"\x07")
    assert read_tensor_bytes(open_tensors(path), "x") == b"\x07"


def test_a_gguf_file_is_named_and_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"GGUF" + bytes(100))
    with pytest.raises(Unsupported, match="GGUF"):
        open_tensors(path)


def test_a_folder_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is a folder"):
        open_tensors(tmp_path)


def test_a_text_file_is_no_safetensors_file(tmp_path: Path) -> None:
    path = tmp_path / "page.safetensors"
    path.write_text("<!DOCTYPE html><html>an error page saved as a model</html>")
    with pytest.raises(HeaderError, match="not a safetensors file"):
        open_tensors(path)


def test_a_file_shortened_after_opening_is_an_input_error(tmp_path: Path) -> None:
    path = save(tmp_path / "a.safetensors", {"x": np.ones(1000, np.float32)})
    file = open_tensors(path)
    os.truncate(path, 500)
    with pytest.raises(InputError, match="ends at byte 500"):
        read_tensor_bytes(file, "x")


def test_numbers_are_read_in_order_and_only_a_few(tmp_path: Path) -> None:
    path = save(tmp_path / "a.safetensors", {"shape": np.array([3, -1, 2]), "weight": np.zeros((65,), np.float32)})
    file = open_tensors(path)
    assert read_numbers(file, "shape") == [3, -1, 2]
    with pytest.raises(InputError, match="a few numbers"):
        read_numbers(file, "weight")
