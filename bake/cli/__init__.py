"""The command line: one thin command per file, loaded when it is called."""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import os
import signal
import sys
import traceback
from collections.abc import Sequence
from typing import NoReturn

import click

from bake import __version__
from bake.cli.text import printable
from bake.errors import BakeError, Interrupted, OutputRefused, UsageError
from bake.interrupts import RESUMABLE, Stopped, check, due, finished, forget, kept, listen, on_signal

# name -> module; `bake --help` lists them in this order
COMMANDS = {
    "fuse": "bake.cli.fuse",
    "merge": "bake.cli.merge",
    "run": "bake.cli.run",
    "plan": "bake.cli.plan",
    "inspect": "bake.cli.inspect",
    "verify": "bake.cli.verify",
    "undo": "bake.cli.undo",
    "extract": "bake.cli.extract",
    "resize": "bake.cli.resize",
    "combine": "bake.cli.combine",
    "convert": "bake.cli.convert",
    "schema": "bake.cli.schema",
    "env": "bake.cli.env",
    "completion": "bake.cli.completion",
}
_SUMMARIES = {
    "fuse": "Fuse adapters into BASE and write a new checkpoint.",
    "merge": "Merge MODELs by METHOD and write a new checkpoint.",
    "run": "Do the bakes of the file RECIPE, one or many.",
    "plan": "Say what fuse would do with BASE, from headers alone.",
    "inspect": "Say what FILE is and what is inside.",
    "verify": "Recompute OUTPUT from its inputs in float64 and compare.",
    "undo": "Restore the base that OUT was made of, bit for bit.",
    "extract": "Write the LoRA that makes TUNED of BASE.",
    "resize": "Write LORA with other ranks.",
    "combine": "Write one LoRA for several.",
    "convert": "Write IN, a checkpoint or an adapter, in another way.",
    "schema": "Print the JSON Schema of recipe files.",
    "env": "Print versions and devices, for bug reports.",
    "completion": "Print the completion script of SHELL.",
}
_NO_MEMORY = (
    "the system gives this process no more memory; the output is as it was before. "
    "Use fewer --threads, a smaller --memory, or raise the limit."
)


class _Commands(click.Group):
    """Imports a command only when it is called, and lists all of them without importing any."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name not in COMMANDS:
            return None
        command: click.Command = importlib.import_module(COMMANDS[name]).command
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, _SUMMARIES[name]) for name in COMMANDS])


@click.group(cls=_Commands, context_settings={"auto_envvar_prefix": "BAKE", "help_option_names": ["-h", "--help"]})
@click.version_option(__version__, "-V", "--version", prog_name="bake")
def cli() -> None:
    """Fuse LoRAs into model checkpoints and merge these with each other, offline and provably.

    \b
    bake fuse base.safetensors -l style.safetensors:0.8 -o fused.safetensors
    bake merge weighted_sum a.safetensors b.safetensors -p alpha=0.3 -o merged.safetensors
    bake run styles.yaml

    Exit codes: 0 done, 1 a bug in bake, 2 usage, 3 unreadable input, 4 adapter modules unmatched,
    5 shapes or families that do not fit, 6 recognised but not supported, 7 non-finite numbers,
    8 output refused, 9 verification failed, 130 interrupted (143 by SIGTERM, 129 by SIGHUP).
    """


def _fate() -> str:
    """What became of the output of an interrupted run, or of its outputs."""
    resumable = f"; {RESUMABLE}" if kept else ""
    if len(due) > 1:
        return f"{len(finished)} of {len(due)} outputs are complete, the others are as they were before{resumable}"
    return f"{finished[-1]} is complete" if finished else f"the output is as it was before{resumable}"


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run the command line and exit; every refusal is one message and its exit code, no traceback.

    arguments: of the command line; None for those of this process.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # file names may be no text, and not every console knows all letters
            stream.reconfigure(errors="backslashreplace")
    words = list(sys.argv[1:] if arguments is None else arguments)
    as_json = "--json" in words
    forget()
    try:
        listen(on_signal)
        sys.exit(_answer(words, as_json))
    except Stopped as stopped:
        said = _fate()
        forget()
        _refuse(Interrupted(f"interrupted: {said}"), stopped.exit_code, as_json)


def _answer(words: Sequence[str], as_json: bool) -> int:
    """Run the command; returns its exit code, or exits with that of a refusal."""
    try:
        code = cli.main(words, prog_name="bake", standalone_mode=False)
    except BakeError as error:
        _refuse(error, error.exit_code, as_json)
    except click.exceptions.NoArgsIsHelpError as error:
        error.show()
        sys.exit(error.exit_code)
    except click.ClickException as error:
        if not as_json:
            error.show()
            sys.exit(error.exit_code)
        _refuse(UsageError(error.format_message()), error.exit_code, as_json)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the reader has gone: say no more
        sys.exit(1)
    except OSError as error:
        what = error.filename or "standard output"
        _refuse(OutputRefused(f"{what}: {error.strerror or error}; {_fate()}"), OutputRefused.exit_code, as_json)
    except Exception as error:
        if isinstance(error, MemoryError) or "can't allocate memory" in str(error):  # the latter is torch's
            _refuse(UsageError(_NO_MEMORY), UsageError.exit_code, as_json)
        _report_bug(error, as_json)
    return code if isinstance(code, int) else 0


def run() -> NoReturn:
    """The program `bake`: `main`, less the quarter of a second that taking torch apart at the end would cost."""
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # NumPy's threads would start only to wait
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # names that the terminal's encoding lacks
    try:
        main()
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    listen(signal.SIG_IGN)
    try:
        sys.stdout.flush()
        sys.stderr.flush()
    except OSError:
        code = code or 1
    os._exit(code)


def _refuse(error: BakeError, code: int, as_json: bool) -> NoReturn:
    check()  # what went wrong may only follow from an interruption
    if as_json:
        from bake.documents import error_document

        said, stream = json.dumps(error_document(error, code), indent=2, default=str), sys.stdout
    else:
        said, stream = f"bake: {printable(error.message, lines=True)}", sys.stderr
    with contextlib.suppress(OSError):  # the terminal may be gone; the code says it too
        print(said, file=stream, flush=True)
    sys.exit(code)


def _report_bug(error: Exception, as_json: bool) -> NoReturn:
    message = (
        f"a bug in bake: {type(error).__name__}: {error}; {_fate()}. "
        f"Please report it with the output of 'bake env'; BAKE_TRACEBACK=1 shows where it happened."
    )
    if os.environ.get("BAKE_TRACEBACK"):
        traceback.print_exc()
    _refuse(BakeError(message), BakeError.exit_code, as_json)
