"""Threads that share one fate."""

from __future__ import annotations

import threading
import time

import pytest

from bake.execute.team import Channel, Closed, Team


def test_items_come_out_in_order_and_a_full_channel_waits() -> None:
    channel: Channel[int] = Channel(2)
    got: list[int] = []

    def read() -> None:
        try:
            while True:
                got.append(channel.get())
        except Closed:
            pass

    reader = threading.Thread(target=read)
    reader.start()
    for number in range(50):
        channel.put(number)
    channel.close()
    reader.join()
    assert got == list(range(50))


def test_a_closed_channel_gives_what_was_put_before_unless_told_to_discard() -> None:
    channel: Channel[int] = Channel(2)
    channel.put(1)
    channel.close()
    assert channel.get() == 1
    with pytest.raises(Closed):
        channel.get()
    with pytest.raises(Closed):
        channel.put(2)
    other: Channel[int] = Channel(2)
    other.put(1)
    other.close(discard=True)
    with pytest.raises(Closed):
        other.get()


def test_the_first_failure_stops_everybody_and_is_the_one_raised() -> None:
    team = Team()
    channel: Channel[int] = team.add_channel(Channel(1))

    def fail() -> None:
        time.sleep(0.05)
        raise ZeroDivisionError("first")

    def busy() -> None:
        while True:
            team.check()
            time.sleep(0.001)

    team.start("reader", lambda: [channel.get() for _ in range(9)] and None)
    team.start("other reader", lambda: [channel.get() for _ in range(9)] and None)
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


def test_a_channel_that_comes_after_the_failure_is_closed_too() -> None:
    team = Team()
    team.stop(ZeroDivisionError("early"))
    channel: Channel[int] = team.add_channel(Channel(1))
    with pytest.raises(Closed):
        channel.get()
    with pytest.raises(ZeroDivisionError):
        team.join()
