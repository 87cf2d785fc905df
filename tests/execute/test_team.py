"""Threads that share one fate."""

from __future__ import annotations

import threading
import time

import pytest

from bake.execute.team import Stopped, Team


def test_the_first_failure_stops_everybody_and_is_the_one_raised() -> None:
    team = Team()

    def fail() -> None:
        time.sleep(0.05)
        raise ZeroDivisionError("first")

    def busy() -> None:
        while True:
            team.check()
            time.sleep(0.001)

    team.start("busy", busy)
    team.start("failing", fail)
    with pytest.raises(ZeroDivisionError, match="first"):
        team.join()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("bake")]


def test_a_team_without_failures_ends_quietly() -> None:
    team, done = Team(), []
    for number in range(3):
        team.start(str(number), lambda number=number: done.append(number))
    team.join()
    assert sorted(done) == [0, 1, 2]


def test_a_team_that_failed_before_it_had_a_thread_stops_them_too() -> None:
    team = Team()
    team.stop(ZeroDivisionError("early"))
    with pytest.raises(Stopped):
        team.check()
    with pytest.raises(ZeroDivisionError):
        team.join()
