"""Look for inputs that bake answers with anything but its work or a refusal of its own.

    python scripts/fuzz.py TARGET [--seconds S] [--runs N]     look, guided by the lines that inputs reach
    python scripts/fuzz.py TARGET --minimise                   keep what reaches a line that no other input reaches
    python scripts/fuzz.py TARGET --keep FILE --because TEXT   keep an input that broke the promise

The targets are in scripts/fuzz_targets.py. Looking needs atheris (pip install -e .[fuzz]). It begins with the kept
inputs and the target's seeds, leaves what it learns in build/fuzz/TARGET, to go on from there the next time, writes the
input of every finding beside it, and exits with 1 if there was one. --measure watches the memory of every input.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import hashlib
import json
import random
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
WORK = ROOT / "build" / "fuzz"

_SLOWEST = 10  # seconds for one input
_MEMORY = 2048  # MiB for the process
_RAW = 0.15  # share of mutations of JSON that do not know it is JSON
_NUMBERS = (0, 1, -1, 2, 3, 4, 8, 64, 255, 2**31, 2**53 + 1, 2**63, 2**64, 10**30, 0.5, -1.5, 1e308, float("nan"))
_VALUES: tuple[Any, ...] = (*_NUMBERS, float("inf"), None, True, False, "", "a", "\x1b[2J", "é\u202e", [], {}, [[]])


class JsonMutator:
    """Changes JSON documents in places, with the words that occur in the seeds."""

    def __init__(self, seeds: list[bytes], mutate_bytes: Callable[[bytes, int], bytes]) -> None:
        self._mutate_bytes = mutate_bytes
        words: set[str] = set()
        for seed in seeds:
            with contextlib.suppress(ValueError, RecursionError):
                words |= set(_texts(json.loads(seed)))
        self._words = sorted(words)

    def __call__(self, data: bytes, longest: int, seed: int) -> bytes:
        """Another document; not always one, and never longer than `longest` bytes."""
        chance = random.Random(seed)
        try:
            document = [json.loads(data)]
            if chance.random() < _RAW:
                raise ValueError("as bytes")
            for _ in range(chance.choice((1, 1, 1, 2, 4))):
                self._change(document, chance)
            changed = json.dumps(document[0], separators=(",", ":"), ensure_ascii=chance.random() < 0.1).encode()
        except (ValueError, RecursionError):  # no JSON, or none that UTF-8 can hold
            return self._mutate_bytes(data, longest)
        return changed if len(changed) <= longest else self._mutate_bytes(data, longest)

    def _change(self, document: list[Any], chance: random.Random) -> None:
        places = list(_places(document))
        holder, key = chance.choice(places)
        action = chance.randrange(7)
        if action == 0:
            holder[key] = chance.choice(_VALUES)
        elif action == 1:
            holder[key] = self._near(holder[key], chance)
        elif action == 2:
            other, place = chance.choice(places)
            holder[key] = json.loads(json.dumps(other[place]))  # a copy, so that nothing holds itself
        elif action == 3 and holder is not document:
            del holder[key]
        elif action == 4 and isinstance(holder, dict):
            holder[self._word(key, chance)] = holder.pop(key)
        elif action == 5 and isinstance(holder, dict):
            holder[self._word(key, chance)] = json.loads(json.dumps(holder[key]))
        elif isinstance(holder, list) and holder is not document:
            holder.insert(key, json.loads(json.dumps(chance.choice(holder))))

    def _near(self, value: Any, chance: random.Random) -> Any:
        if isinstance(value, bool):
            return not value
        if isinstance(value, (int, float)):
            return chance.choice((value + 1, value - 1, -value, value * 2, value // 2, str(value), [value], *_NUMBERS))
        if isinstance(value, str):
            return self._word(value, chance)
        return chance.choice(([value], {"a": value}, str(value), list(value or ())))

    def _word(self, text: str, chance: random.Random) -> str:
        cut, other = chance.randrange(len(text) + 1), chance.choice(self._words or [""])
        return chance.choice((other, text[:cut] + other, other + text[cut:], text[:cut] + text[cut + 1 :], text * 2))


def _places(holder: Any) -> Iterator[tuple[Any, Any]]:
    """(container, key or number) of every value inside."""
    for key in holder if isinstance(holder, dict) else range(len(holder)):
        yield holder, key
        if isinstance(holder[key], (dict, list)):
            yield from _places(holder[key])


def _texts(value: Any) -> Iterator[str]:
    for holder, key in _places([value]):
        yield from (text for text in (key, holder[key]) if isinstance(text, str))


class Findings:
    """Gives inputs to a target and notes the first that breaks the promise at each place; the search goes on."""

    def __init__(self, enter: Callable[[bytes], Any], folder: Path, work: Path, measure: bool) -> None:
        self._enter, self._folder, self._work, self._measure = enter, folder, work, measure
        self._places: set[tuple[str, str, int]] = set()

    def attempt(self, data: bytes) -> None:
        from fuzz_targets import attempt

        try:
            attempt(self._enter, data, self._folder, self._measure)
        except Exception as error:
            frames = traceback.extract_tb(error.__traceback__)
            last = next((frame for frame in reversed(frames) if f"{ROOT}/bake/" in frame.filename), frames[-1])
            place = (type(error).__name__, last.filename, last.lineno or 0)
            if place not in self._places:
                self._places.add(place)
                path = self._work.with_name(f"{self._work.name}-finding-{len(self._places)}")
                path.write_bytes(data)
                print(f"FINDING {path}: {place}: {error}"[:1000], file=sys.stderr)


def look(name: str) -> None:
    """Run this script again as a process for libFuzzer; exit with 1 if there was a finding."""
    for old in WORK.glob(f"{name}-finding-*"):
        old.unlink()
    with tempfile.TemporaryDirectory(prefix="bake-fuzz-") as folder:
        subprocess.run([sys.executable, *sys.argv, "--inside", folder], check=False)
    sys.exit(1 if any(WORK.glob(f"{name}-finding-*")) else 0)


def run_libfuzzer(name: str, folder: Path, seconds: int | None, runs: int | None, measure: bool) -> None:
    """Look for findings, the target's files in `folder`; libFuzzer ends the process without a word to Python."""
    import atheris

    with atheris.instrument_imports(include=["bake", "torch._weights_only_unpickler"]):
        from fuzz_targets import LONGEST, TARGETS, read_corpus
    target = TARGETS[name]
    work = WORK / name
    work.mkdir(parents=True, exist_ok=True)
    seeds = [*target.seeds(), *(kept.data for kept in read_corpus(name))]
    for seed in seeds:
        (work / hashlib.sha256(seed).hexdigest()[:20]).write_bytes(seed)
    findings = Findings(target.prepare(folder), folder, WORK / name, measure)
    options = {
        "max_len": LONGEST,
        "timeout": _SLOWEST,
        "rss_limit_mb": _MEMORY,
        "artifact_prefix": f"{WORK}/{name}-finding-",
    }
    options |= {key: value for key, value in (("max_total_time", seconds), ("runs", runs)) if value is not None}
    words = [sys.argv[0], *(f"-{key}={value}" for key, value in options.items()), str(work)]
    # atheris replaces its functions when it starts, so Mutate is looked up when it is called.
    changing = JsonMutator(seeds, lambda data, longest: atheris.Mutate(data, longest))
    mutator = {"custom_mutator": changing} if target.is_json else {}
    atheris.Setup(words, findings.attempt, **mutator)
    atheris.Fuzz()


def minimise(name: str) -> None:
    """Rewrite the kept inputs of a target: all findings, and the smallest that together reach what all of them do."""
    from fuzz_targets import LONGEST, TARGETS, Kept, attempt, read_corpus, write_corpus

    target = TARGETS[name]
    known = [kept for kept in read_corpus(name) if kept.finding]
    found = {path.read_bytes() for path in (WORK / name).glob("*")} | {kept.data for kept in read_corpus(name)}
    found |= set(target.seeds())
    candidates = sorted((data for data in found if len(data) <= LONGEST), key=lambda data: (len(data), data))
    seen: set[tuple[str, int, int]] = set()
    with tempfile.TemporaryDirectory(prefix="bake-fuzz-") as place:
        enter = target.prepare(Path(place))
        for kept in known:
            seen |= _steps(functools.partial(attempt, enter, kept.data, Path(place)))
        chosen = []
        for data in candidates:
            steps = _steps(functools.partial(attempt, enter, data, Path(place)))
            if not steps <= seen:
                seen |= steps
                chosen.append(Kept(data))
    write_corpus(name, [*known, *chosen])
    print(f"{name}: {len(known)} findings, {len(chosen)} of {len(candidates)} inputs, {len(seen)} steps")


def _steps(run: Callable[[], None]) -> set[tuple[str, int, int]]:
    """The steps from line to line (file, from, to) that bake takes in `run`."""
    package = str(ROOT / "bake")
    steps: set[tuple[str, int, int]] = set()

    def trace(frame: FrameType, event: str, argument: Any) -> Any:
        if not frame.f_code.co_filename.startswith(package):
            return None
        before = frame.f_code.co_firstlineno

        def step(frame: FrameType, event: str, argument: Any) -> Any:
            nonlocal before
            if event == "line":
                steps.add((frame.f_code.co_filename, before, frame.f_lineno))
                before = frame.f_lineno
            return step

        return step

    sys.settrace(trace)
    try:
        run()
    finally:
        sys.settrace(None)
    return steps


def keep(name: str, path: Path, because: str) -> None:
    """Add an input to the kept ones of a target."""
    from fuzz_targets import Kept, read_corpus, write_corpus

    write_corpus(name, [*read_corpus(name), Kept(path.read_bytes(), because)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("target", help="one of the names in TARGETS of scripts/fuzz_targets.py")
    parser.add_argument("--seconds", type=int, metavar="S", help="how long to look")
    parser.add_argument("--runs", type=int, metavar="N", help="how many inputs to try")
    parser.add_argument("--measure", action="store_true", help="watch the memory of every input too")
    parser.add_argument("--minimise", action="store_true", help="rewrite the kept inputs")
    parser.add_argument("--keep", type=Path, metavar="FILE", help="an input that broke the promise")
    parser.add_argument("--because", metavar="TEXT", default="", help="what bake did with it")
    parser.add_argument("--inside", type=Path, help=argparse.SUPPRESS)  # the process that `look` starts
    arguments = parser.parse_args()
    if arguments.inside is not None:
        run_libfuzzer(arguments.target, arguments.inside, arguments.seconds, arguments.runs, arguments.measure)
    elif arguments.minimise:
        minimise(arguments.target)
    elif arguments.keep is not None:
        keep(arguments.target, arguments.keep, arguments.because)
    else:
        look(arguments.target)


if __name__ == "__main__":
    main()
