"""What the scripts in this folder share: the command line by which scripts/bench.py drives another tool.

    by_NAME.py check JOB                            can this tool do JOB here? {"versions", "variants"} or {"skip"}
    by_NAME.py prepare JOB FOLDER                   write what it needs beyond the job's files, untimed; {"base"}
    by_NAME.py fuse JOB FOLDER OUT [--variant V]    the timed run, one process from start to end; a merge too

JOB is the job.json of scripts/bench_models.py. "base" is the job's base in the layout of OUT, where that is another.
These scripts run under the interpreter of the tool's own environment and import nothing of bake.
"""

from __future__ import annotations

import argparse
import json
from abc import ABC, abstractmethod
from collections.abc import Mapping
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any

Job = Mapping[str, Any]


class Peer(ABC):
    """One tool."""

    packages: tuple[str, ...]  # distributions whose versions are reported
    imports: tuple[str, ...]  # modules that must be importable
    variants: tuple[str, ...] = ("",)
    merges = False  # checkpoints with each other: jobs with an "other" model, of which "alpha" is wanted

    def __init__(self, checkout: Path | None) -> None:
        self.checkout = checkout  # of the tool's repository, for tools that are no package

    @abstractmethod
    def refusal(self, job: Job) -> str | None:
        """Why this tool cannot do `job`; None if it can."""

    def prepare(self, job: Job, folder: Path) -> Path | None:
        """Write what `fuse` needs into `folder`; return the base in the layout of the output, if that is another."""
        del job, folder
        return None

    @abstractmethod
    def fuse(self, job: Job, folder: Path, output: Path, variant: str) -> None:
        """Make the output."""

    def check(self, job: Job) -> dict[str, Any]:
        """What `check` prints."""
        reason = "merges no checkpoints here" if "other" in job and not self.merges else self.refusal(job)
        if reason is not None:
            return {"skip": reason}
        try:
            for name in self.imports:
                import_module(name)
        except Exception as error:  # a broken environment raises anything
            return {"skip": f"cannot be imported: {type(error).__name__}: {error}"}
        return {"versions": {name: version(name) for name in self.packages}, "variants": list(self.variants)}


def kinds(job: Job) -> set[str]:
    """The kinds of the job's adapters."""
    return {adapter["kind"] for adapter in job["adapters"]}


def main(peer: type[Peer]) -> None:
    """Do what the command line says."""
    parser = argparse.ArgumentParser()
    parser.add_argument("step", choices=("check", "prepare", "fuse"))
    parser.add_argument("job", type=Path)
    parser.add_argument("folder", type=Path, nargs="?")
    parser.add_argument("output", type=Path, nargs="?")
    parser.add_argument("--variant", default="")
    parser.add_argument("--checkout", type=Path)
    arguments = parser.parse_args()
    tool, job = peer(arguments.checkout), json.loads(arguments.job.read_text("utf-8"))
    if arguments.step == "check":
        print(json.dumps(tool.check(job)))
    elif arguments.step == "prepare":
        base = tool.prepare(job, arguments.folder)
        print(json.dumps({"base": None if base is None else str(base)}))
    else:
        tool.fuse(job, arguments.folder, arguments.output, arguments.variant)
