"""AUTOMATIC1111's `<lora:name:weight>` tags, and finding the files they mean.

Source: AUTOMATIC1111 modules/extra_networks.py and extensions-builtin/Lora/extra_networks_lora.py; for block weights
sd-webui-lora-block-weight scripts/lora_block_weight.py loradealer.
"""

from __future__ import annotations

import difflib
import math
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from bake.errors import AdapterNotFound, BakeError, Unsupported, UsageError
from bake.io.tensorfile import open_tensors
from bake.plan.presets import PRESETS
from bake.plan.recipe import AdapterChoice
from bake.plan.selection import Selection

_TAG = re.compile(r"<(\w+):([^>]+)>")
_LORA_KINDS = ("lora", "lyco")
_SUFFIXES = (".safetensors", ".pt", ".ckpt")
_BLOCK_WEIGHTS = ("lbw", "w")  # sd-webui-lora-block-weight knows both
STEPS = ("start", "stop", "step")
_KNOWN = ("te", "unet", "dyn", *_BLOCK_WEIGHTS, "lbwe", "blocks")
_MOST_SUGGESTIONS = 3


@dataclass(frozen=True, slots=True)
class Tag:
    """One LoRA tag."""

    name: str
    te: float
    unet: float
    rank_limit: int | None
    selection: Selection | None  # block weights
    text: str  # as written


@dataclass(frozen=True, slots=True)
class Prompt:
    """A prompt taken apart."""

    tags: tuple[Tag, ...]
    rest: str  # without the LoRA tags
    others: tuple[str, ...]  # tags of other kinds, left in `rest`


def parse_prompt(text: str) -> Prompt:
    """The LoRA tags of `text` and what is left without them.

    Raises UsageError for a malformed tag, Unsupported for what cannot be baked.
    """
    tags: list[Tag] = []
    others: list[str] = []

    def take(found: re.Match[str]) -> str:
        if found[1] not in _LORA_KINDS:
            others.append(found[0])
            return found[0]
        tags.append(_parse_tag(found[0], found[2]))
        return ""

    rest = _TAG.sub(take, text)
    return Prompt(tuple(tags), _tidy(rest), tuple(others))


def _tidy(text: str) -> str:
    """The text without the gaps that removed tags leave between commas and words."""
    return re.sub(r" {2,}", " ", re.sub(r",(?:\s*,)+", ",", text)).strip(" ,\n")


def _parse_tag(text: str, inside: str) -> Tag:
    """name, te, unet, dyn by position or by name; unet is te where it is not given."""
    positional: list[str] = []
    named: dict[str, str] = {}
    for item in inside.split(":"):
        key, equals, value = item.partition("=")
        if equals and "=" not in value:
            named[key.strip()] = value
        else:
            positional.append(item)
    for key in named:
        if key in STEPS:
            raise Unsupported(f"{text}: {key}= switches a LoRA during sampling, which a fused checkpoint cannot do")
        if key == "x":
            raise Unsupported(f"{text}: x= is for plots of block weights; write the values into lbw= themselves")
        if key not in _KNOWN:
            raise UsageError(f"{text}: unknown setting {key}=; known are {', '.join(_KNOWN)}")
    if not positional:
        raise UsageError(f"{text}: no name in it")
    if len(positional) > 4:
        raise UsageError(f"{text}: too many parts; it is <lora:name:te:unet:dyn>")
    numbers = [*positional[1:], *[""] * (4 - len(positional))]
    te = _number(text, named.get("te", numbers[0] or "1"))
    unet = _number(text, named["unet"]) if "unet" in named else _number(text, numbers[1]) if numbers[1] else te
    limit = named.get("dyn", numbers[2])
    return Tag(positional[0], te, unet, _whole(text, limit) if limit else None, _selection(text, named), text)


def _selection(tag: str, named: dict[str, str]) -> Selection | None:
    """What lbw= (or w=), lbwe= and blocks= say; None where there is none of them."""
    given = [named[key] for key in _BLOCK_WEIGHTS if key in named]
    if len(given) > 1:
        raise UsageError(f"{tag}: lbw= and w= are the same; give one of them")
    if not given and "lbwe" not in named:
        if "blocks" in named:
            raise UsageError(f"{tag}: blocks= says how lbw= is read, and there is no lbw=")
        return None
    try:
        return Selection.parse("".join(given), rules=named.get("lbwe", ""), scheme=named.get("blocks", "bake"))
    except UsageError as error:
        raise UsageError(f"{tag}: {error.message}") from None


def _number(tag: str, text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        hint = f"; block weights are written lbw={text}" if text in PRESETS or "," in text else ""
        raise UsageError(f"{tag}: {text!r} is not a number{hint}") from None
    if not math.isfinite(value):
        raise UsageError(f"{tag}: {text!r} is not a finite number")
    return value


def _whole(tag: str, text: str) -> int:
    try:
        ranks = int(text)
    except ValueError:
        ranks = 0
    if ranks < 1:
        raise UsageError(f"{tag}: dyn must be a whole number of ranks, at least 1, not {text!r}")
    return ranks


class LoraFolder:
    """The LoRA files below one folder, found by the names that prompts use."""

    def __init__(self, folder: Path) -> None:
        """List the files; none is opened. Raises UsageError if `folder` is none."""
        if not folder.is_dir():
            raise UsageError(f"--lora-dir {folder}: there is no such folder")
        self.folder = folder
        self._files = list(_files_below(folder))
        self._aliases: dict[str, list[Path]] | None = None

    def find(self, name: str) -> Path:
        """The one file called `name`: by its stem, else by the ss_output_name inside, else ignoring case.

        Only names of files in the folder are ever compared, so no name leads out of it.
        Raises AdapterNotFound, with the nearest names or the candidates.
        """
        for candidates in self._candidates(name):
            if len(candidates) == 1:
                return candidates[0]
            if candidates:
                raise AdapterNotFound(
                    f"{name!r} is ambiguous in {self.folder}: {self._listed(candidates)}. Rename one of them, "
                    f"or name the file with -l.",
                    name=name,
                    candidates=[str(path) for path in candidates],
                )
        known = sorted({path.stem for path in self._files} | self._by_alias().keys())
        nearest = _nearest(name.strip(), known)
        hint = f" Did you mean {' or '.join(map(repr, nearest))}?" if nearest else ""
        raise AdapterNotFound(
            f"no LoRA called {name!r} below {self.folder} ({len(self._files)} files).{hint}",
            name=name,
            nearest=nearest,
        )

    def _candidates(self, name: str) -> Iterator[list[Path]]:
        """What `name` may mean, the surest reading first."""
        for wanted in dict.fromkeys((name, name.strip())):
            yield [path for path in self._files if wanted in self._names(path)]
            yield self._by_alias().get(wanted, [])
            lower = wanted.lower()
            yield [path for path in self._files if lower in (own.lower() for own in self._names(path))]

    def _names(self, path: Path) -> tuple[str, str]:
        """The stem, and the path below the folder without suffix."""
        return path.stem, path.relative_to(self.folder).with_suffix("").as_posix()

    def _by_alias(self) -> dict[str, list[Path]]:
        """ss_output_name -> files; headers are read when a name first has no file."""
        if self._aliases is None:
            self._aliases = {}
            for path in self._files:
                if path.suffix == ".safetensors":
                    try:
                        alias = open_tensors(path).metadata.get("ss_output_name")
                    except BakeError:
                        continue  # a damaged file cannot be found by its alias, only by its name
                    if alias:
                        self._aliases.setdefault(alias, []).append(path)
        return self._aliases

    def _listed(self, paths: Iterable[Path]) -> str:
        return ", ".join(str(path.relative_to(self.folder)) for path in paths)


def _nearest(name: str, known: list[str]) -> list[str]:
    lower = {candidate.lower(): candidate for candidate in known}
    close = difflib.get_close_matches(name.lower(), list(lower), n=_MOST_SUGGESTIONS, cutoff=0.5)
    return [lower[candidate] for candidate in close]


def _files_below(folder: Path) -> Iterable[Path]:
    """LoRA files in the folder and its sub-folders, links followed once."""
    visited: set[str] = set()
    for parent, folders, names in os.walk(folder, followlinks=True):
        real = os.path.realpath(parent)
        if real in visited:
            folders.clear()
            continue
        visited.add(real)
        folders.sort()
        yield from (Path(parent) / name for name in sorted(names) if Path(name).suffix in _SUFFIXES)


def choices_from_prompt(prompt: Prompt, folder: LoraFolder) -> tuple[AdapterChoice, ...]:
    """The adapters that the prompt's tags mean, in its order; a LoRA named twice adds up."""
    return tuple(
        AdapterChoice(
            folder.find(tag.name),
            tag.te,
            unet=None if tag.unet == tag.te else tag.unet,
            rank_limit=tag.rank_limit,
            selection=tag.selection,
        )
        for tag in prompt.tags
    )


def adapters_from_prompt(text: str, folder: LoraFolder) -> tuple[tuple[AdapterChoice, ...], tuple[str, ...]]:
    """The adapters that a prompt means, and what is worth a warning about it. Raises as `parse_prompt` and `find`."""
    prompt = parse_prompt(text)
    names = [tag.name for tag in prompt.tags]
    notes = [
        f"{name} is in the prompt {names.count(name)} times; its weights are added up"
        for name in sorted({name for name in names if names.count(name) > 1})
    ]
    notes += [f"{other} is not a LoRA tag; it stays in the prompt" for other in prompt.others]
    return choices_from_prompt(prompt, folder), tuple(notes)
