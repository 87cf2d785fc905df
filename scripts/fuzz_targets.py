"""Every entrance for a stranger's bytes, with the promise that holds there: bake works, or it refuses in its own words.

`scripts/fuzz.py` looks for inputs that break the promise; `tests/test_corpus.py` gives each of them the inputs that
were found, which are kept in fixtures/corpus, one line of JSON for each.
"""

from __future__ import annotations

import contextlib
import functools
import io
import json
import math
import os
import shutil
import sys
import tempfile
import tracemalloc
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from bake.api import build_plan, stored_recipe
from bake.cli import cli
from bake.cli.options import ComponentDtype, KeyValue, Size, Weighted
from bake.documents import error_document, plan_document
from bake.dtypes import DTYPES, tensor_bytes
from bake.errors import BakeError
from bake.io.header import build_header, header_length, lay_out, parse_header
from bake.io.tensorfile import open_tensors, read_tensor_bytes
from bake.io.undo import UNDO_KEY, Source, UndoReader, UndoWriter
from bake.plan.prompt import LoraFolder, choices_from_prompt, parse_prompt
from bake.plan.record import RECIPE_KEY, file_metadata
from bake.plan.replay import recipe_from_record
from bake.recipes.read import read_recipe

ROOT = Path(__file__).resolve().parent.parent
CORPUS = ROOT / "fixtures" / "corpus"
GOLDEN = ROOT / "fixtures" / "golden"
LONGEST = 4096  # bytes of an input

_MOST_BYTES = 16 * 2**20  # that an input of the longest size may make bake allocate
_MOST_TENSOR = 2**40  # bytes of a tensor in a made-up file; it is a hole
_PATTERN = 256  # bytes at the start of each tensor of such a file that are no hole
_FORBIDDEN = (  # events of Python's audit hooks that nothing before a run may raise
    *("os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.link", "os.symlink", "os.truncate", "os.chmod"),
    *("os.system", "os.exec", "os.posix_spawn", "os.fork", "subprocess.Popen", "socket.connect", "socket.bind"),
)
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND

Act = Callable[[], object]
Enter = Callable[[bytes], Iterable[Act]]  # puts an input in its place; returns what bake is to do with it


class Broken(Exception):
    """bake did with an input what it never may."""


@dataclass(frozen=True)
class Target:
    """One entrance."""

    prepare: Callable[[Path], Enter]  # in an empty folder of its own
    seeds: Callable[[], Iterable[bytes]]  # inputs to begin with
    is_json: bool = True


# ---- The inputs that are kept ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Kept:
    """An input worth trying again."""

    data: bytes
    finding: str = ""  # what bake once did with it that it never may


def read_corpus(name: str) -> list[Kept]:
    """The kept inputs of a target."""
    path = CORPUS / f"{name}.jsonl"
    lines = path.read_text("utf-8").splitlines() if path.is_file() else []
    entries = [json.loads(line) for line in lines]
    return [Kept(entry["input"].encode("utf-8", "surrogateescape"), entry.get("finding", "")) for entry in entries]


def write_corpus(name: str, inputs: Iterable[Kept]) -> None:
    """Keep `inputs`, and no others, of a target."""
    CORPUS.mkdir(exist_ok=True)
    with (CORPUS / f"{name}.jsonl").open("w", encoding="utf-8") as file:
        for kept in inputs:
            finding = {"finding": kept.finding} if kept.finding else {}
            file.write(json.dumps({**finding, "input": kept.data.decode("utf-8", "surrogateescape")}) + "\n")


# ---- The promise -----------------------------------------------------------------------------------------------------

_watched: list[Path] = []  # where bake may write nevertheless, while it is watched


def _watch(event: str, arguments: tuple[Any, ...]) -> None:
    if not _watched or (event != "open" and event not in _FORBIDDEN):
        return
    path = str(arguments[0]) if arguments else ""
    if event == "open" and not (isinstance(arguments[2], int) and arguments[2] & _WRITES):
        return
    if "__pycache__" not in path and path != os.devnull and not path.startswith(str(_watched[-1])):
        raise Broken(f"{event} {arguments}")


@functools.cache
def _install_watch() -> None:
    sys.addaudithook(_watch)  # for good: Python knows no way back


@contextlib.contextmanager
def _watching(cache: Path) -> Iterator[None]:
    """Within the block, no file is written but below `cache`, and no program started; else Broken is raised."""
    _install_watch()
    _watched.append(cache)
    try:
        yield
    finally:
        _watched.pop()


def attempt(enter: Enter, data: bytes, folder: Path, measure: bool = False) -> None:
    """Have bake do with `data` all that the entrance has; raise whatever breaks the promise.

    That is every exception but bake's typed refusals and click's, a file written, a program started, with
    `measure` more memory than _MOST_BYTES, and an answer that is no JSON or no Unicode.
    """
    for act in enter(data):
        if measure:
            tracemalloc.start()
        try:
            with _watching(folder / "cache"):
                act()
        except BakeError as refusal:
            if refusal.exit_code == BakeError.exit_code:
                raise
            json.dumps(error_document(refusal), default=str)
            refusal.message.encode("utf-8", "surrogateescape")
        except click.ClickException as refusal:
            refusal.format_message()
        finally:
            peak = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
        if peak > _MOST_BYTES:
            raise Broken(f"{peak} bytes allocated for an input of {len(data)}")


def _run(*words: object) -> None:
    """A command, as it would be typed; its answer is thrown away once it is known to be Unicode and, if due, JSON."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(io.StringIO()):
        cli.main(list(map(str, words)), prog_name="bake", standalone_mode=False)
    out.getvalue().encode("utf-8")
    if "--json" in words:
        json.loads(out.getvalue())


def _plan(base: Path, *adapters: Path, **what: Any) -> None:
    """A plan with everything that is said of it."""
    plan = build_plan(base, adapters, **what)
    json.dumps(plan_document(plan, None, full=True), default=str)
    for file in plan.files:
        header = {tensor.name: (tensor.dtype, tensor.shape) for tensor in file.tensors}
        metadata = file_metadata(plan, file, None, "0")
        build_header(lay_out((name, *info) for name, info in header.items()), metadata)


# ---- Files that are put in place -------------------------------------------------------------------------------------


def write_tensors(
    path: Path, tensors: Mapping[str, tuple[str, Sequence[int]]], metadata: Mapping[str, str], fill: bytes
) -> None:
    """A well-formed file with these names, dtypes and shapes; each tensor begins with `fill`, over and over."""
    placed = lay_out((name, dtype, tuple(shape)) for name, (dtype, shape) in tensors.items())
    header = build_header(placed, metadata)
    with path.open("wb") as file:
        file.write(header)
        for info in placed.values():
            file.seek(len(header) + info.begin)
            size = min(info.nbytes, _PATTERN)
            file.write((fill * (size // max(1, len(fill)) + 1))[:size] if fill else bytes(size))
        file.truncate(len(header) + max((info.end for info in placed.values()), default=0))


def _tensors_of(found: Any) -> dict[str, tuple[str, list[int]]] | None:
    """{name: [dtype, shape]} if that is what it is, and a file could hold it."""
    if not isinstance(found, dict):
        return None
    tensors = {}
    for name, entry in found.items():
        dtype, shape = entry if isinstance(entry, list) and len(entry) == 2 else (None, None)
        if not isinstance(dtype, str) or dtype not in DTYPES or not _is_unicode(name) or not isinstance(shape, list):
            return None
        if not all(type(size) is int and size >= 0 for size in shape):
            return None
        size = tensor_bytes(dtype, math.prod(shape))
        if size is None or size > _MOST_TENSOR:
            return None
        tensors[name] = (dtype, shape)
    return tensors


def _texts_of(found: Any) -> dict[str, str]:
    """{name: text}, less what is none of this."""
    pairs = found.items() if isinstance(found, dict) else ()
    return {key: value for key, value in pairs if isinstance(value, str) and _is_unicode(key + value)}


def _is_unicode(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _document(data: bytes) -> Any:
    try:
        return json.loads(data)
    except (ValueError, RecursionError):
        return None


def _hexadecimal(found: Any) -> bytes:
    try:
        return bytes.fromhex(found)
    except (TypeError, ValueError):
        return b""


@functools.cache
def golden_cases() -> dict[str, dict[str, Any]]:
    """name -> what is known of it, for the golden cases."""
    return {
        path.name.removesuffix(".adapter.safetensors"): json.loads(
            Path(str(path).replace(".adapter.safetensors", ".json")).read_text("utf-8")
        )
        for path in sorted(GOLDEN.glob("*.adapter.safetensors"))
    }


def _golden_config(name: str) -> dict[str, Any] | None:
    path = GOLDEN / f"{name}.adapter_config.json"
    found: dict[str, Any] | None = json.loads(path.read_text("utf-8")) if path.is_file() else None
    return found


def _for_base(base: str) -> Path:
    """The first adapter for a base among the golden cases."""
    name = next(name for name, case in golden_cases().items() if case["base"] == base)
    return GOLDEN / f"{name}.adapter.safetensors"


def _golden_base(name: str, folder: Path) -> Path:
    """A folder with the base and its config.json, or a file where it has none."""
    place = folder / name / "model.safetensors"
    place.parent.mkdir()
    place.write_bytes((GOLDEN / "bases" / f"{name}.safetensors").read_bytes())
    config = GOLDEN / "bases" / f"{name}.config.json"
    if not config.is_file():
        return place
    (place.parent / "config.json").write_bytes(config.read_bytes())
    return place.parent


def _bases(folder: Path) -> dict[str, Path]:
    names = sorted(path.stem for path in (GOLDEN / "bases").glob("*.safetensors"))
    return {name: _golden_base(name, folder) for name in names}


def _described(path: Path) -> dict[str, Any]:
    """The tensors of a file as documents of this module have them."""
    file = open_tensors(path)
    first = next((name for name, info in file.tensors.items() if info.nbytes == 2), None)
    return {
        "tensors": {name: [info.dtype, list(info.shape)] for name, info in file.tensors.items()},
        "metadata": file.metadata,
        "fill": (read_tensor_bytes(file, first) if first is not None else b"\x00\x3c").hex(),
    }


def _dumped(value: Any) -> bytes:
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False).encode("utf-8")


# ---- The entrances ---------------------------------------------------------------------------------------------------


def _header(folder: Path) -> Enter:
    """The length and the JSON at the start of a safetensors file; what is accepted, the library accepts too."""
    from safetensors import deserialize

    def parse(data: bytes) -> None:
        length = header_length(data[:8], len(data), "file")
        header = parse_header(data[8 : 8 + length], len(data), "file")
        deserialize(data)  # type: ignore[no-untyped-call]
        again = build_header(header.tensors, header.metadata)
        data_bytes = len(data) - header.data_start
        if parse_header(again[8:], len(again) + data_bytes, "file").tensors != header.tensors:
            raise Broken("what was read is not what is written")

    return lambda data: [lambda: parse(data)]


def _header_seeds() -> Iterable[bytes]:
    for path in sorted(GOLDEN.glob("*.adapter.safetensors"))[:6]:
        yield path.read_bytes()
    yield b"\x02\0\0\0\0\0\0\0{}"
    yield b"\xff" * 8 + b"{"


def _json_header(folder: Path) -> Enter:
    """The same with the length always right, and data to fit where there is little of it."""
    parse = _header(folder)

    def enter(data: bytes) -> Iterable[Act]:
        entries = _document(data)
        ends = [0]
        for entry in entries.values() if isinstance(entries, dict) else ():
            offsets = entry.get("data_offsets") if isinstance(entry, dict) else None
            ends += [end for end in offsets if type(end) is int] if isinstance(offsets, list) else []
        return parse(len(data).to_bytes(8, "little") + data + bytes(min(65536, max(ends))))

    return enter


def _json_header_seeds() -> Iterable[bytes]:
    for path in sorted(GOLDEN.glob("*.adapter.safetensors"))[::5]:
        content = path.read_bytes()
        yield content[8 : 8 + int.from_bytes(content[:8], "little")].rstrip()


def _index(folder: Path) -> Enter:
    """model.safetensors.index.json beside two shards."""
    model = folder / "model"
    model.mkdir()
    for number, names in enumerate((["a.weight", "b.weight"], ["c.weight"]), 1):
        write_tensors(model / f"model-{number:05}-of-00002.safetensors", {n: ("F16", [2, 2]) for n in names}, {}, b"")

    def enter(data: bytes) -> Iterable[Act]:
        (model / "model.safetensors.index.json").write_bytes(data)
        return [lambda: _plan(model, dtype="bf16"), lambda: _run("inspect", model, "--json")]

    return enter


def _index_seeds() -> Iterable[bytes]:
    shards = {"a.weight": "model-00001-of-00002.safetensors", "b.weight": "model-00001-of-00002.safetensors"}
    weight_map = {**shards, "c.weight": "model-00002-of-00002.safetensors"}
    yield _dumped({"metadata": {"total_size": 24}, "weight_map": weight_map})
    yield _dumped({"metadata": {}, "weight_map": shards})
    yield _dumped({"weight_map": {"a.weight": "../model.safetensors"}})


def _config(folder: Path) -> Enter:
    """config.json of a language model and of a pipeline's part, and model_index.json."""
    bases = _bases(folder)
    pipeline = folder / "pipeline"
    (pipeline / "transformer").mkdir(parents=True)
    content = (GOLDEN / "bases" / "flux.safetensors").read_bytes()
    (pipeline / "transformer" / "diffusion_pytorch_model.safetensors").write_bytes(content)
    places = [bases[name] / "config.json" for name in ("qwen2", "mixtral", "gpt2")]
    lora = GOLDEN / "peft-lora.adapter.safetensors"

    def enter(data: bytes) -> Iterable[Act]:
        for place in (*places, pipeline / "model_index.json", pipeline / "transformer" / "config.json"):
            place.write_bytes(data)
        return [
            lambda: _plan(bases["qwen2"], lora, dtype="bf16", allow_unmatched=True),
            lambda: _plan(bases["mixtral"], dtype="fp32"),
            lambda: _plan(pipeline, dtype={"transformer": "bf16"}),
            lambda: _run("inspect", bases["gpt2"]),
            lambda: _run("inspect", pipeline, "--json"),
        ]

    return enter


def _config_seeds() -> Iterable[bytes]:
    for path in sorted((GOLDEN / "bases").glob("*.config.json")):
        yield path.read_bytes()
    quantised = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    yield _dumped({"model_type": "llama", "torch_dtype": "float16", "quantization_config": quantised})
    yield _dumped({"_class_name": "FluxTransformer2DModel", "in_channels": 64, "out_channels": None})
    yield _dumped({"model_type": "qwen2", "tie_word_embeddings": True, "text_config": {"tie_word_embeddings": False}})


def _adapter_config(folder: Path) -> Enter:
    """adapter_config.json of PEFT and MLX, beside weights and in the metadata of diffusers."""
    base = _golden_base("qwen2", folder)
    adapters = {}
    for name, case in golden_cases().items():
        config = _golden_config(name)
        if case["base"] == "qwen2" and config is not None:
            file = "adapters" if name.startswith("mlx") else "adapter_model"
            place = folder / name / f"{file}.safetensors"
            place.parent.mkdir()
            place.write_bytes((GOLDEN / f"{name}.adapter.safetensors").read_bytes())
            adapters[str(config.get("peft_type", "MLX"))] = place.parent
    diffusers = folder / "metadata.safetensors"
    tensors = _described(GOLDEN / "peft-lora.adapter.safetensors")["tensors"]

    def enter(data: bytes) -> Iterable[Act]:
        kind = _document(data)
        kind = str(kind.get("peft_type", "MLX")) if isinstance(kind, dict) else ""
        adapter = adapters.get(kind, adapters["LORA"])
        (adapter / "adapter_config.json").write_bytes(data)
        text = data.decode("utf-8", "replace")
        write_tensors(diffusers, tensors, {"lora_adapter_metadata": text}, b"\x00\x3c")
        return [lambda: _plan(base, adapter), lambda: _run("inspect", adapter), lambda: _run("inspect", diffusers)]

    return enter


def _adapter_config_seeds() -> Iterable[bytes]:
    for name, case in golden_cases().items():
        config = _golden_config(name)
        if config is not None and case["base"] == "qwen2":
            yield _dumped(config)
    yield _dumped({"unet.r": 4, "unet.lora_alpha": 8, "unet.rank_pattern": {"a.*": 2}, "r": 2, "lora_alpha": 4})
    yield _dumped({"peft_type": "LORA", "r": 2, "alpha_pattern": {"^model\\.layers\\.(0|1)\\..*q_proj$": 7}})


def _recipe(folder: Path) -> Enter:
    """`bake.recipe` and the web UIs' keys in the metadata of a checkpoint: shown, replayed, carried on."""
    base = _golden_base("wan", folder)
    tensors = _described(base)["tensors"]
    library = folder / "library"
    library.mkdir()
    lora = _for_base("wan")
    (library / lora.name).write_bytes(lora.read_bytes())
    output = folder / "out.safetensors"

    def replay() -> None:
        recipe_from_record(stored_recipe(output), [library], "out.safetensors")

    def enter(data: bytes) -> Iterable[Act]:
        text = data.decode("utf-8", "replace")
        write_tensors(output, tensors, dict.fromkeys((RECIPE_KEY, "sd_merge_recipe", "sd_merge_models"), text), b"")
        return [
            replay,
            lambda: _plan(output, lora),
            lambda: _run("inspect", output, "-v"),
            lambda: _run("inspect", output, "--json"),
        ]

    return enter


def _recipe_seeds() -> Iterable[bytes]:
    lora = _for_base("wan")
    file = {"name": lora.name, "size": lora.stat().st_size, "sha256": "0" * 64}
    settings = {"dtype": "keep", "only": [], "allow_unmatched": False, "embeddings": "beside"}
    base = {"name": "base.safetensors", "packaging": "file", "files": [file]}
    adapter = {"name": lora.name, "files": [file], "weight": 0.5, "te": 1, "unet": None, "dyn": 2}
    record = {"schema": 1, "version": "0.1", "family": "sd1", "base": base, "adapters": [adapter], "settings": settings}
    yield _dumped(record)
    yield _dumped({**record, "base": {**base, "recipe": record}, "components": {"unet": [1, 2]}})
    yield _dumped({**record, "base": {**base, "packaging": "diffusers", "files": [{**file, "name": "unet/a"}, file]}})
    yield b"[" * 900 + b"]" * 900
    yield b'{"a":' * 900 + b"1" + b"}" * 900


def _undo(folder: Path) -> Enter:
    """An undo file: {"record": ..., "kept": {key: hexadecimal}}, beside the output that it is for."""
    output, place = _undo_output(folder), folder / "out.undo"

    def restore() -> None:
        reader = UndoReader(place)
        reader.difference_to(folder)
        for number in range(len(reader.record.base)):
            for _ in reader.pieces(number, lambda name: output, 1):
                pass

    def enter(data: bytes) -> Iterable[Act]:
        document = _document(data)
        found = document if isinstance(document, dict) else {"record": document}
        kept = found.get("kept")
        blobs = {key: _hexadecimal(value) for key, value in kept.items()} if isinstance(kept, dict) else {}
        placed = lay_out((key, "U8", (len(blob),)) for key, blob in blobs.items() if _is_unicode(key))
        text = json.dumps(found.get("record"))
        header = build_header(placed, {UNDO_KEY: text})
        place.write_bytes(header + b"".join(blobs[key] for key in placed))
        return [restore, lambda: _run("inspect", place)]

    return enter


def _undo_output(folder: Path) -> Path:
    """An output of two small tensors."""
    output = folder / "out.safetensors"
    placed = lay_out([("a", "F16", (4,)), ("b", "U8", (3,))])
    output.write_bytes(build_header(placed, {"format": "pt"}) + bytes(range(11)))
    return output


def _undo_seeds() -> Iterable[bytes]:
    """What bake writes for a base of which one tensor is another, with and without a side file."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        output, base, made = _undo_output(folder), folder / "base", folder / "made"
        base.write_bytes(output.read_bytes()[:-2] + b"\x07\x08")
        side = folder / "side"
        side.write_bytes(b"{}")
        weights = Source("a.safetensors", base, "out.safetensors", True)
        for sources in ([weights], [weights, Source("config.json", side, "out.safetensors", False)]):
            made.write_bytes(b"")
            descriptor = os.open(made, os.O_RDWR | getattr(os, "O_BINARY", 0))
            UndoWriter(descriptor, "zlib", 1, lambda count: None).write(sources, lambda name: output, "0.1.0")
            os.close(descriptor)
            file = open_tensors(made)
            kept = {key: read_tensor_bytes(file, key).hex() for key in file.tensors}
            yield _dumped({"record": json.loads(file.metadata[UNDO_KEY]), "kept": kept})
            file.close()


def _prompt(folder: Path) -> Enter:
    """A prompt with <lora:...> tags."""
    for name in ("style", "Style", "other/style", "fine lines", "a:b"):
        (folder / "loras" / name).parent.mkdir(parents=True, exist_ok=True)
        write_tensors(folder / "loras" / f"{name}.safetensors", {}, {"ss_output_name": f"{name} v2"}, b"")

    def enter(data: bytes) -> Iterable[Act]:
        text = data.decode("utf-8", "surrogateescape")
        return [lambda: choices_from_prompt(parse_prompt(text), LoraFolder(folder / "loras"))]

    return enter


def _prompt_seeds() -> Iterable[bytes]:
    yield b"a castle <lora:style:0.8>, <lora:fine lines:te=0.5:unet=1:dyn=4> fog <hypernet:x:1>"
    yield b"<lyco:a:b:1:2:3><lora:other/style><lora:stile:-1e3>"
    yield b"<lora:style:0.8:lbw=MIDD:step=3>"


def _words(folder: Path) -> Enter:
    """What may stand behind -l, --memory, --metadata and --dtype."""
    kinds: tuple[Any, ...] = (Weighted(), Size(), KeyValue(), ComponentDtype())

    def enter(data: bytes) -> Iterable[Act]:
        text = os.fsdecode(data.replace(b"\0", b""))  # no system passes on a word with a zero
        return [functools.partial(kind.convert, text, None, None) for kind in kinds]

    return enter


def _words_seeds() -> Iterable[bytes]:
    yield from (
        b"style.safetensors:0.8:te=0.5:unet=-1:dyn=4",
        b"C:\\loras\\a.safetensors:1e-3",
        b"a:b:c/d:2",
        b"512MiB",
    )
    yield from (b"1.5G", b"key=value=x", b"te=fp16", b"x" * 300 + b":0.5", b"a:1:inf", b"a:te=nan", b"\xff\xfe:1")


def _yaml(folder: Path) -> Enter:
    """A recipe file."""
    path = folder / "recipe.yaml"

    def enter(data: bytes) -> Iterable[Act]:
        path.write_bytes(data)
        return [lambda: read_recipe(path)]

    return enter


def _yaml_seeds() -> Iterable[bytes]:
    yield b"bake: 1\nbase: b\nloras:\n  - {path: a, weight: 0.5, lbw: MIDD}\n  - 'c:0.7:te=0.5'\noutput: o\n"
    yield b"merge: &m\n  method: ties\n  models: [a]\n  parameters: {density: 0.5}\nbakes: [{merge: {<<: *m}}]\n"
    yield b"merge_method: slerp\nmodels: [{model: .}]\nbase_model: .\nparameters:\n  t: [{filter: x, value: [0]}]\n"
    yield b'%YAML 1.1\n---\n"a\\x41\\u0041": !!str |-\n  b\n? c\n: # d\n  - &e ~\n  - *e\n...\n'


def _run_file(folder: Path) -> Enter:
    """The same as a document: planned, from real files."""
    shutil.copyfile(GOLDEN / "bases" / "wan.safetensors", folder / "base.safetensors")
    shutil.copyfile(_for_base("wan"), folder / "lora.safetensors")
    _golden_base("qwen2", folder)
    path = folder / "recipe.yaml"

    def enter(data: bytes) -> Iterable[Act]:
        path.write_bytes(data)
        return [lambda: _run("run", path, "--dry-run", "--json"), lambda: _run("run", path, "--dry-run")]

    return enter


def _run_file_seeds() -> Iterable[bytes]:
    base, lora, output = "base.safetensors", "lora.safetensors", "out.safetensors"
    setting = {"value": 0.5, "transformer": 1, "gradient": {"attn": [0, 1]}, "names": {"*.bias": 0}}
    merge = {"method": "linear", "models": [base, base], "parameters": {"weight": [0.5, setting], "normalize": True}}
    yield _dumped(
        {"bake": 1, "base": base, "loras": [f"{lora}:0.5", {"path": lora, "weight": 2, "te": 0}], "output": output}
    )
    yield _dumped({"merge": merge, "more_loras": lora, "dtype": {"all": "bf16"}, "output": output})
    yield _dumped(
        {"base": base, "bakes": [{"output": output, "dtype": "fp32"}, {"name": "b", "base": None, "merge": merge}]}
    )
    yield _dumped({"base": base, "prompt": "<lora:lora:1>", "lora_dir": ".", "metadata": {"a": 1}, "seed": 3})
    models = [{"model": "qwen2"}, {"model": "./qwen2", "parameters": {"density": 0.5, "weight": [0, 1]}}]
    shared = {"weight": [{"filter": "mlp", "value": [0, 1]}, {"value": 1}], "normalize": True, "int8_mask": True}
    both = {"merge_method": "ties", "base_model": "qwen2/", "dtype": "float16", "tokenizer_source": "base"}
    yield _dumped({**both, "models": models, "parameters": shared})
    sources = [{"model": "qwen2", "layer_range": [0, 2]}, {"model": "./qwen2", "layer_range": [0, 2]}]
    yield _dumped({"merge_method": "linear", "slices": [{"sources": sources, "parameters": {"weight": 1}}]})


def _pickle(folder: Path) -> Enter:
    """A .pt file."""
    path = folder / "a.pt"

    def read() -> None:
        file = open_tensors(path)
        for name in list(file.tensors)[:8]:
            if file.tensors[name].nbytes < 65536:
                read_tensor_bytes(file, name)

    def enter(data: bytes) -> Iterable[Act]:
        path.write_bytes(data)
        return [read, lambda: _run("inspect", path)]

    return enter


def _pickle_seeds() -> Iterable[bytes]:
    import torch

    tensor = torch.arange(4, dtype=torch.float16).reshape(2, 2)
    for content in ({"a": tensor, "b": tensor.T, "c": 1}, [tensor, tensor], {"state_dict": {"a": tensor[:1]}}):
        for zipped in (True, False):
            stream = io.BytesIO()
            torch.save(content, stream, _use_new_zipfile_serialization=zipped)
            yield stream.getvalue()
    yield b"\x80\x02}q\x00."


def _adapter(folder: Path) -> Enter:
    """A well-formed file with arbitrary names, shapes, metadata and configuration, as an adapter for a base."""
    bases = _bases(folder)
    adapter = folder / "adapter"
    adapter.mkdir()

    def enter(data: bytes) -> Iterable[Act]:
        document = _document(data)
        tensors = _tensors_of(document.get("tensors")) if isinstance(document, dict) else None
        if tensors is None:
            return []
        base = bases.get(str(document.get("base")), bases["sd1"])
        config = adapter / "adapter_config.json"
        path = adapter / "adapter_model.safetensors"
        config.unlink(missing_ok=True)
        if "config" in document:
            config.write_bytes(_dumped(document["config"]))
        write_tensors(path, tensors, _texts_of(document.get("metadata")), _hexadecimal(document.get("fill")))
        return [
            lambda: _plan(base, adapter, allow_unmatched=True),
            lambda: _plan(base, adapter, dtype="fp8_e4m3fn_scaled"),
            lambda: _run("inspect", adapter, "--against", base, "-v"),
            lambda: _run("inspect", adapter, "--json"),
        ]

    return enter


def _adapter_seeds() -> Iterable[bytes]:
    for name, case in golden_cases().items():
        config = _golden_config(name)
        described = _described(GOLDEN / f"{name}.adapter.safetensors")
        yield _dumped({"base": case["base"], **described, **({} if config is None else {"config": config})})


def _base(folder: Path) -> Enter:
    """A well-formed file with arbitrary names, shapes, metadata and configuration, as a base for an adapter."""
    model = folder / "model"
    model.mkdir()

    def enter(data: bytes) -> Iterable[Act]:
        document = _document(data)
        tensors = _tensors_of(document.get("tensors")) if isinstance(document, dict) else None
        if tensors is None:
            return []
        cases = golden_cases()
        name = str(document.get("adapter"))
        adapter = GOLDEN / f"{name if name in cases else 'lycoris-lora'}.adapter.safetensors"
        (model / "config.json").unlink(missing_ok=True)
        path = model / "model.safetensors"
        write_tensors(path, tensors, _texts_of(document.get("metadata")), _hexadecimal(document.get("fill")))
        base = path
        if "config" in document:
            (model / "config.json").write_bytes(_dumped(document["config"]))
            base = model
        return [
            lambda: _plan(base, adapter, allow_unmatched=True),
            lambda: _plan(base, dtype="fp8_e4m3fn_scaled"),
            lambda: _plan(base, dtype={"te": "fp16", "all": "bf16"}),
            lambda: _run("inspect", base),
            lambda: _run("inspect", base, "--json"),
        ]

    return enter


def _base_seeds() -> Iterable[bytes]:
    for path in sorted((GOLDEN / "bases").glob("*.safetensors")):
        config = GOLDEN / "bases" / f"{path.stem}.config.json"
        more = {"config": json.loads(config.read_text("utf-8"))} if config.is_file() else {}
        adapter = next(name for name, case in golden_cases().items() if case["base"] == path.stem)
        yield _dumped({"adapter": adapter, **_described(path), **more})
    scaled = {"a.weight": ["F8_E4M3", [4, 4]], "a.weight_scale": ["F32", []], "a.comfy_quant": ["U8", [40]]}
    yield _dumped({"tensors": {**scaled, "scaled_fp8": ["F8_E4M3", [0]]}, "metadata": {}, "fill": "0000803f"})


TARGETS = {
    "header": Target(_header, _header_seeds, is_json=False),
    "json-header": Target(_json_header, _json_header_seeds),
    "index": Target(_index, _index_seeds),
    "config": Target(_config, _config_seeds),
    "adapter-config": Target(_adapter_config, _adapter_config_seeds),
    "recipe": Target(_recipe, _recipe_seeds),
    "undo": Target(_undo, _undo_seeds),
    "prompt": Target(_prompt, _prompt_seeds, is_json=False),
    "words": Target(_words, _words_seeds, is_json=False),
    "yaml": Target(_yaml, _yaml_seeds, is_json=False),
    "run": Target(_run_file, _run_file_seeds),
    "pickle": Target(_pickle, _pickle_seeds, is_json=False),
    "adapter": Target(_adapter, _adapter_seeds),
    "base": Target(_base, _base_seeds),
}
