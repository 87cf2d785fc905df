"""The seams of the loops in C: what they refuse, where they write, when they are used; NumPy writes the same."""

from __future__ import annotations

import os
import shutil
import sysconfig
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from models import SD1_MODULES, kohya_lora, peft_lora, random_arrays
from names import small
from numpy.typing import NDArray
from support import BF16, Arrays, bake, bake_process, random, save, save_torch

from bake.execute import kernels

Given = dict[str, Any]  # the arguments of a loop, in its order
MODULES = {"widen": "compiled", "narrow": "compiled", "settle": "compiled", "add_products": "compiled"}
MODULES |= {"finish": "compiled", "fuse": "products"}
WRITTEN = {
    "widen": ("out",),
    "narrow": ("out",),
    "settle": ("out", "places"),
    "add_products": ("totals", "norms"),
    "finish": ("places", "out"),
    "fuse": ("out", "places", "samples"),
}
ROOMS = {("settle", "places"), ("fuse", "places")}  # may be larger than they have to be
# The largest shapes end in the middle of what is done at a time: vectors, tiles, runs of elements.
SHAPES = ((1, 1), (2, 3), (5, 17), (7, 64), (13, 300))
every_loop = pytest.mark.parametrize("name", MODULES)


def loop(name: str) -> Callable[..., Any]:
    """The loop of this name; skips the test where it was not built."""
    module = getattr(kernels, MODULES[name])
    if module is None:
        pytest.skip("the loops in C were not built")
    found: Callable[..., Any] = getattr(module, name)
    return found


def given(name: str, rows: int = 3, columns: int = 5, rank: int = 4) -> Given:
    """Arguments that fit each other; skips the test where the loop was not built."""
    loop(name)
    size, places = (rows, columns), np.arange(min(2, rows * columns))
    left, right = random(0, rows, rank), random(1, rank, columns).astype(np.float32)
    stored, bits = random(2, *size).astype(np.float16), np.zeros(size, np.uint16)
    tall, wide = np.full((rows, 1), 1e-3, np.float32), np.ones((1, columns), np.float32)
    totals, norms = np.zeros(len(places)), np.zeros(len(places))
    if name == "widen":
        return {"stored": stored, "tag": "F16", "out": np.zeros(size, np.float32)}
    if name == "narrow":
        return {"values": random(3, *size), "tag": "BF16", "out": bits}
    if name == "settle":
        found = {"update": random(3, *size).astype(np.float32), "tall": tall, "wide": wide, "target": "F16"}
        return {"stored": stored, "source": "F16", **found, "out": bits, "places": np.zeros(rows * columns, np.intp)}
    if name == "add_products":
        sums = {"rank": rank, "first": (0, 0), "totals": totals, "norms": norms}
        by_column = np.ascontiguousarray(right.T)
        return {
            "places": places,
            "columns": columns,
            "left": left,
            "right": by_column,
            "tall": tall,
            "wide": wide,
        } | sums
    if name == "finish":
        found = {"places": places, "totals": totals, "norms": norms, "share": 1e-16, "target": "BF16", "out": bits}
        return {"stored": stored, "source": "F16", **found}
    assert kernels.products is not None
    width = kernels.products.WIDTH
    tiles = np.zeros((-(-columns // width), rank, width), np.float32)
    for column in range(columns):
        tiles[column // width, :, column % width] = right[:, column]
    found = {"left": left.astype(np.float32), "right": tiles, "stored": stored, "source": "F16", "tall": tall}
    samples = np.zeros((len(range(1, rows, 2)), columns), np.float32)
    found |= {"wide": wide, "target": "F16", "out": bits, "places": np.zeros(rows * columns, np.intp)}
    return found | {"samples": samples, "sample": 1, "step": 2}


def changed(name: str, change: Callable[[str, Any], Any]) -> list[tuple[str, Given]]:
    """(argument, arguments) with one array after the other replaced by what `change` makes of it."""
    names = [each for each, value in given(name).items() if isinstance(value, np.ndarray)]
    return [(each, given(name) | {each: change(each, given(name)[each])}) for each in names]


class TestRefusals:
    @every_loop
    def test_what_fits_is_done(self, name: str) -> None:
        loop(name)(*given(name).values())

    @every_loop
    @pytest.mark.parametrize("more", [-1, 1])
    def test_arrays_of_the_wrong_size(self, name: str, more: int) -> None:
        for argument, arguments in changed(name, lambda _, array: np.resize(array, array.size + more)):
            if more > 0 and (name, argument) in ROOMS:
                continue
            with pytest.raises(ValueError, match="sizes"):
                loop(name)(*arguments.values())

    @every_loop
    def test_arrays_with_gaps(self, name: str) -> None:
        for _, arguments in changed(name, lambda _, array: np.repeat(array, 2, axis=-1)[..., ::2]):
            with pytest.raises((ValueError, TypeError), match=r"contiguous|read-write"):
                loop(name)(*arguments.values())

    @every_loop
    def test_arrays_that_must_not_be_written(self, name: str) -> None:
        def lock(_: str, array: NDArray[Any]) -> NDArray[Any]:
            array.flags.writeable = False
            return array

        for argument, arguments in changed(name, lock):
            if argument in WRITTEN[name]:
                with pytest.raises((ValueError, TypeError), match=r"read-write|read-only"):
                    loop(name)(*arguments.values())
            else:
                loop(name)(*arguments.values())

    @every_loop
    def test_dtypes_that_it_does_not_know(self, name: str) -> None:
        tags = [each for each, value in given(name).items() if isinstance(value, str)]
        for each in tags:
            for tag in ("F64", "F8_E4M3", "", *(("F32",) if name == "narrow" or each == "target" else ())):
                with pytest.raises(ValueError, match=r"no loop"):
                    loop(name)(*(given(name) | {each: tag}).values())

    @every_loop
    def test_no_arrays_at_all(self, name: str) -> None:
        for _, arguments in changed(name, lambda _, array: 3):
            with pytest.raises(TypeError):
                loop(name)(*arguments.values())

    @pytest.mark.parametrize("place", [-1, 15, -(2**63), 2**63 - 1])
    def test_places_outside_are_not_finished(self, place: int) -> None:
        arguments = given("finish") | {"places": np.array([0, place], np.intp)}
        with pytest.raises(ValueError, match="sizes"):
            loop("finish")(*arguments.values())
        assert not arguments["out"].any()

    @pytest.mark.parametrize("place", [-1, 15, 10**9])
    def test_places_outside_get_no_products(self, place: int) -> None:
        arguments = given("add_products") | {"places": np.array([place, 7], np.intp)}
        loop("add_products")(*arguments.values())
        assert (arguments["totals"] != 0).tolist() == [False, True]
        assert (arguments["norms"] != 0).tolist() == [False, True]

    @pytest.mark.parametrize("changes", [{"columns": 0}, {"columns": -5}, {"rank": 0}, {"rank": -4}])
    def test_counts_that_mean_nothing(self, changes: Given) -> None:
        with pytest.raises(ValueError, match="sizes"):
            loop("add_products")(*(given("add_products") | changes).values())

    @pytest.mark.parametrize("changes", [{"sample": -1}, {"step": 0}, {"step": -1}])
    def test_samples_that_mean_nothing(self, changes: Given) -> None:
        with pytest.raises(ValueError, match="sizes"):
            loop("fuse")(*(given("fuse") | changes).values())


class TestPlaces:
    @pytest.mark.parametrize("shape", SHAPES)
    @every_loop
    def test_nothing_is_written_beside_the_arrays(self, name: str, shape: tuple[int, int]) -> None:
        arguments, around = given(name, *shape, rank=37), {}
        for each in WRITTEN[name]:
            array = arguments[each]
            whole = np.full(array.nbytes + 128, 0xA5, np.uint8)
            arguments[each] = whole[64 : 64 + array.nbytes].view(array.dtype).reshape(array.shape)
            arguments[each][...] = array
            around[each] = whole
        loop(name)(*arguments.values())
        for each, whole in around.items():
            assert set(whole[:64]) | set(whole[-64:]) == {0xA5}, each

    @pytest.mark.parametrize("name", ["widen", "narrow", "settle"])
    def test_empty_arrays(self, name: str) -> None:
        for shape in ((0, 5), (3, 0), (0, 0)):
            assert loop(name)(*given(name, *shape).values()) in (True, 0)

    @pytest.mark.parametrize("name", ["add_products", "finish"])
    def test_no_places(self, name: str) -> None:
        arguments = given(name)
        arguments |= {each: arguments[each][:0] for each in ("places", "totals", "norms")}
        assert loop(name)(*arguments.values()) in (None, 0)

    def test_no_columns_to_fuse(self) -> None:
        assert loop("fuse")(*given("fuse", columns=0).values()) == 0


def test_where_there_is_a_compiler_there_are_the_loops() -> None:
    header = Path(sysconfig.get_path("include")) / "Python.h"
    if os.environ.get("BAKE_KERNELS") == "numpy" or shutil.which("cc") is None or not header.is_file():
        pytest.skip("NumPy was asked for, or nothing is here that compiles")
    # If not: build them with  python setup.py build_ext --inplace  (docs/internals.md).
    assert kernels.compiled is not None
    assert kernels.products is not None


class Counted:
    """Loops that note which of them were called."""

    def __init__(self, loops: Any, called: set[str]) -> None:
        self._loops, self._called = loops, called

    def __getattr__(self, name: str) -> Any:
        self._called.add(name)
        return getattr(self._loops, name)


def chained(shapes: dict[str, tuple[int, ...]]) -> Arrays:
    """A LoHa for the first module, and a DoRA of LoRA factors for the second."""
    (one, target), (other, turned), *_ = SD1_MODULES.items()
    height, width = shapes[target]
    sides = {"w1_a": (height, 2), "w1_b": (2, width), "w2_a": (height, 2), "w2_b": (2, width)}
    arrays = {f"{one}.hada_{side}": random(seed, *sides[side], spread=0.3) for seed, side in enumerate(sides)}
    arrays |= {name: array for name, array in kohya_lora(shapes)[0].items() if name.startswith(other)}
    arrays[f"{other}.dora_scale"] = np.abs(random(9, shapes[turned][0], 1)) + 0.5
    return {name: array.astype(np.float16) for name, array in arrays.items()}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with bases of three dtypes and adapters for them."""
    import torch

    folder, shapes = tmp_path_factory.mktemp("kernels"), small("sd1")
    values = random_arrays(shapes, np.float32)
    save(folder / "fp32", values)
    save(folder / "fp16", random_arrays(shapes))
    is_real = {name: array.dtype == np.float32 for name, array in values.items()}
    tensors = {name: torch.from_numpy(array) for name, array in values.items()}
    halves = {name: tensor.bfloat16() if is_real[name] else tensor for name, tensor in tensors.items()}
    save_torch(folder / BF16, halves)
    save(folder / "lora", kohya_lora(shapes)[0])
    save(folder / "other", kohya_lora(shapes, rank=40, seed=500)[0])  # more than is multiplied at a time
    save(folder / "chained", chained(shapes))
    for path in list(folder.iterdir()):
        path.rename(path.with_suffix(".safetensors"))
    return folder


BAKES: dict[str, tuple[Sequence[str], set[str]]] = {  # what is to be done, and loops that must have been used for it
    "fp16": (("fuse", "fp16", "-l", "lora"), {"fuse"}),
    BF16: (("fuse", BF16, "-l", "lora"), {"fuse"}),
    "fp32 to fp16": (("fuse", "fp32", "-l", "lora", "--dtype", "fp16"), {"fuse"}),
    "large, several LoRAs": (("fuse", "fp16", "-l", "lora:-0.3", "-l", "other:9"), {"fuse", "finish", "add_products"}),
    "LoHa and DoRA": (("fuse", "fp16", "-l", "chained"), {"widen", "narrow"}),
    "LoHa and DoRA in bf16": (("fuse", BF16, "-l", "chained:0.4", "-l", "lora"), {"widen", "narrow"}),
    "merge": (("merge", "weighted_sum", "fp16", "fp32", "-p", "alpha=0.3"), {"widen", "narrow"}),
}


def command(files: Path, words: Sequence[str], output: Path) -> list[str]:
    """The words of a bake, with names of files in the place of their short ones."""
    found: list[str] = []
    for word in words:
        name, *weight = word.split(":")
        path = files / f"{name}.safetensors"
        is_option = bool(found) and found[-1] == "--dtype"
        found.append(":".join([str(path), *weight]) if path.is_file() and not is_option else word)
    return [*found, "--device", "cpu", "-o", str(output)]


@pytest.mark.parametrize("name", BAKES)
def test_numpy_writes_the_same(name: str, files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if kernels.compiled is None:
        pytest.skip("the loops in C were not built")
    words, used = BAKES[name]
    called: set[str] = set()
    if kernels.products is None:
        used = used - {"fuse"} | ({"settle"} if "fuse" in used else set())
    written = []
    for modules in (("compiled", "products"), ("compiled",), ()):
        output = tmp_path / f"{len(modules)}.safetensors"
        with monkeypatch.context() as patch:
            for module in ("compiled", "products"):
                loops = getattr(kernels, module)
                has_them = module in modules and loops is not None
                patch.setattr(kernels, module, Counted(loops, called) if has_them else None)
            done = bake(*command(files, words, output))
        assert done.code == 0, done.err
        assert used <= called
        written.append(output.read_bytes())
    assert written[0] == written[1] == written[2]


@pytest.mark.parametrize("shape", [(0, 5), (5, 0)])
def test_a_tensor_without_elements_gets_no_update(shape: tuple[int, int], tmp_path: Path) -> None:
    tensor = "model.layers.0.self_attn.q_proj.weight"
    base = save(tmp_path / "base.safetensors", {tensor: np.zeros(shape, np.float16)})
    lora = save(tmp_path / "lora.safetensors", peft_lora({tensor: shape}, [tensor]))
    done = bake("fuse", base, "-l", lora, "--device", "cpu", "-o", tmp_path / "out.safetensors")
    assert done.code == 0, done.err


def test_a_variable_leaves_the_loops_out(files: Path, tmp_path: Path) -> None:
    words, _ = BAKES["large, several LoRAs"]
    written = []
    for place, environment in enumerate(({}, {"BAKE_KERNELS": "numpy"})):
        output = tmp_path / f"{place}.safetensors"
        done = bake_process(*command(files, words, output), **environment)
        assert done.code == 0, done.err
        written.append(output.read_bytes())
    assert written[0] == written[1]
    assert bake_process("env", "--json", BAKE_KERNELS="numpy").json["loops"] == "NumPy"
