"""Every entrance keeps its promise: with the inputs that fuzzing found worth keeping, and with arbitrary documents."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import fuzz_targets
import pytest
from fuzz_targets import CORPUS, LONGEST, TARGETS, Enter, attempt, read_corpus
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from strategies import documents, spoiled

from bake.errors import BakeError, HeaderError


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("XDG_CACHE_HOME", "LOCALAPPDATA"):
        monkeypatch.setenv(name, str(tmp_path / "cache"))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "target").mkdir()
    return tmp_path / "target"


@pytest.mark.parametrize("name", TARGETS)
def test_what_was_found_stays_mended(name: str, folder: Path) -> None:
    enter = TARGETS[name].prepare(folder)
    *most, largest = read_corpus(name)
    for kept in most:
        attempt(enter, kept.data, folder)
    attempt(enter, largest.data, folder, measure=True)


@pytest.mark.parametrize("name", [name for name, target in TARGETS.items() if target.is_json])
def test_arbitrary_documents_are_read_or_refused(name: str, folder: Path) -> None:
    enter = TARGETS[name].prepare(folder)
    seeds = [document for seed in TARGETS[name].seeds() for document in _parsed(seed)]

    @settings(max_examples=25, suppress_health_check=[HealthCheck.too_slow])
    @given(st.one_of(documents, st.sampled_from(seeds).flatmap(spoiled)))
    def check(document: object) -> None:
        attempt(enter, json.dumps(document).encode(), folder)

    check()


def _parsed(seed: bytes) -> Iterator[object]:
    if len(seed) < LONGEST // 2:
        yield json.loads(seed)


@pytest.mark.parametrize("name", [name for name, target in TARGETS.items() if not target.is_json])
def test_arbitrary_bytes_are_read_or_refused(name: str, folder: Path) -> None:
    enter = TARGETS[name].prepare(folder)

    @settings(max_examples=25, suppress_health_check=[HealthCheck.too_slow])
    @given(st.binary(max_size=200))
    def check(data: bytes) -> None:
        attempt(enter, data, folder)

    check()


WORDS = st.text(st.sampled_from(":=.0159-einfatudylb/\\ \u00e9\udcff"), max_size=30)


def test_arbitrary_words_are_read_or_refused(folder: Path) -> None:
    enter = TARGETS["words"].prepare(folder)

    @given(WORDS)
    def check(word: str) -> None:
        attempt(enter, word.encode("utf-8", "surrogateescape"), folder)

    check()


class TestTheJudge:
    """A judge that lets everything pass would prove nothing."""

    def promise(self, act: object, folder: Path, measure: bool = False) -> None:
        enter: Enter = lambda data: [act]  # type: ignore[list-item]  # noqa: E731
        attempt(enter, b"", folder, measure)

    def test_a_refusal_is_fine(self, folder: Path) -> None:
        def refuse() -> None:
            raise HeaderError("no header", path="x")

        self.promise(refuse, folder)

    @pytest.mark.parametrize("error", [KeyError("x"), BakeError("a bug"), RecursionError(), MemoryError()])
    def test_other_errors_are_findings(self, folder: Path, error: Exception) -> None:
        def fail() -> None:
            raise error

        with pytest.raises(type(error)):
            self.promise(fail, folder)

    def test_a_written_file_is_a_finding(self, folder: Path) -> None:
        for write in (
            lambda: (folder / "x").write_text("x"),
            lambda: (folder / "y").mkdir(),
            lambda: (folder / "z").unlink(missing_ok=True),
        ):
            with pytest.raises(fuzz_targets.Broken):
                self.promise(write, folder)
        assert not any(folder.iterdir())

    def test_too_much_memory_is_a_finding(self, folder: Path) -> None:
        with pytest.raises(fuzz_targets.Broken, match="allocated"):
            self.promise(lambda: bytes(64 * 2**20), folder, measure=True)


def test_the_corpus_is_small_and_each_input_is_kept_once() -> None:
    files = sorted(CORPUS.glob("*.jsonl"))
    assert {path.stem for path in files} == set(TARGETS)
    assert sum(path.stat().st_size for path in files) < 300_000
    for name in TARGETS:
        inputs = [kept.data for kept in read_corpus(name)]
        assert len(set(inputs)) == len(inputs)
        assert max(map(len, inputs)) <= LONGEST
