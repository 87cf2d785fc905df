"""Digests of files that were digested before: a base that is used again need not be read again for them.

A digest is believed while the file's size, its place on the disk and both of its times are what they were.
The system sets the time of the last change itself; no program can put it back.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

_KEPT = 1000  # files
_SETTLED = 5_000_000_000  # nanoseconds: a file changed so recently may change again without its times showing it


@dataclass(frozen=True, slots=True)
class Digest:
    """What identifies a file's bytes."""

    sha256: str  # of the whole file, 64 hexadecimal digits; the first 10 are A1111's short hash, AutoV2
    legacy: str  # 8 digits, over 64 KiB only: A1111's first model hash, AutoV1


def recall(path: Path, status: os.stat_result) -> Digest | None:
    """The digest of the file that `status` is of, if it is known."""
    entry = _read().get(os.path.realpath(path))
    if not isinstance(entry, dict) or entry.get("state") != _state(status):
        return None
    sha256, legacy = entry.get("sha256"), entry.get("legacy")
    if isinstance(sha256, str) and isinstance(legacy, str) and len(sha256) == 64 and len(legacy) == 8:
        return Digest(sha256, legacy)
    return None


def remember(path: Path, status: os.stat_result, digest: Digest) -> None:
    """Note the digest of a file for later; status: from before its bytes were read.

    Nobody is told where that is not possible: it is only slower the next time.
    """
    if time.time_ns() - max(status.st_mtime_ns, status.st_ctime_ns) < _SETTLED:
        return
    known = _read()
    known.pop(os.path.realpath(path), None)
    known[os.path.realpath(path)] = {"state": _state(status), **asdict(digest)}
    place = _place()
    draft = place.with_name(f"{place.name}.{os.getpid()}")
    with contextlib.suppress(OSError):
        place.parent.mkdir(parents=True, exist_ok=True)
        draft.write_text(json.dumps(dict(list(known.items())[-_KEPT:])), encoding="utf-8")
        os.replace(draft, place)


def _state(status: os.stat_result) -> list[int]:
    return [status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_dev, status.st_ino]


def _read() -> dict[str, Any]:
    try:
        known = json.loads(_place().read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return known if isinstance(known, dict) else {}


def _place() -> Path:
    """The file with what is known, in the user's folder for such things."""
    if sys.platform == "win32":
        folder, default = "LOCALAPPDATA", "~/AppData/Local"
    elif sys.platform == "darwin":
        folder, default = "XDG_CACHE_HOME", "~/Library/Caches"
    else:
        folder, default = "XDG_CACHE_HOME", "~/.cache"
    return Path(os.environ.get(folder) or os.path.expanduser(default)) / "bake" / "digests.json"
