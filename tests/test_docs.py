"""The documentation says what is so."""

from __future__ import annotations

import importlib
import re
import subprocess
import sys
from pathlib import Path

import click
import pytest
from support import ROOT, bake

from bake.cli import COMMANDS

PAGES = [
    ROOT / "README.md",
    ROOT / "SECURITY.md",
    *sorted((ROOT / "docs").glob("*.md")),
    ROOT / "fixtures" / "README.md",
]


@pytest.mark.parametrize("script", ["gen_docs.py", "make_fixtures.py", "make_hostile.py"])
def test_what_is_generated_is_up_to_date(script: str) -> None:
    finished = subprocess.run(
        [sys.executable, ROOT / "scripts" / script, "--check"], capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert finished.returncode == 0, finished.stderr


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_and_option_is_in_the_command_line_page(name: str) -> None:
    page = (ROOT / "docs" / "cli.md").read_text()
    command: click.Command = importlib.import_module(COMMANDS[name]).command
    assert f"## bake {name}" in page
    for parameter in command.params:
        if isinstance(parameter, click.Option):
            assert parameter.opts[-1] in page


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
        assert target.startswith("http") or (page.parent / target).exists(), target


def test_commands_in_the_readme_have_options_that_exist() -> None:
    blocks = re.findall(r"```(?:console)?\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    lines = [line.removeprefix("$ ") for block in blocks for line in block.splitlines()]
    seen = 0
    for line in lines:
        words = line.split()
        if words[:1] == ["bake"] and words[1] in COMMANDS:
            command: click.Command = importlib.import_module(COMMANDS[words[1]]).command
            known = {option for parameter in command.params for option in parameter.opts}
            assert {word for word in words if re.fullmatch(r"--?[a-z-]+", word)} <= known, line
            seen += 1
    assert seen >= 8


def test_the_readmes_first_command_prints_what_it_shows(tmp_path: Path) -> None:
    readme = (ROOT / "README.md").read_text()
    shown = re.search(r"```console\n\$ bake fuse.*?\n(.*?)```", readme, re.DOTALL)
    assert shown is not None
    loras = ROOT / "fixtures" / "sd1" / "loras"
    base = tmp_path / "sd15.safetensors"
    base.write_bytes((ROOT / "fixtures" / "sd1" / "base.safetensors").read_bytes())
    words = ("-l", f"{loras / 'watercolour.safetensors'}:0.8", "-l", f"{loras / 'fine_lines.safetensors'}:-0.5")
    printed = bake("fuse", base, *words, "-o", tmp_path / "fused.safetensors").out
    normal = [re.sub(r"in [\d.]+ s", "in T s", line) for line in printed.replace(f"{tmp_path}/", "").splitlines()]
    assert normal == [re.sub(r"in [\d.]+ s", "in T s", line) for line in shown[1].splitlines()]


def test_fixtures_are_small() -> None:
    files = [path for path in (ROOT / "fixtures").rglob("*") if path.is_file() and path.suffix != ".jsonl"]
    assert sum(path.stat().st_size for path in files) < 1_100_000
