"""The place of an output: every refusal that can be known before anything is created."""

from __future__ import annotations

import errno
import os
import shutil
import stat
from collections.abc import Iterable
from pathlib import Path

from bake.errors import NoSpace, OutputExists, OutputRefused, SameFile
from bake.io.files import inputs_only
from bake.io.neighbours import neighbour
from bake.sizes import format_bytes

_DRAFT_SUFFIX = ".bake-draft"
_JOURNAL_SUFFIX = ".bake-journal"
_ASIDE_SUFFIX = ".bake-old"
_MODEL_FILES = ("model_index.json", "config.json")


def draft_of(place: Path) -> Path:
    """Where the output at `place` is under construction."""
    return neighbour(place, _DRAFT_SUFFIX)


def journal_of(place: Path) -> Path:
    """Where it is noted what is finished of that draft, if somebody is to go on with it."""
    return place.with_name(f".{place.name}{_JOURNAL_SUFFIX}")


def aside_of(place: Path) -> Path:
    """Where the old folder waits while the new one takes its place, where that takes two steps."""
    return neighbour(place, _ASIDE_SUFFIX)


def refusal_of(error: OSError, place: Path) -> OutputRefused:
    """What an operating system error means for the output at `place`."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        reason = "the disk is full" if error.errno == errno.ENOSPC else "the disk quota is used up"
        return NoSpace(f"{place}: {reason}; nothing was changed", path=str(place))
    where = f" ({error.filename})" if error.filename is not None and str(error.filename) != str(place) else ""
    return OutputRefused(f"{place}: cannot be written: {error.strerror or error}{where}", path=str(place))


def check_target(target: Path, inputs: Iterable[Path], is_folder: bool, overwrite: bool, needed: int) -> Path:
    """The place that is really written (links followed), after every refusal that can be known now.

    needed: bytes of the whole output. Raises OutputRefused and its kin; nothing is created.
    """
    place = Path(os.path.realpath(target))
    try:
        _check_parent(target, place.parent)
        _check_inputs(target, place, inputs)
        if os.path.lexists(place):
            _check_existing(target, place, is_folder, overwrite)
        _check_space(target, place, needed)
    except OSError as error:
        raise refusal_of(error, target) from None
    return place


def is_taken(place: Path) -> bool:
    """True if something is at `place` that would be lost; an empty folder is nothing."""
    return os.path.lexists(place) and not (place.is_dir() and not any(place.iterdir()))


def lies_in(path: Path, folder: Path) -> bool:
    """True if `path` is `folder` or lies inside it, whatever they are called: by links, other case or mounts too."""
    real = Path(os.path.realpath(path))
    return any(each.exists() and each.samefile(folder) for each in (real, *real.parents))


def _check_parent(target: Path, parent: Path) -> None:
    if not parent.is_dir():
        raise OutputRefused(f"{target}: the folder {parent} does not exist", path=str(target))
    if not os.access(parent, os.W_OK | os.X_OK):
        raise OutputRefused(
            f"{target}: no permission to write in {parent}, or its file system is read-only", path=str(target)
        )


def _check_inputs(target: Path, place: Path, inputs: Iterable[Path]) -> None:
    """Raise SameFile if an input is what will be replaced or removed, or lies inside it."""
    names = {place: target, draft_of(place): draft_of(place), aside_of(place): aside_of(place)}
    written = {each: each.stat() for each in names if each.exists()}
    checked: set[Path] = set()  # thousands of shards lie in one folder
    for source in inputs if written else ():
        real = Path(os.path.realpath(source))
        around = {real, *real.parents} - checked
        checked |= around
        with inputs_only():
            read = [path.stat() for path in around if path.exists()]
        for each, status in written.items():
            if any(os.path.samestat(status, other) for other in read):
                raise SameFile(
                    f"{names[each]} is, or contains, the input {source}; choose another output", path=str(target)
                )


def _check_existing(target: Path, place: Path, is_folder: bool, overwrite: bool) -> None:
    if is_folder and not place.is_dir():
        raise OutputRefused(f"{target} is a file; the output of this base is a folder", path=str(target))
    if not is_folder and not place.is_file():
        raise OutputRefused(f"{target} is not a regular file; the output of this base is one", path=str(target))
    if is_folder and os.path.ismount(place):
        raise OutputRefused(f"{target} is where a disk is mounted; choose a folder inside it", path=str(target))
    if _is_protected(place):
        raise OutputRefused(f"{target} belongs to somebody else, and only they may replace it", path=str(target))
    if not overwrite and is_taken(place):
        raise OutputExists(f"{target} exists; use --overwrite to replace it", path=str(target))
    if is_folder and is_taken(place):
        is_model = any((place / name).is_file() for name in _MODEL_FILES) or any(place.glob("*.safetensors"))
        if not is_model:
            raise OutputExists(
                f"{target} is a folder that does not look like a model; bake replaces only models. "
                f"Remove it, or choose another output.",
                path=str(target),
            )


def _is_protected(place: Path) -> bool:
    """True if `place` lies in a folder like /tmp, where everybody may write but replace only what is theirs."""
    if not hasattr(os, "geteuid"):  # Windows
        return False
    folder = place.parent.stat()
    return bool(folder.st_mode & stat.S_ISVTX) and os.geteuid() not in (0, folder.st_uid, place.stat().st_uid)


def _check_space(target: Path, place: Path, needed: int) -> None:
    """Raise NoSpace if the disk has less than `needed` bytes; what a killed run left there will be removed."""
    free = shutil.disk_usage(place.parent).free + _allocated(draft_of(place))
    if needed > free:
        raise NoSpace(
            f"{target}: the output takes {format_bytes(needed)}, {place.parent} has {format_bytes(free)} free",
            needed=needed,
            free=free,
        )


def _allocated(path: Path) -> int:
    """Bytes of disk that a file, or all that is in a folder, takes; 0 if there is none."""
    files = path.rglob("*") if path.is_dir() else [path] if path.is_file() else []
    return sum(getattr(file.lstat(), "st_blocks", 0) * 512 for file in files)
