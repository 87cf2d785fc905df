"""What one run is asked to do, and what all who work on it share."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from bake.execute.team import Team
from bake.io.fileset import FileSet
from bake.io.journal import NoJournal
from bake.plan.model import Plan
from bake.progress import Progress

DEFAULT_MEMORY = 512 * 1024 * 1024
MAX_WORKERS = 8
MANY_FILES = 32  # with more, inputs are only open while they are read


@dataclass(frozen=True, slots=True)
class Options:
    """How to run; none of it changes what is written."""

    device: str = "auto"
    memory: int = DEFAULT_MEMORY  # bytes for the workers' buffers
    threads: int | None = None  # that compute; None: one per core, at most 8


@dataclass(frozen=True, slots=True)
class Target:
    """One output file being written."""

    path: Path  # of the draft
    data_start: int  # byte at which its data section begins


@dataclass(frozen=True, slots=True)
class Measured:
    """What was seen of the numbers while they were written."""

    survival: dict[str, float] = field(default_factory=dict)  # component -> share of the update left after rounding
    # component -> tensor -> elements beyond the largest 8-bit number, which is written in their place
    clamped: dict[str, dict[str, int]] = field(default_factory=dict)


@dataclass
class Task:
    """What the workers of one run share."""

    plan: Plan
    targets: Mapping[str, Target]  # by the output file's relative path
    files: FileSet
    options: Options
    progress: Progress
    forgets: bool = False  # what was read shall not stay in memory
    journal: NoJournal = field(default_factory=NoJournal)  # of what is finished
    team: Team = field(default_factory=Team)
