"""The journal of a draft: nothing in it is believed that the draft does not show."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from bake.errors import InputError
from bake.io import journal as module
from bake.io.journal import Journal, Resumed, Span

RUN = {"version": "1", "inputs": {"a": [1, 2]}, "plan": "p", "numbers": None}
CONTENT = bytes(range(200))
SPANS = [Span("", begin, begin + 20) for begin in range(0, 200, 20)]


@pytest.fixture
def output(tmp_path: Path) -> Iterator[int]:
    """A draft that is open."""
    (tmp_path / "draft").write_bytes(CONTENT)
    descriptor = os.open(tmp_path / "draft", os.O_RDWR)
    yield descriptor
    os.close(descriptor)


def written(path: Path) -> Journal:
    """A journal of all spans."""
    journal = Journal(path, RUN)
    journal.start(7)
    for number, span in enumerate(SPANS):
        digest = journal.digest()
        digest.update(memoryview(CONTENT)[span.begin : span.end])
        journal.note(span, digest, (number, 0.5, 0.25, 3))
    return journal


def again(path: Path) -> Journal:
    journal = Journal(path, RUN)
    assert journal.load(7) is None
    return journal


def test_what_was_noted_is_recalled_with_what_was_measured(tmp_path: Path, output: int) -> None:
    written(tmp_path / "journal")
    journal = again(tmp_path / "journal")
    for number, span in enumerate(SPANS):
        assert journal.recall(span, output) == (number, 0.5, 0.25, 3)
    assert journal.recall(Span("", 0, 40), output) is None
    assert journal.resumed(None) == Resumed(200, 10, 0, None)


def test_a_span_that_the_draft_does_not_hold_is_to_be_made(tmp_path: Path, output: int) -> None:
    written(tmp_path / "journal")
    os.pwrite(output, b"x", 25)
    journal = again(tmp_path / "journal")
    assert [span for span in SPANS if journal.recall(span, output) is None] == [SPANS[1]]
    assert journal.resumed(None) == Resumed(180, 9, 1, None)


def test_a_draft_that_cannot_be_read_back_is_to_be_made(
    tmp_path: Path, output: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*arguments: object) -> None:
        raise InputError("a disk")

    written(tmp_path / "journal")
    journal = again(tmp_path / "journal")
    monkeypatch.setattr(module, "read_into", broken)
    assert journal.recall(SPANS[0], output) is None
    assert journal.resumed(None).redone == 1


def test_what_was_copied_is_noted_as_the_draft_holds_it(tmp_path: Path, output: int) -> None:
    journal = Journal(tmp_path / "journal", RUN)
    journal.start(7)
    journal.note_copied(Span("", 10, 130), output)
    line = json.loads((tmp_path / "journal").read_text().splitlines()[1])
    assert line["sha256"] == hashlib.sha256(CONTENT[10:130]).hexdigest()
    assert again(tmp_path / "journal").recall(Span("", 10, 130), output) == ()


@pytest.mark.parametrize("place", [0, 6, 7, 13, 19])
def test_all_of_a_span_is_read_back_however_long_it_is(
    tmp_path: Path, output: int, monkeypatch: pytest.MonkeyPatch, place: int
) -> None:
    monkeypatch.setattr(module, "_READ_BACK", 7)
    written(tmp_path / "journal")
    assert again(tmp_path / "journal").recall(SPANS[2], output) is not None
    os.pwrite(output, b"\xff", SPANS[2].begin + place)
    assert again(tmp_path / "journal").recall(SPANS[2], output) is None


def test_what_was_noted_last_counts(tmp_path: Path, output: int) -> None:
    journal = written(tmp_path / "journal")
    os.pwrite(output, b"x", SPANS[3].begin)
    journal.note(SPANS[3], hashlib.sha256(b"x" + CONTENT[61:80]), (9.0,))
    journal = again(tmp_path / "journal")
    assert journal.recall(SPANS[3], output) == (9.0,)
    assert journal.resumed(None).spans == 1


def test_a_line_that_the_disk_takes_in_pieces_is_whole(
    tmp_path: Path, output: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = os.write
    monkeypatch.setattr(os, "write", lambda descriptor, data: write(descriptor, data[:11]))
    written(tmp_path / "journal")
    journal = again(tmp_path / "journal")
    assert all(journal.recall(span, output) is not None for span in SPANS)


def test_tuples_are_what_they_are_read_back_as(tmp_path: Path) -> None:
    run = RUN | {"inputs": {"a": (1, 2)}}
    Journal(tmp_path / "journal", run).start(7)
    assert Journal(tmp_path / "journal", run).load(7) is None


def test_torn_anywhere_whole_lines_count(tmp_path: Path, output: int) -> None:
    path = tmp_path / "journal"
    written(path)
    whole = path.read_bytes()
    for end in range(whole.index(b"\n"), len(whole)):
        path.write_bytes(whole[:end])
        journal = again(path)
        # A line that is whole but for its line break counts too.
        expected = sum(1 for line in whole[:end].split(b"\n")[1:] if line.endswith(b"}"))
        assert sum(journal.recall(span, output) is not None for span in SPANS) == expected
        journal.note_copied(SPANS[9], output)
        assert again(path).recall(SPANS[9], output) is not None, "a torn line spoils the next"


@pytest.mark.parametrize(
    "line",
    [
        *("", "null", "[]", "{}", "\x00", '{"file": ""}', "[" * 100_000, "9" * 5000),
        '{"file": "", "begin": "0", "end": 20, "sha256": "S", "measured": []}',
        '{"file": 0, "begin": 0, "end": 20, "sha256": "S", "measured": []}',
        '{"file": "", "begin": 0, "end": 20, "sha256": "S", "measured": 1}',
        '{"file": "", "begin": 0, "end": 20, "sha256": "S", "measured": [1, 2]}',
        '{"file": "", "begin": 0, "end": 20, "sha256": "S", "measured": [1.0, NaN]}',
        '{"file": "", "begin": 0, "end": 20, "sha256": "S", "measured": [1e999]}',
        '{"file": "", "begin": 0, "end": 20, "sha256": "S", "measured": [1.0, 1.0, 1.0, 1.0, 1.0]}',
        '{"file": "", "begin": 0, "end": 20, "sha256": "another", "measured": []}',
    ],
    ids=lambda line: line[:60],
)
def test_lines_that_make_no_sense_count_for_nothing(tmp_path: Path, output: int, line: str) -> None:
    journal = Journal(tmp_path / "journal", RUN)
    journal.start(7)
    with (tmp_path / "journal").open("a") as file:
        file.write("\n" + line.replace("S", hashlib.sha256(CONTENT[:20]).hexdigest()))
    assert again(tmp_path / "journal").recall(SPANS[0], output) is None


@pytest.mark.parametrize(
    ("changes", "draft", "reason"),
    [
        ({}, 8, "its journal is that of another draft"),
        ({"version": "2"}, 7, "it is of another version of bake"),
        ({"schema": 0}, 7, "it is of another version of bake"),
        ({"inputs": {"a": [1, 3]}}, 7, "a changed since"),
        ({"inputs": {"b": [1, 2]}}, 7, "the inputs are others"),
        ({"plan": "q"}, 7, "something else was asked for"),
        ({"numbers": {"torch": "3"}}, 7, "may compute other last bits"),
        ({"version": "2", "plan": "q"}, 8, "it is of another version of bake"),
    ],
)
def test_a_journal_of_another_run_says_in_what(
    tmp_path: Path, output: int, changes: dict[str, object], draft: int, reason: str
) -> None:
    written(tmp_path / "journal")
    journal = Journal(tmp_path / "journal", RUN | changes)
    assert reason in str(journal.load(draft))
    assert journal.recall(SPANS[0], output) is None


def test_starting_anew_forgets_what_was_noted(tmp_path: Path) -> None:
    journal = written(tmp_path / "journal")
    assert journal.has_spans
    journal.start(7)
    assert not journal.has_spans


def test_a_link_is_not_written_through(tmp_path: Path, output: int) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    (tmp_path / "journal").symlink_to(tmp_path / "thesis.txt")
    journal = Journal(tmp_path / "journal", RUN)
    with pytest.raises(OSError, match="symbolic link"):
        journal.note_copied(SPANS[0], output)
    journal.start(7)
    assert not (tmp_path / "journal").is_symlink()
    assert (tmp_path / "thesis.txt").read_text() == "years of work"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_copies_of_the_process_count_and_write_together(tmp_path: Path, output: int) -> None:
    written(tmp_path / "journal")
    journal = again(tmp_path / "journal")

    def work(first: int) -> None:
        for number in range(first, 10, 3):
            assert journal.recall(SPANS[number], output) is not None
            journal.note_copied(Span("", number, number + 100), output)

    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=work, args=(first,)) for first in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert [worker.exitcode for worker in workers] == [0, 0, 0]
    assert journal.resumed(None) == Resumed(200, 10, 0, None)
    later = again(tmp_path / "journal")
    assert all(later.recall(Span("", number, number + 100), output) == () for number in range(10))
