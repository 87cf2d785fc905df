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

_KEPT = 10_000  # files; the largest models have hundreds of shards
_SETTLED = 5_000_000_000  # nanoseconds: a file changed so recently may change again without its times showing it


@dataclass(frozen=True, slots=True)
class Digest:
    """What identifies a file's bytes."""

    sha256: str  # of the whole file, 64 hexadecimal digits; the first 10 are A1111's short hash, AutoV2
    legacy: str  # 8 digits, over 64 KiB only: A1111's first model hash, AutoV1


class Known:
    """What is known, read once for any number of files; `save` adds what was noted since."""

    def __init__(self) -> None:
        self._entries = _read()
        self._noted: dict[str, Any] = {}

    def recall(self, path: Path, status: os.stat_result) -> Digest | None:
        """The digest of the file that `status` is of, if it is known."""
        entry = self._entries.get(os.path.realpath(path))
        if not isinstance(entry, dict) or entry.get("state") != _state(status):
            return None
        sha256, legacy = entry.get("sha256"), entry.get("legacy")
        if isinstance(sha256, str) and isinstance(legacy, str) and len(sha256) == 64 and len(legacy) == 8:
            return Digest(sha256, legacy)
        return None

    def note(self, path: Path, status: os.stat_result, digest: Digest) -> None:
        """Keep the digest of a file for later, unless it changed a moment ago; status: from before it was read."""
        if time.time_ns() - max(status.st_mtime_ns, status.st_ctime_ns) >= _SETTLED:
            self._noted[os.path.realpath(path)] = {"state": _state(status), **asdict(digest)}

    def save(self) -> None:
        """Write down what was noted, beside what other processes wrote in the meantime.

        Nobody is told where that is not possible: it is only slower the next time.
        """
        if not self._noted:
            return
        entries = {path: entry for path, entry in _read().items() if path not in self._noted} | self._noted
        place = _place()
        draft = place.with_name(f"{place.name}.{os.getpid()}")
        with contextlib.suppress(OSError):
            place.parent.mkdir(parents=True, exist_ok=True)
            draft.write_text(json.dumps(dict(list(entries.items())[-_KEPT:])), encoding="utf-8")
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
