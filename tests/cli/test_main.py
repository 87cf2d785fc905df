"""The group itself: help, version, environment, signals."""

from __future__ import annotations

import importlib

import click
import pytest
from support import bake

from bake import __version__
from bake.cli import _SUMMARIES, COMMANDS, cli
from bake.execute import kernels


def test_help_lists_every_command_and_the_exit_codes() -> None:
    done = bake("--help")
    assert done.code == 0
    for name, summary in _SUMMARIES.items():
        assert name in done.out
        assert summary in done.out
    assert "9 verification" in done.out


@pytest.mark.parametrize("name", COMMANDS)
def test_a_summary_is_the_first_paragraph_of_the_commands_help(name: str) -> None:
    command: click.Command = importlib.import_module(COMMANDS[name]).command
    assert command.name == name
    assert command.help
    assert " ".join(command.help.split("\n\n")[0].split()) == _SUMMARIES[name]


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_has_a_help_text(name: str) -> None:
    command: click.Command = importlib.import_module(COMMANDS[name]).command
    for parameter in command.params:
        if isinstance(parameter, click.Option):
            assert parameter.help, parameter.name


def test_no_arguments_show_the_help() -> None:
    done = bake()
    assert "Commands:" in done.out + done.err


def test_the_version() -> None:
    assert __version__ in bake("--version").out


def test_a_mistyped_command_is_a_usage_error() -> None:
    done = bake("fusee")
    assert done.code == 2
    assert "fusee" in done.err


def test_env_names_versions_and_devices() -> None:
    found = bake("env", "--json").json
    assert found["bake"] == __version__
    assert "torch" in found["packages"]
    assert "cpu" in found["devices"]
    assert "torch" in bake("env").out


@pytest.mark.parametrize(
    ("missing", "said"),
    [((), "compiled"), (("products",), "compiled but for products"), (("compiled", "products"), "NumPy")],
)
def test_env_says_which_loops_there_are(missing: tuple[str, ...], said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("compiled", "products"):
        monkeypatch.setattr(kernels, name, None if name in missing else object())
    assert bake("env", "--json").json["loops"] == said
    assert f"loops     {said}\n" in bake("env").out


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_scripts(shell: str) -> None:
    done = bake("completion", shell)
    assert done.code == 0
    assert "_BAKE_COMPLETE" in done.out


def test_an_unknown_command_is_no_attribute_of_the_group() -> None:
    assert cli.get_command(click.Context(cli), "nothing") is None
