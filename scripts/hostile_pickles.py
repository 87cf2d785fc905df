"""Pickles and archives put together by hand, opcode by opcode: nothing here needs torch, and none of it is ever run.

Source of the opcodes: CPython Lib/pickletools.py; of the layouts: PyTorch torch/serialization.py.
"""

from __future__ import annotations

import io
import struct
import zipfile
from collections.abc import Mapping, Sequence

_MAGIC = 0x1950A86A20F9469CFC6C
FALSE, NONE, EMPTY_DICT, EMPTY_LIST = b"\x89", b"N", b"}", b"]"


def text(value: str) -> bytes:
    encoded = value.encode("utf-8", "surrogatepass")
    return b"X" + struct.pack("<I", len(encoded)) + encoded


def number(value: int) -> bytes:
    size = value.bit_length() // 8 + 1
    encoded = value.to_bytes(size, "little", signed=True)
    return (b"\x8a" + bytes([size]) if size < 256 else b"\x8b" + struct.pack("<I", size)) + encoded


def name(module: str, attribute: str) -> bytes:
    return f"c{module}\n{attribute}\n".encode()


def row(*items: bytes) -> bytes:
    return b"(" + b"".join(items) + b"t"


def many(*items: bytes) -> bytes:
    return EMPTY_LIST + b"(" + b"".join(items) + b"e"


def table(entries: Mapping[str, bytes]) -> bytes:
    return pairs(*((text(key), value) for key, value in entries.items()))


def pairs(*entries: tuple[bytes, bytes]) -> bytes:
    return EMPTY_DICT + b"(" + b"".join(key + value for key, value in entries) + b"u"


def call(function: bytes, *arguments: bytes) -> bytes:
    return function + row(*arguments) + b"R"


def storage(key: str = "0", count: int = 4, kind: str = "FloatStorage") -> bytes:
    """A mention of the storage `key`, of so many numbers."""
    return row(text("storage"), name("torch", kind), text(key), text("cpu"), number(count)) + b"Q"


def legacy_storage(key: str = "0", count: int = 4, kind: str = "FloatStorage") -> bytes:
    """The same before torch 1.6."""
    return row(text("storage"), name("torch", kind), text(key), text("cpu"), number(count), NONE) + b"Q"


def tensor(held: bytes, shape: Sequence[int], stride: Sequence[int], offset: int = 0) -> bytes:
    return call(
        name("torch._utils", "_rebuild_tensor_v2"),
        held,
        number(offset),
        row(*map(number, shape)),
        row(*map(number, stride)),
        FALSE,
        call(name("collections", "OrderedDict")),
    )


def pickled(content: bytes) -> bytes:
    return b"\x80\x02" + content + b"."


def archive(
    content: bytes,
    storages: Mapping[str, bytes] | None = None,
    others: Sequence[tuple[str, bytes]] = (),
) -> bytes:
    """A file as torch writes it since 1.6. others: further records."""
    records = [("archive/data.pkl", pickled(content)), ("archive/version", b"3\n")]
    records += [(f"archive/data/{key}", data) for key, data in (storages or {}).items()]
    return zipped([*records, *others])


def zipped(records: Sequence[tuple[str, bytes]], unpacked: int | None = None) -> bytes:
    """A zip archive, with equal bytes on every machine.

    unpacked: what its directory claims the first record to be: deflated, so many bytes when inflated.
    """
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as file:
        for path, data in records:
            record = zipfile.ZipInfo(path)
            record.create_system = 3
            file.writestr(record, data)
        if unpacked is not None:
            file.filelist[0].compress_type, file.filelist[0].file_size = zipfile.ZIP_DEFLATED, unpacked
    return out.getvalue()


def legacy(content: bytes, storages: Mapping[str, bytes] | None = None) -> bytes:
    """A file as torch wrote it from 0.2 to 1.5: float32 storages behind five pickles."""
    storages = storages or {}
    facts = table({"protocol_version": number(1001), "little_endian": b"\x88"})
    heads = (number(_MAGIC), number(1001), facts, content, many(*map(text, storages)))
    data = b"".join(struct.pack("<q", len(values) // 4) + values for values in storages.values())
    return b"".join(map(pickled, heads)) + data


def tar(first_name: bytes, content: bytes) -> bytes:
    """A tar archive with one file, whose name comes first."""
    header = first_name.ljust(100, b"\0") + b"0000644\0" + b"0000000\0" * 2 + b"%011o\0" % len(content)
    header += b"00000000000\0" + b" " * 8 + b"0" + bytes(100) + b"ustar\x0000"
    header = header.ljust(512, b"\0")
    header = header[:148] + b"%06o\0 " % sum(header) + header[156:]
    return header + content.ljust(-(-len(content) // 512) * 512, b"\0") + bytes(1024)
