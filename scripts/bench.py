"""Time whole bakes in turn with plain copies and with other tools, and judge every output against float64.

    python scripts/bench.py FOLDER [--case sd15 ...] [--runs 3] [--variants] [--grow] [--json OUT.json]
        [--peer-python [NAME=]PYTHON ...] [--kohya CHECKOUT] [--names LIST.json ...]

What is measured: whole fresh processes, from the start of the interpreter to the exit, in turn A B A B: `cp` of the
base, or of both models of a merge, `python -c "import torch"`, `bake` with its default settings, and whatever other
tools can be imported, each by its script in scripts/peers, with the interpreter given for it. What cannot run is named
with its reason.

What is kept equal: before each run the old output is removed (every tool writes a new file), the disks are synced,
the inputs are read into the page cache, and a child process touches free memory and lets it go. Without the last,
virtual machines that hand free memory back to their host charge a run for getting it again, 2 seconds for a GiB, and
the same write takes between 0.5 and 4.8 seconds. Peak memory is what wait4 says; this process stays small, because a
child begins with the peak of its parent. Bytes are those of read and write calls, copies inside the kernel included;
what a tool maps into memory (safetensors' own reader does) is not counted as read.

FOLDER gets the models (sd15 2.1 GB, sdxl 6.9 GB, llm 1.3 GB), one output at a time, and for peers with another
layout a copy of the base; it is emptied of all that at the end, unless --keep.
"""

from __future__ import annotations

import argparse
import json
import mmap
import os
import platform
import shlex
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

SCRIPTS = Path(__file__).resolve().parent
ROOT = SCRIPTS.parent
PEERS = sorted(path.stem.removeprefix("by_") for path in (SCRIPTS / "peers").glob("by_*.py"))
_MIB = 2**20


@dataclass(frozen=True)
class Case:
    """One thing that is timed."""

    model: str  # of bench_models; "" for none
    adapters: tuple[str, ...] = ()  # KIND:RANK:OVER:WEIGHT
    verb: str = "fuse"
    merge: float | None = None  # how much of a second model is wanted, for the verb merge


CASES = {
    "sd15": Case("sd15", ("lora:32:attention:0.8",)),
    "sd15-five": Case("sd15", ("lora:32:attention:0.2",) * 5),
    "sdxl": Case("sdxl", ("lora:128:everything:0.8",)),
    "llm": Case("llm", ("lora:16:everything:1",)),
    "two-percent": Case("sd15", ("lora:32:cross:0.8",)),
    "loha": Case("sd15", ("loha:8:everything:1",)),
    "lokr": Case("sd15", ("lokr:8:everything:1",)),
    "dora": Case("sd15", ("dora:16:attention:1",)),
    "merge": Case("sd15", verb="merge", merge=0.5),
    "merge-llm": Case("llm", verb="merge", merge=0.5),
    "plan": Case("sdxl", ("lora:128:everything:0.8",), "plan"),
    "help": Case("", (), "--help"),
}
# How cost grows with rank, with the number of LoRAs, with the share of the file that is touched, and with its size.
GROW = {
    **{f"rank {rank}": Case("sd15", (f"lora:{rank}:attention:0.8",)) for rank in (4, 32, 128)},
    **{f"{count} LoRAs": Case("sd15", (f"lora:32:attention:{0.8 / count}",) * count) for count in (2, 5, 10)},
    **{f"over {over}": Case("sd15", (f"lora:32:{over}:0.8",)) for over in ("cross", "everything")},
    **{f"{model} over everything": Case(model, ("lora:16:everything:0.8",)) for model in ("llm", "sd15", "sdxl")},
}
VARIANTS = {
    "bake --verify none": ["--verify", "none"],
    "bake --no-recipe": ["--no-recipe"],
    "bake --rounding fast": ["--rounding", "fast"],
    "bake, all three": ["--verify", "none", "--no-recipe", "--rounding", "fast"],
}


@dataclass(frozen=True)
class Command:
    """One process that is run again and again."""

    words: tuple[str, ...]
    output: Path | None = None  # what it writes
    base: Path | None = None  # the job's base in the layout of `output`, if that is another
    verify: tuple[str, ...] = ()  # has the tool judge its own output
    judged: bool = False  # its output is compared with float64
    may_fail: bool = False  # a failure is noted and ends its runs; else it ends everything


@dataclass(frozen=True)
class Run:
    """One finished process."""

    seconds: float
    cpu: float  # seconds, user and system, children included
    peak: int  # resident bytes
    read: int | None  # bytes; None where the system does not say
    written: int | None


@dataclass
class Measured:
    """What is known about one command of one case."""

    runs: list[Run] = field(default_factory=list)
    failure: str | None = None
    exact: dict[str, Any] | None = None
    verified: dict[str, Any] | None = None


class Failed(Exception):
    """A command ended with another exit code than 0."""


# ---- one process


def timed(words: Sequence[str], log: Path) -> Run:
    """Run a command and measure it. Raises Failed, with the last line it said."""
    with log.open("wb") as said:
        started = time.perf_counter()
        process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=said, cwd=ROOT, env=_environment())
        moved = _moved_bytes(process.pid)
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - started
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        last = log.read_text("utf-8", "replace").strip().splitlines()[-1:]
        killed = " (killed, perhaps for memory)" if process.returncode == -9 else ""
        raise Failed(f"exit {process.returncode}{killed}: {''.join(last)[-300:]}")
    peak = usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return Run(seconds, usage.ru_utime + usage.ru_stime, peak, *moved)


def _environment() -> dict[str, str]:
    """For children: this checkout's bake, no network."""
    return {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"}


def _moved_bytes(process: int) -> tuple[int | None, int | None]:
    """(read, written) by a child, once it has ended; (None, None) on systems that do not tell."""
    counts = Path(f"/proc/{process}/io")
    if not counts.exists():
        return None, None
    os.waitid(os.P_PID, process, os.WEXITED | os.WNOWAIT)  # dead but not buried: its counts can still be read
    said = dict(line.split(": ") for line in counts.read_text("utf-8").splitlines())
    return int(said["rchar"]), int(said["wchar"])


def said_by(words: Sequence[str]) -> Any:
    """The JSON document that a helper process prints, the last line where others come before. Raises Failed."""
    done = subprocess.run(words, capture_output=True, text=True, cwd=ROOT, env=_environment(), check=False)
    if done.returncode:
        raise Failed("".join((done.stderr or done.stdout).strip().splitlines()[-1:])[-300:])
    printed = done.stdout.strip()
    return json.loads(printed if printed.startswith("{\n") else printed.splitlines()[-1])


def make_ready(inputs: Sequence[Path], output: Path | None, touched: int) -> None:
    """The same start for every run: no output, nothing left to write, inputs cached, `touched` bytes warmed."""
    if output is not None:
        _remove(output)
    os.sync()
    subprocess.run([sys.executable, __file__, "--touch", str(touched)], check=True)
    for file in (file for path in inputs for file in _files(path)):
        with file.open("rb", buffering=0) as opened:
            buffer = bytearray(_MIB)
            while opened.readinto(buffer):
                pass


def touch(size: int) -> None:
    """Make the system find `size` bytes of memory, and give them back by ending."""
    if size <= 0:
        return
    memory, page = mmap.mmap(-1, size, mmap.MAP_PRIVATE), b"\1" * _MIB
    for start in range(0, size - _MIB, _MIB):
        memory[start : start + _MIB] = page


def to_touch(inputs: Sequence[Path], asked: float | None) -> int:
    """How much memory to warm: what the output will take and 2 GiB, but no more than leaves the inputs cached."""
    size = sum(file.stat().st_size for path in inputs for file in _files(path))
    wanted = int(1.2 * size) + 2 * 2**30 if asked is None else int(asked * 2**30)
    try:
        lines = Path("/proc/meminfo").read_text("utf-8").splitlines()
    except OSError:
        return wanted
    available = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    return max(0, min(wanted, available - size - 2**30))


def _folder_name(case: str) -> str:
    return f"case-{case.replace(' ', '-')}"


def _files(path: Path) -> list[Path]:
    return sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


# ---- one case


class Bench:
    """All cases in one folder."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments = arguments
        self.folder: Path = arguments.folder.resolve()
        self.pythons, self.default_python = _pythons(arguments.peer_python)
        self.notes: list[str] = []  # what was left out, and why
        self.versions: dict[str, str] = {}

    def measure(self, name: str, case: Case, extras: bool) -> dict[str, Any]:
        """Every command of one case, in turn. extras: variants, peers and the verdict on exactness too."""
        here = self.folder / _folder_name(name)
        if here.exists():
            shutil.rmtree(here)  # of a run that was killed
        here.mkdir(parents=True)
        job = self._make(case, here)
        commands = self._commands(case, job, here)
        if extras and case.verb in ("fuse", "merge"):
            commands |= self._peers(name, job, here)
        inputs = [Path(path) for path in _models(job)] + [Path(each["path"]) for each in job.get("adapters", ())]
        done = {command: Measured() for command in commands}
        for number in range(self.arguments.runs):
            for command, how in commands.items():
                last = number == self.arguments.runs - 1
                self._once(done[command], how, inputs, here, extras and last)
        for command, result in done.items():
            if result.failure is not None:
                self.notes.append(f"{name}: {command}: {result.failure}")
        _remove(here)
        return _document(done)

    def _make(self, case: Case, here: Path) -> dict[str, Any]:
        """The case's files; its job."""
        if not case.model:
            return {}
        models = self.folder / "models"
        models.mkdir(exist_ok=True)
        words = [sys.executable, str(SCRIPTS / "bench_models.py"), str(here), "--models", str(models)]
        words += ["--model", case.model, "--scale-down", str(self.arguments.scale_down)]
        for adapter in case.adapters:
            words += ["--adapter", adapter]
        if case.merge is not None:
            words += ["--merge", str(case.merge)]
        subprocess.run(words, check=True, cwd=ROOT, env=_environment(), stdout=subprocess.DEVNULL)
        job: dict[str, Any] = json.loads((here / "job.json").read_text("utf-8"))
        return job

    def _commands(self, case: Case, job: Mapping[str, Any], here: Path) -> dict[str, Command]:
        """The bakes of a case, and what they are compared with."""
        bake = (sys.executable, "-m", "bake")
        if not job:
            return {"python": Command((sys.executable, "-c", "pass")), "bake": Command((*bake, case.verb))}
        base = job["base"]
        if case.verb == "merge":
            return self._merge_commands(job, here)
        words = [case.verb, base]
        for adapter in job["adapters"]:
            words += ["-l", f"{adapter['path']}:{adapter['weight']}"]
        if case.verb == "plan":
            return {"python": Command((sys.executable, "-c", "pass")), "bake": Command((*bake, *words))}
        output = here / ("out" if Path(base).is_dir() else "out.safetensors")
        full = ["--full"] if self.arguments.every == 1 else []
        verify = (*bake, "verify", str(output), "--base", *words[1:], *full, "--json")
        fuse = Command((*bake, *words, "-o", str(output), "-q"), output, verify=verify, judged=True)
        found = {
            "cp": Command(("cp", "-r", base, str(output)), output),
            "import torch": Command((sys.executable, "-c", "import torch")),
            "bake": fuse,
        }
        if self.arguments.variants:
            for name, options in VARIANTS.items():
                found[name] = Command((*fuse.words, *options), output, may_fail=True)
        return found

    def _merge_commands(self, job: Mapping[str, Any], here: Path) -> dict[str, Command]:
        """The merge of a case, and what it is compared with."""
        models, bake = _models(job), (sys.executable, "-m", "bake")
        output = here / ("out" if Path(job["base"]).is_dir() else "out.safetensors")
        copies = here / "copies"
        full = ["--full"] if self.arguments.every == 1 else []
        merge = (*bake, "merge", "weighted_sum", *models, "-p", f"alpha={job['alpha']}", "-o", str(output), "-q")
        folders = [word for model in models for word in ("--search", str(Path(model).parent))]
        verify = (*bake, "verify", str(output), *folders, *full, "--json")
        copy = 'mkdir "$0" && for model in "$@"; do cp -r "$model" "$0/$((n += 1))"; done'
        return {
            "cp": Command(("sh", "-c", copy, str(copies), *models), copies),
            "import torch": Command((sys.executable, "-c", "import torch")),
            "bake": Command(merge, output, verify=verify, judged=True),
        }

    def _peers(self, name: str, job: Mapping[str, Any], here: Path) -> dict[str, Command]:
        """The other tools that can do this case."""
        found = {}
        for peer in self.arguments.peer:
            python = self.pythons.get(peer, self.default_python)
            script = [python, str(SCRIPTS / "peers" / f"by_{peer}.py")]
            options = (
                ["--checkout", str(self.arguments.kohya.resolve())] if self.arguments.kohya and peer == "kohya" else []
            )
            folder = here / f"for-{peer}"
            folder.mkdir()
            try:
                answer = said_by([*script, "check", str(here / "job.json"), *options])
                if "skip" in answer:
                    raise Failed(f"skipped: {answer['skip']}")
                base = said_by([*script, "prepare", str(here / "job.json"), str(folder), *options])["base"]
            except Failed as failure:
                self.notes.append(f"{name}: {peer}: {failure}")
                continue
            self.versions |= {f"{package} ({peer})": found for package, found in answer["versions"].items()}
            in_folder = base is not None or Path(job["base"]).is_dir()
            output = here / (f"{peer}-out" if in_folder else f"{peer}-out.safetensors")
            for variant in answer["variants"]:
                words = [*script, "fuse", str(here / "job.json"), str(folder), str(output), "--variant", variant]
                found[f"{peer} {variant}".strip()] = Command(
                    (*words, *options), output, None if base is None else Path(base), judged=True, may_fail=True
                )
        return found

    def _once(self, result: Measured, how: Command, inputs: list[Path], here: Path, judge: bool) -> None:
        if result.failure is not None:
            return
        read = [*inputs, *([] if how.base is None else [how.base])]
        make_ready(read, how.output, to_touch(read, self.arguments.touch_gib) if how.output else 0)
        try:
            result.runs.append(timed(how.words, here / "said"))
            print(
                f"{here.name.removeprefix('case-')}: {result.runs[-1].seconds:.2f} s: {shlex.join(how.words)[:150]}",
                file=sys.stderr,
                flush=True,
            )
            if judge and how.judged and self.arguments.every:
                self._judge(result, how, here)
        except Failed as failure:
            result.failure = str(failure)
            if not how.may_fail:
                sys.exit(f"{shlex.join(how.words)}\n{failure}")
        finally:
            if how.output is not None:
                _remove(how.output)

    def _judge(self, result: Measured, how: Command, here: Path) -> None:
        """Compare the output with float64 here, and by the tool's own means if it has any."""
        words = [str(SCRIPTS / "bench_exact.py"), str(here / "job.json"), str(how.output)]
        words += ["--every", str(self.arguments.every)] + ([] if how.base is None else ["--base", str(how.base)])
        result.exact = said_by([sys.executable, *words])
        if how.verify:
            result.verified = said_by(how.verify)


def _models(job: Mapping[str, Any]) -> tuple[str, ...]:
    """The job's checkpoints."""
    return tuple(job[model] for model in ("base", "other") if model in job)


def _pythons(given: Sequence[str]) -> tuple[dict[str, str], str]:
    """(interpreters by peer, the one for all others)."""
    named, default = {}, sys.executable
    for text in given:
        name, equals, path = text.partition("=")
        if equals and name in PEERS:
            named[name] = path
        else:
            default = text
    return named, default


# ---- results


def _document(done: Mapping[str, Measured]) -> dict[str, Any]:
    """What is known about a case, by command; a command that never ran through has only its failure."""
    medians = {name: statistics.median(run.seconds for run in it.runs) for name, it in done.items() if it.runs}
    floor = medians["cp"] + medians["import torch"] if "cp" in medians else None
    found: dict[str, Any] = {}
    for name, it in done.items():
        if not it.runs:
            found[name] = {"failure": it.failure}
            continue
        seconds, last = [run.seconds for run in it.runs], it.runs[-1]
        found[name] = {
            **{"seconds": medians[name], "fastest": min(seconds), "slowest": max(seconds), "runs": len(seconds)},
            "times_cp": medians[name] / medians["cp"] if floor is not None else None,
            "times_cp_and_import": medians[name] / floor if floor is not None else None,
            "cpu_seconds": statistics.median(run.cpu for run in it.runs),
            "peak_bytes": max(run.peak for run in it.runs),
            **{"read_bytes": last.read, "written_bytes": last.written, "exact": it.exact},
            **{"verified": it.verified, "failure": it.failure},
        }
    return found


_COLUMNS = (
    *("command", "median s", "min-max", "x cp", "x (cp + import)", "CPU s", "peak MiB"),
    *("GB read", "GB written", "correctly rounded", "worst ulp", "untouched tensors"),
)


def table(case: Mapping[str, Any]) -> Iterator[str]:
    """The lines of a Markdown table of one case."""
    yield f"| {' | '.join(_COLUMNS)} |"
    yield f"|{'---|' * len(_COLUMNS)}"
    for name, row in case.items():
        if "seconds" not in row:
            continue  # it is among the notes
        exact = row["exact"] or {}
        untouched = ", ".join(f"{count} {fate}" for fate, count in exact.get("untouched", {}).items())
        cells = (
            name,
            f"{row['seconds']:.2f}",
            f"{row['fastest']:.2f}-{row['slowest']:.2f}",
            *("" if row[key] is None else f"{row[key]:.2f}" for key in ("times_cp", "times_cp_and_import")),
            f"{row['cpu_seconds']:.1f}",
            f"{row['peak_bytes'] / _MIB:.0f}",
            *("" if row[key] is None else f"{row[key] / 1e9:.2f}" for key in ("read_bytes", "written_bytes")),
            *((f"{100 * exact['equal_share']:.4f} %", f"{exact['max_ulp']:.3g}", untouched) if exact else ("", "", "")),
        )
        yield f"| {' | '.join(cells)} |"


def _verdict(verified: Mapping[str, Any]) -> Iterator[str]:
    """What bake verify says, in words."""
    yield "sound," if verified["ok"] else "NOT sound,"
    yield f"untouched tensors {'identical' if verified['untouched_identical'] else 'NOT identical'},"
    yield f"{100 * verified['equal_share']:.4f} % of {verified['elements']} elements correctly rounded,"
    yield f"worst {verified['max_ulp']:.3g} ulp"


def machine() -> dict[str, Any]:
    """Where this ran, and what."""
    processor = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [
            line.partition(":")[2].strip() for line in cpuinfo.read_text("utf-8").splitlines() if "model name" in line
        ]
        processor = names[0] if names else processor
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], capture_output=True, text=True, cwd=ROOT, check=False
    ).stdout.strip()
    return {
        **{"date": time.strftime("%Y-%m-%d"), "commit": commit, "processor": processor, "cores": os.cpu_count()},
        **{"memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), "system": platform.platform()},
        **{"python": platform.python_version(), "torch": _version("torch"), "numpy": _version("numpy")},
        "command": shlex.join(["python", *sys.argv]),
    }


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "absent"


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("folder", type=Path, help="for models and outputs; made if it is not there")
    parser.add_argument("--case", action="append", choices=CASES, help="repeatable; default: all")
    parser.add_argument(
        "--names", action="append", default=[], help="a name list: one more case, rank 16 over everything"
    )
    parser.add_argument("--runs", type=int, default=3, help="of each command; default: 3")
    parser.add_argument("--variants", action="store_true", help="what bake's settings cost")
    parser.add_argument("--grow", action="store_true", help="how cost grows, instead of the cases")
    parser.add_argument("--peer", action="append", choices=[*PEERS, "none"], help="repeatable; default: all")
    parser.add_argument(
        "--peer-python", action="append", default=[], metavar="[NAME=]PYTHON", help="interpreter of peers"
    )
    parser.add_argument("--kohya", type=Path, help="a checkout of sd-scripts")
    parser.add_argument(
        "--every", type=int, default=1, help="judge each Nth touched tensor, and a sample by bake verify; 0: none"
    )
    parser.add_argument("--touch-gib", type=float, help="memory to warm before each run; default: 1.2 x inputs + 2")
    parser.add_argument("--scale-down", type=int, default=1, help="smaller models, to try the bench itself")
    parser.add_argument("--json", type=Path, help="also write everything here")
    parser.add_argument("--keep", action="store_true", help="leave the models in FOLDER for the next run")
    arguments = parser.parse_args()
    arguments.peer = [] if "none" in (arguments.peer or []) else arguments.peer or PEERS
    return arguments


def main() -> None:
    if sys.argv[1:2] == ["--touch"]:
        touch(int(sys.argv[2]))
        return
    arguments = _arguments()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    bench, about = Bench(arguments), machine()
    print(json.dumps(about), flush=True)
    chosen = (
        GROW if arguments.grow else {name: CASES[name] for name in arguments.case or ([] if arguments.names else CASES)}
    )
    for path in arguments.names:
        content = Path(path).name.split(".")[0]
        chosen = {**chosen, content: Case(str(Path(path).resolve()), ("lora:16:everything:1",))}
    results: dict[str, Any] = {}
    try:
        for name, case in chosen.items():
            results[name] = bench.measure(name, case, not arguments.grow)
            print(f"\n## {name}\n", *table(results[name]), sep="\n", flush=True)
            for command, row in results[name].items():
                if row.get("verified"):
                    print(f"\n`bake verify` on the output of {command}:", *_verdict(row["verified"]))
    finally:
        for name in chosen:
            shutil.rmtree(arguments.folder / _folder_name(name), ignore_errors=True)
        if not arguments.keep:
            shutil.rmtree(arguments.folder / "models", ignore_errors=True)
    print("", *bench.notes, json.dumps(bench.versions), sep="\n")
    if arguments.json is not None:
        document = {
            "schema": 1,
            "machine": about,
            "versions": bench.versions,
            "cases": results,
            "left_out": bench.notes,
        }
        arguments.json.write_text(json.dumps(document, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
