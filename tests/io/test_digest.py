"""Digests against hashlib and the definitions of those who use them."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest
from support import save

from bake.errors import InputError
from bake.io.digest import BackgroundDigests, data_sha256, digest_file


@pytest.fixture
def model(tmp_path: Path) -> Path:
    values = np.random.default_rng(0).standard_normal((1000, 1000)).astype(np.float32)
    return save(tmp_path / "model.safetensors", {"x": values})


def test_the_file_hash_and_the_legacy_hash(model: Path) -> None:
    content = model.read_bytes()
    digest = digest_file(model)
    assert digest.sha256 == hashlib.sha256(content).hexdigest()
    assert digest.legacy == hashlib.sha256(content[0x100000:0x110000]).hexdigest()[:8]


def test_the_legacy_hash_of_a_small_file_is_that_of_nothing(tmp_path: Path) -> None:
    path = save(tmp_path / "small.safetensors", {"x": np.ones(3)})
    assert digest_file(path).legacy == "e3b0c442"  # what kohya writes into small files as well


def test_the_data_hash_leaves_out_the_header(model: Path, tmp_path: Path) -> None:
    content = model.read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    assert data_sha256(model) == hashlib.sha256(content[start:]).hexdigest()


def test_digests_in_the_background_come_in_order_and_pass_errors_on(model: Path, tmp_path: Path) -> None:
    other = save(tmp_path / "other.safetensors", {"x": np.ones(3)})
    with BackgroundDigests([model, other]) as digests:
        assert digests.result() == [digest_file(model), digest_file(other)]
    with BackgroundDigests([tmp_path / "missing"]) as digests, pytest.raises(InputError):
        digests.result()


def test_leaving_the_block_ends_the_digests(model: Path) -> None:
    with BackgroundDigests([model] * 50) as digests:
        pass
    assert not digests._thread.is_alive()
