"""Names, shapes, dtypes and untouched bytes of an output against the plan and the base."""

from __future__ import annotations

import hashlib

from bake.io.fileset import FileSet
from bake.io.tensorfile import TensorFile
from bake.plan.model import FilePlan, TensorPlan
from bake.verify.report import Report

_PIECE = 4 * 1024 * 1024
_SAMPLE = 4096


def check_structure(file: FilePlan, output: TensorFile, report: Report) -> bool:
    """Note every departure of `output` from what was planned; True if its tensors can be compared.

    The reference reader, the safetensors library, must open it too and see the same names.
    """
    from safetensors import SafetensorError, safe_open  # here, so that planning starts without it

    planned = {tensor.name: tensor for tensor in file.tensors}
    try:
        with safe_open(output.path, "np") as reference:
            if set(reference.keys()) != output.tensors.keys():
                report.add(f"{output.path}: the safetensors library sees other tensors in it")
    except SafetensorError as error:
        report.add(f"{output.path}: the safetensors library refuses it: {error}")
    for name in planned.keys() - output.tensors.keys():
        report.add(f"{output.path}: the tensor {name} is missing")
    for name in output.tensors.keys() - planned.keys():
        report.add(f"{output.path}: the tensor {name} should not be there")
    for name in planned.keys() & output.tensors.keys():
        found, due = output.tensors[name], planned[name]
        if (found.dtype, found.shape) != (due.dtype, due.shape):
            report.add(
                f"{output.path}: {name} is {found.dtype} {list(found.shape)}, {due.dtype} {list(due.shape)} was planned"
            )
    return report.ok


def check_untouched(tensor: TensorPlan, output: TensorFile, files: FileSet, full: bool, report: Report) -> None:
    """Compare an untouched tensor with the base: all its bytes, or the first block and one chosen by its name."""
    begin = output.tensors[tensor.name].begin
    report.untouched_tensors += 1
    for stored in tensor.copied:
        size = stored.span[1] - stored.span[0]
        with files.using(stored.input) as base:
            for offset, count in _everything(size) if full else _samples(tensor.name, size):
                report.untouched_bytes += count
                if _read(base, stored.span[0] + offset, count) != _read(output, begin + offset, count):
                    report.untouched_identical = False
                    report.add(f"{output.path}: {tensor.name} should equal the base, but its bytes differ")
                    return
        begin += size


def check_content(tensor: TensorPlan, output: TensorFile, report: Report) -> None:
    """Compare a tensor that the plan itself holds."""
    info = output.tensors[tensor.name]
    if _read(output, info.begin, info.nbytes) != str(tensor.content).encode():
        report.add(f"{output.path}: {tensor.name} does not say {tensor.content!r}")


def _everything(size: int) -> list[tuple[int, int]]:
    return [(offset, min(_PIECE, size - offset)) for offset in range(0, size, _PIECE)]


def _samples(name: str, size: int) -> list[tuple[int, int]]:
    if size <= 2 * _SAMPLE:
        return [(0, size)]
    chosen = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little") % (size - _SAMPLE)
    return [(0, _SAMPLE), (chosen, _SAMPLE)]


def _read(file: TensorFile, begin: int, count: int) -> bytes:
    buffer = bytearray(count)
    file.read_into(begin, memoryview(buffer))
    return bytes(buffer)
