"""Compression of short pieces. Unpacking never gives, nor takes memory for, more than was announced."""

from __future__ import annotations

import importlib.util
import zlib

from bake.errors import Unsupported

ZLIB, ZSTD = "zlib", "zstd"
PACKINGS = (ZLIB, ZSTD)
_ZLIB_LEVEL, _ZLIB_BITS, _ZLIB_MEMORY = 1, 15, 9
_ZSTD_LEVEL = 1


def best_packing() -> str:
    """zstd where its library is installed, which is several times faster; else zlib."""
    return ZLIB if importlib.util.find_spec("zstandard") is None else ZSTD


def check_packing(packing: str, path: object) -> None:
    """Raise Unsupported if what `path` is packed with is not installed."""
    if packing == ZSTD and importlib.util.find_spec("zstandard") is None:
        raise Unsupported(
            f"{path} is packed with zstd, which is not installed here: pip install zstandard", path=str(path)
        )


def packed(data: bytes, packing: str) -> bytes:
    """`data`, compressed. Of a difference that is nearly all there is to gain: runs, and bytes that are frequent."""
    if packing == ZSTD:
        import zstandard

        made: bytes = zstandard.ZstdCompressor(level=_ZSTD_LEVEL).compress(data)
        return made
    stream = zlib.compressobj(_ZLIB_LEVEL, zlib.DEFLATED, _ZLIB_BITS, _ZLIB_MEMORY, zlib.Z_RLE)
    return stream.compress(data) + stream.flush()


def unpacked(data: bytes, size: int, packing: str) -> bytes:
    """The `size` bytes that `data` was made of; raises ValueError if it was made of anything else."""
    return _unpacked_zstd(data, size) if packing == ZSTD else _unpacked_zlib(data, size)


def _unpacked_zlib(data: bytes, size: int) -> bytes:
    stream = zlib.decompressobj()
    try:
        found = stream.decompress(data, size + 1)
    except zlib.error as error:
        raise ValueError(str(error)) from None
    if len(found) != size or not stream.eof or stream.unused_data:
        raise ValueError(f"it does not hold {size} bytes")
    return found


def _unpacked_zstd(data: bytes, size: int) -> bytes:
    import zstandard

    try:
        if zstandard.frame_content_size(data) != size:  # which is what would be allocated
            raise ValueError(f"it does not hold {size} bytes")
        found: bytes = zstandard.ZstdDecompressor().decompress(data, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise ValueError(str(error)) from None
    return found
