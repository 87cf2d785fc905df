"""Write the hostile files under fixtures/hostile, or check that they are up to date.

    python scripts/make_hostile.py [--check]

Each case is one file or small folder with one defect; cases.json says how it is given to bake, the exit code it has
to lead to, and words of the message. tests/test_hostile.py tries them all. Nothing here runs what the pickles ask for:
they are put together opcode by opcode.
"""

from __future__ import annotations

import argparse
import json
import math
import struct
import sys
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

from hostile_pickles import (
    EMPTY_DICT,
    EMPTY_LIST,
    NONE,
    archive,
    call,
    legacy,
    legacy_storage,
    many,
    name,
    number,
    pairs,
    pickled,
    row,
    storage,
    table,
    tar,
    tensor,
    text,
    zipped,
)

FOLDER = Path(__file__).resolve().parent.parent / "fixtures" / "hostile"
MALFORMED, USAGE, MISFIT, UNSUPPORTED, NOT_FINITE, DIFFERENT, FINE = 3, 2, 5, 6, 7, 9, 0

TARGET = "model.layers.0.self_attn.q_proj.weight"
MODULE = "base_model.model." + TARGET.removesuffix(".weight")
NUMBERS = struct.pack("<4f", 0.5, -0.25, 0.125, 1.0)  # 16 bytes
SHARD = "model-00001-of-00002.safetensors"
OTHER_SHARD = "model-00002-of-00002.safetensors"
INDEX = "model.safetensors.index.json"

Files = dict[str, bytes]


@dataclass(frozen=True)
class Case:
    """One defect."""

    name: str
    # base, adapter: what it is given as. baked: it is verified by its own recipe. undone: out.safetensors in it is
    # undone. run: it is a recipe itself. prompt: there is no file
    role: str
    exit: int
    says: str  # part of the message
    inspect: int | None = None  # the exit code of `bake inspect`, where it is another
    prompt: str | None = None
    files: Files = field(default_factory=dict)  # {"": content} for a single file
    suffix: str = ".safetensors"  # of a single file

    @property
    def path(self) -> str:
        return self.name + (self.suffix if "" in self.files else "")

    def entry(self) -> dict[str, Any]:
        """What cases.json says."""
        kept = {
            key: value for key, value in asdict(self).items() if key not in ("files", "suffix") and value is not None
        }
        return kept | ({"path": self.path} if self.files else {})


def container(header: Any, data: bytes = b"") -> bytes:
    """A safetensors file around a header given as data or as text."""
    content = header if isinstance(header, bytes) else json.dumps(header, separators=(",", ":")).encode()
    return len(content).to_bytes(8, "little") + content + data


def entry(dtype: str, shape: list[int], begin: int, end: int | None = None) -> dict[str, Any]:
    size = math.prod(shape) * {"F32": 4, "F16": 2, "U8": 1, "I64": 8}[dtype]
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, begin + size if end is None else end]}


def floats(tensors: Mapping[str, tuple[list[int], list[float]]], metadata: dict[str, str] | None = None) -> bytes:
    """A safetensors file of float32 tensors."""
    header: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    data = b""
    for key, (shape, values) in tensors.items():
        header[key] = entry("F32", shape, len(data))
        data += struct.pack(f"<{len(values)}f", *values)
    return container(header, data)


GOOD_BASE = floats({TARGET: ([4, 4], [0.25 * place for place in range(16)]), "model.norm.weight": ([4], [1.0] * 4)})
FACTORS = {f"{MODULE}.lora_A.weight": ([1, 4], [1.0] * 4), f"{MODULE}.lora_B.weight": ([4, 1], [0.5] * 4)}
GOOD_ADAPTER = floats(FACTORS)
CONFIG = {"peft_type": "LORA", "r": 1, "lora_alpha": 1}


def headers() -> Iterator[Case]:
    """Safetensors files."""
    one = entry("F32", [2, 2], 0)

    def case(what: str, says: str, content: bytes) -> Case:
        return Case(f"header-{what}", "base", MALFORMED, says, files={"": content})

    def tensor_case(what: str, says: str, **changed: Any) -> Case:
        return case(what, says, container({"a": {**one, **changed}}, NUMBERS))

    yield case("empty-file", "too short", b"")
    yield case("seven-bytes", "too short", bytes(7))
    yield case("length-huge", "the format allows 100000000", (2**63).to_bytes(8, "little") + b"{}")
    yield case("length-beyond-the-end", "truncated", (10**6).to_bytes(8, "little") + b"{}")
    yield case("no-json", "not valid JSON", container(b'{"a":'))
    yield case("no-object", "does not begin with '{'", container(b"[]"))
    yield case("space-first", "does not begin with '{'", container(b" {}"))
    yield case("html", "not a safetensors file", b"<!DOCTYPE html><title>404</title>")
    yield case("bad-utf8", "not valid JSON", container(b'{"\xff":{}}'))
    yield case(
        "half-a-character", "not valid JSON", container(b'{"\\ud800":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}')
    )
    yield case("not-a-number", "NaN", container(b'{"a":NaN}'))
    yield case("nesting", "not valid JSON", container(b'{"a":' + b"[" * 2_000))
    yield case("number-of-5000-digits", "not valid JSON", container(b'{"a":' + b"9" * 5000 + b"}"))
    twice = json.dumps(entry("U8", [1], 0))
    yield case("tensor-twice", "names 'a' twice", container(f'{{"a":{twice},"a":{twice}}}'.encode(), b"\0"))
    yield case("metadata-twice", "twice", container(b'{"__metadata__":{},"__metadata__":{}}'))
    yield case("metadata-key-twice", "twice", container(b'{"__metadata__":{"k":"1","k":"2"}}'))
    yield case("metadata-number", "__metadata__ must map names to text", container({"__metadata__": {"k": 1}}))
    yield case("metadata-list", "__metadata__ must map names to text", container({"__metadata__": []}))
    yield case("entry-number", "not a JSON object", container({"a": 1}))
    yield case("entry-empty", "unknown dtype None", container({"a": {}}))
    yield tensor_case("dtype-unknown", "unknown dtype 'F33'", dtype="F33")
    yield tensor_case("dtype-small-letters", "unknown dtype 'f32'", dtype="f32")
    yield tensor_case("dtype-escape-sequence", r"unknown dtype '\x1b[31mred", dtype="\x1b[31mred")
    yield tensor_case("dtype-of-a-page", "...", dtype="F" * 5000)
    yield tensor_case("shape-negative", "is not a shape", shape=[-2, -2])
    yield tensor_case("shape-fraction", "is not a shape", shape=[2.0, 2])
    yield tensor_case("shape-bool", "is not a shape", shape=[True, 4])
    yield tensor_case("shape-65-axes", "is not a shape", shape=[1] * 64 + [4])
    yield tensor_case("shape-overflow", "takes no whole number of bytes", shape=[2**40, 2**40])
    yield tensor_case("shape-wraps-64-bits", "takes", shape=[2**32, 2**32, 4])
    yield tensor_case("shape-too-large", "takes", shape=[2**30, 2**30])
    yield tensor_case("shape-missing", "is not a shape", shape=None)
    yield tensor_case("offsets-negative", "not a pair of offsets", data_offsets=[-16, 0])
    yield tensor_case("offsets-backwards", "not a pair of offsets", data_offsets=[16, 0])
    yield tensor_case("offsets-three", "not a pair of offsets", data_offsets=[0, 16, 16])
    yield tensor_case("offsets-beyond-64-bits", "not a pair of offsets", data_offsets=[0, 2**64 + 16])
    yield tensor_case("offsets-too-short", "takes", data_offsets=[0, 12])
    yield tensor_case("offsets-beyond-the-end", "leaves a hole before it", data_offsets=[16, 32])
    yield case(
        "half-a-byte",
        "takes no whole number",
        container({"a": {"dtype": "F4", "shape": [3], "data_offsets": [0, 1]}}, b"\0"),
    )
    overlap = {"a": one, "b": entry("F32", [2], 12)}
    yield case("overlap", "overlaps its neighbour", container(overlap, NUMBERS + bytes(4)))
    yield case("span-shared", "overlaps its neighbour", container({"a": one, "b": one}, NUMBERS))
    yield case("hole", "leaves a hole", container({"a": one, "b": entry("F32", [1], 20)}, NUMBERS + bytes(8)))
    yield case("bytes-after-the-end", "unknown bytes", container({"a": one}, NUMBERS + b"PK\x03\x04"))
    yield case("data-truncated", "truncated", container({"a": one}, NUMBERS[:-1]))
    odd = {"a": entry("U8", [1], 0), "b": entry("F32", [2, 2], 1), "none": entry("F16", [0, 4], 17)}
    yield Case(
        *("header-misaligned-and-empty", "base", 4, "base_model.model.model.layers.0.self_attn.q_proj"),
        inspect=FINE,
        files={"": container(odd, b"\x07" + NUMBERS)},
    )


def indexes() -> Iterator[Case]:
    """Folders with shards."""

    def case(
        what: str, says: str, index: bytes | None = None, listed: Mapping[str, Any] | None = None, **more: bytes
    ) -> Case:
        names = {TARGET: SHARD, "model.norm.weight": OTHER_SHARD} if listed is None else dict(listed)
        files = {
            SHARD: floats({TARGET: ([4, 4], [1.0] * 16)}),
            OTHER_SHARD: floats({"model.norm.weight": ([4], [1.0] * 4)}),
            INDEX: json.dumps({"metadata": {}, "weight_map": names}).encode() if index is None else index,
            "config.json": b'{"model_type": "llama"}',
        } | {key.replace("_json", ".json"): content for key, content in more.items()}
        return Case(
            f"shards-{what}", "base", MALFORMED, says, files={key: value for key, value in files.items() if value}
        )

    good = {TARGET: SHARD, "model.norm.weight": OTHER_SHARD}
    for what, shard in (
        ("climb", "../header-hole.safetensors"),
        ("absolute", "/etc/passwd"),
        ("sub-folder", "sub/model.safetensors"),
        ("backslash", "..\\model.safetensors"),
        ("drive", "C:model.safetensors"),
        ("no-safetensors", "config.json"),
        ("two-dots", ".."),
    ):
        yield case(what, "is not the name of a shard", listed={**good, TARGET: shard})
    yield case("nul", "is missing", listed={**good, TARGET: "model\0.safetensors"})
    yield case(
        "missing",
        "model-00003-of-00002.safetensors is missing",
        listed={**good, "c": "model-00003-of-00002.safetensors"},
    )
    yield case("tensor-in-the-wrong-one", "is not in", listed={**good, TARGET: OTHER_SHARD})
    yield case("tensor-listed-only", "'c' is not in", listed={**good, "c": SHARD})
    yield case("tensor-not-listed", "is in the file but not listed", listed={TARGET: SHARD} | {"x": OTHER_SHARD})
    double = f'{{"weight_map":{{"{TARGET}":"{SHARD}","{TARGET}":"{OTHER_SHARD}"}}}}'
    yield case("tensor-twice", "twice", index=double.encode())
    yield case("no-map", "weight_map does not map", index=b"{}")
    yield case("map-list", "weight_map does not map", index=b'{"weight_map":[]}')
    yield case("map-number", "weight_map does not map", index=b'{"weight_map":{"a":1}}')
    yield case("no-object", "not a JSON object", index=b"[]")
    yield case("no-json", "not valid JSON", index=b'{"weight_map":')
    yield case("nesting", "nested deeper", index=b'{"a":' + b"[" * 500 + b"]" * 500 + b"}")
    yield case("bad-utf8", "not valid JSON", index=b'{"\xff":1}')
    yield case("config-no-json", "not valid JSON", config_json=b"{")
    yield case("config-list", "not a JSON object", config_json=b"[]")
    yield case("config-twice", "names 'model_type' twice", config_json=b'{"model_type":"llama","model_type":"gemma"}')
    yield case("config-half-a-character", "not valid JSON", config_json=b'{"model_type":"\\udcff"}')
    unet = {"unet/diffusion_pytorch_model.safetensors": GOOD_BASE}
    for what, says, index in (("no-json", "not valid JSON", b"{"), ("no-object", "not a JSON object", b"[]")):
        yield Case(f"model-index-{what}", "base", MALFORMED, says, files={"model_index.json": index, **unet})
    yield Case("model-index-alone", "base", MALFORMED, "no component folder", files={"model_index.json": b"{}"})


def configurations() -> Iterator[Case]:
    """Folders of PEFT."""

    def case(what: str, exit: int, says: str, config: bytes | dict[str, Any], **more: Any) -> Case:
        content = config if isinstance(config, bytes) else json.dumps(CONFIG | config).encode()
        files = {"adapter_model.safetensors": GOOD_ADAPTER, "adapter_config.json": content}
        return Case(f"peft-{what}", "adapter", exit, says, files=files, **more)

    yield case("good", FINE, "", CONFIG)
    yield case("no-json", MALFORMED, "not valid JSON", b'{"peft_type"')
    yield case("no-object", MALFORMED, "not a JSON object", b'"LORA"')
    yield case(
        "alpha-twice",
        MALFORMED,
        "names 'lora_alpha' twice",
        b'{"peft_type":"LORA","r":1,"lora_alpha":1,"lora_alpha":64}',
    )
    yield case("nesting", MALFORMED, "not valid JSON", b'{"peft_type":' + b"[" * 2_000)
    yield case("alpha-nan", MALFORMED, "no finite number", b'{"peft_type":"LORA","r":1,"lora_alpha":NaN}')
    yield case("alpha-infinite", MALFORMED, "no finite number", b'{"peft_type":"LORA","r":1,"lora_alpha":1e999}')
    yield case("alpha-text", MALFORMED, "malformed", {"lora_alpha": "much"})
    yield case("alpha-overflows", NOT_FINITE, "F32 ends at", {"lora_alpha": 1e308}, inspect=FINE)
    yield case("rank-wrong", MALFORMED, "rank 8 for", {"r": 8})
    yield case("rank-negative", MALFORMED, "rank -1 for", {"r": -1})
    yield case("rank-text", MALFORMED, "malformed", {"r": "one"})
    yield case("pattern-bomb", UNSUPPORTED, "more complex", {"alpha_pattern": {"(a+)+$": 2}}, inspect=FINE)
    yield case("pattern-broken", MALFORMED, "malformed", {"alpha_pattern": {"(": 2}})
    yield case(
        "series-endless",
        MALFORMED,
        "at most 100",
        {"peft_type": "OFT", "oft_block_size": 2, "num_cayley_neumann_terms": 10**9},
    )
    yield case("rows-negative", MALFORMED, "no list of row numbers", {"trainable_token_indices": [-1]})


def numbers() -> Iterator[Case]:
    """Adapters whose numbers are none."""
    nan, infinity = math.nan, math.inf
    up, down = f"{MODULE}.lora_B.weight", f"{MODULE}.lora_A.weight"

    def case(what: str, exit: int, says: str, inspect: int | None, **changed: Any) -> Case:
        return Case(
            f"numbers-{what}", "adapter", exit, says, inspect, files={"": floats({**FACTORS, **changed["tensors"]})}
        )

    alpha = f"{MODULE}.alpha"
    yield case("alpha-nan", NOT_FINITE, "is nan", None, tensors={alpha: ([], [nan])})
    yield case("alpha-infinite", NOT_FINITE, "is -inf", None, tensors={alpha: ([1], [-infinity])})
    yield case("alpha-two", MALFORMED, "should be one number", None, tensors={alpha: ([2], [1.0, 1.0])})
    yield case("alpha-none", MALFORMED, "should be one number", None, tensors={alpha: ([0], [])})
    yield case("alpha-zero", FINE, "", None, tensors={alpha: ([], [0.0])})
    yield case("alpha-negative", FINE, "", None, tensors={alpha: ([], [-1.0])})
    yield case("factor-nan", NOT_FINITE, "holds NaN", FINE, tensors={down: ([1, 4], [nan, 1.0, 1.0, 1.0])})
    yield case("factor-infinite", NOT_FINITE, "holds NaN", FINE, tensors={up: ([4, 1], [infinity, 0.0, 0.0, 0.0])})
    yield case("rank-zero", FINE, "", None, tensors={up: ([4, 0], []), down: ([0, 4], [])})
    yield case("height-zero", MISFIT, "", FINE, tensors={up: ([0, 1], [])})
    yield case(
        "sum-overflows", NOT_FINITE, "F32 ends at", FINE, tensors={up: ([4, 1], [3e38] * 4), down: ([1, 4], [2.0] * 4)}
    )


def pickles() -> Iterator[Case]:
    """PyTorch's own files."""
    good = tensor(storage(), (2, 2), (2, 1))
    old_good = tensor(legacy_storage(), (2, 2), (2, 1))
    up, down = f"{MODULE}.lora_B.weight", f"{MODULE}.lora_A.weight"
    factors = {up: tensor(storage("0"), (4, 1), (1, 1)), down: tensor(storage("1"), (1, 4), (4, 1))}
    old_factors = {up: tensor(legacy_storage("0"), (4, 1), (1, 1)), down: tensor(legacy_storage("1"), (1, 4), (4, 1))}
    shell = call(name("os", "system"), text("touch owned"))
    evaluated = call(name("builtins", "eval"), text("open('owned', 'w')"))
    state = {"0": NUMBERS, "1": NUMBERS}

    def case(what: str, says: str, content: bytes, exit: int = MALFORMED) -> Case:
        return Case(f"pickle-{what}", "adapter", exit, says, files={"": content}, suffix=".pt")

    def held(what: str, says: str, content: bytes, exit: int = MALFORMED) -> Case:
        return case(what, says, archive(content, {"0": NUMBERS}), exit)

    yield case("good", "", archive(table(factors), state), FINE)
    yield case("good-legacy", "", legacy(table(old_factors), state), FINE)
    yield held("wants-system", "os.system", shell)
    yield held("wants-eval", "builtins.eval", evaluated)
    yield held("wants-system-inside", "os.system", table({"state_dict": table({"a": good, "b": many(shell)})}))
    yield held("wants-a-path", "asks for", table({"a": name("pathlib", "Path")}))
    yield case("wants-system-legacy", "os.system", legacy(table({"a": old_good, "b": shell}), {"0": NUMBERS}))
    yield case("wants-system-bare", "os.system", pickled(shell))
    yield case("no-torch", "not one of PyTorch's", pickled(table({"a": number(1)})))
    yield case("tar", "a tar archive", tar(pickled(number(0x1950A86A20F9469CFC6C)), b"storages"))
    script = (("archive/constants.pkl", pickled(EMPTY_LIST)), ("archive/code/__torch__.py", b"import os"))
    yield case("torchscript", "TorchScript", archive(table({"a": good}), {"0": NUMBERS}, script))
    record = ("archive/data.pkl", pickled(table({"a": good})))
    yield case("bomb", "unpack to", zipped([record], 2**40))
    yield case("compressed", "packed again", zipped([record], len(record[1])))
    yield case("two-pickles", "2 records called data.pkl", zipped([record, ("other/data.pkl", record[1])]))
    yield case("no-pickle", "0 records called data.pkl", zipped([("archive/data/0", NUMBERS)]))
    yield case("no-end", "not a readable PyTorch file", archive(table({"a": good}), {"0": NUMBERS})[:-30])
    yield case("nothing-but-a-mark", "not a readable PyTorch file", b"PK\x03\x04")
    yield case("legacy-truncated", "not a readable PyTorch file", legacy(table({"a": old_good}), {"0": NUMBERS})[:-8])
    yield case("legacy-cut-in-the-pickle", "not a readable PyTorch file", legacy(table({"a": old_good}))[:60])
    yield held("storage-too-long", "truncated: storage '0'", table({"a": tensor(storage(count=5), (5,), (1,))}))
    yield held("storage-absurd", "truncated: storage '0'", table({"a": tensor(storage(count=2**60), (2,), (1,))}))
    yield held("storage-negative", "not a readable PyTorch file", table({"a": tensor(storage(count=-4), (2,), (1,))}))
    yield held("storage-missing", "truncated: storage 'x'", table({"a": tensor(storage("x"), (2,), (1,))}))
    yield held("storage-path", "truncated: storage '../../a'", table({"a": tensor(storage("../../a"), (2,), (1,))}))
    big = table({"a": tensor(legacy_storage(count=2**40), (2,), (1,))})
    yield case("legacy-storage-absurd", "truncated", legacy(big, {"0": NUMBERS}))
    yield held("persistent-module", "is not a storage", table({"a": row(text("module"), *[text("x")] * 4) + b"Q"}))
    others = (("../../climbed", b"x"), ("/tmp/absolute", b"x"))
    yield case("records-climb", "a record called '../../climbed'", archive(table(factors), state, others))
    yield held("view-beyond-the-end", "not a readable PyTorch file", table({"a": tensor(storage(), (2,), (1,), 3)}))
    yield held("view-repeats", "repeats the numbers", table({"a": tensor(storage(), (10**6, 10**6), (0, 0))}))
    meta = call(
        *(name("torch._utils", "_rebuild_meta_tensor_no_storage"), name("torch", "float32")),
        *(row(number(10**6), number(10**6)), row(number(10**6), number(1)), b"\x89"),
    )
    yield held("no-storage", "which bake does not read", table({"a": meta}), UNSUPPORTED)
    # Every level holds the one before it 40 times, and the memory is that of one.
    levels = many(NONE) + b"q\x00"
    for level in range(6):
        levels = many(levels, *(b"h" + bytes([level]) for _ in range(39))) + b"q" + bytes([level + 1])
    yield held("sharing-bomb", "hold each other too often", levels)
    yield held("itself", "more than 8 deep", EMPTY_LIST + b"q\x00h\x00a")
    deep = good
    for _ in range(12):
        deep = table({"a": deep})
    yield held("nesting", "more than 8 deep", deep)
    yield held("tuple-bomb", "tuples of tuples", pairs((row() + b"\x85" * 2_000, NONE)))
    yield held("name-twice", "twice", table({"a.b": good, "a": table({"b": good})}))
    yield held("name-reserved", "as the name of a tensor", table({"__metadata__": good}))
    yield held("name-half-a-character", "as the name of a tensor", table({"\ud800": good}))
    yield held(
        "memo-absurd",
        "asks for 'os.system'",
        table({"a": EMPTY_DICT + b"r\xff\xff\xff\x7f", "b": name("os", "system")}),
    )
    yield held("length-absurd", "not a readable PyTorch file", b"X\xff\xff\xff\xff")
    yield case("legacy-length-absurd", "not a readable PyTorch file", b"\x80\x04\x8d" + b"\xff" * 7 + b"\x0f")
    yield held("number-too-long", "", table({"a": number(2**40_000)}))
    yield held("calls-storage", "asks for 'torch.FloatStorage'", call(name("torch", "FloatStorage"), number(2**40)))
    yield held("calls-bytearray", "asks for 'builtins.bytearray'", call(name("builtins", "bytearray"), number(2**40)))
    large = table({str(key): NONE for key in range(100)}) + b"q\x01"
    copied = call(name("collections", "OrderedDict"), b"h\x01")
    yield held("copies-copies", "copy more than there is", many(large, *[copied] * 150))


def recipes() -> Iterator[Case]:
    """Outputs that say what they were made of."""
    base = {"name": "base.safetensors", "size": len(GOOD_BASE), "sha256": sha256(GOOD_BASE).hexdigest()}
    lora = {"name": "adapter.safetensors", "size": len(GOOD_ADAPTER), "sha256": sha256(GOOD_ADAPTER).hexdigest()}
    record: dict[str, Any] = {
        "schema": 1,
        "version": "0.1.0",
        "base": {"name": "base.safetensors", "packaging": "file", "files": [base]},
        "adapters": [{"name": "adapter.safetensors", "files": [lora], "weight": 0.0}],
        "settings": {"dtype": "keep", "only": [], "allow_unmatched": False, "embeddings": "beside"},
    }

    def case(what: str, says: str, recipe: Any) -> Case:
        written = recipe if isinstance(recipe, str) else json.dumps(recipe)
        content = floats({TARGET: ([4, 4], [0.0] * 16)}, {"bake.recipe": written})
        return Case(f"recipe-{what}", "baked", MALFORMED, says, inspect=FINE, files={"": content})

    def adapter(**changed: Any) -> dict[str, Any]:
        return {**record, "adapters": [{**record["adapters"][0], **changed}]}

    def settings(**changed: Any) -> dict[str, Any]:
        return {**record, "settings": {**record["settings"], **changed}}

    yield case("no-json", "not valid JSON", "{")
    yield case("no-object", "not a JSON object", "[]")
    yield case("nesting", "not valid JSON", '{"a":' + "[" * 2_000)
    yield case("schema", "a recipe of schema 99", {**record, "schema": 99})
    yield case("empty", "malformed", {})
    yield case("adapters-number", "malformed", {**record, "adapters": 1})
    yield case("adapters-of-numbers", "malformed", {**record, "adapters": [1]})
    yield case("files-empty", "malformed", adapter(files=[]))
    yield case("file-unknown", "which is not below", adapter(files=[{**lora, "sha256": "0" * 64}]))
    yield case("name-climbs", "leads out of its folder", adapter(files=[{**lora, "name": "../../adapter.safetensors"}]))
    yield case("name-absolute", "leads out of its folder", adapter(files=[{**lora, "name": "/etc/passwd"}]))
    yield case("name-number", "malformed", adapter(files=[{**lora, "name": 1}]))
    yield case("weight-nan", "cannot be replayed", json.dumps(adapter(weight=math.nan)))
    yield case("weight-text", "malformed", adapter(weight="much"))
    yield case("ranks-negative", "cannot be replayed", adapter(weight=1.0, dyn=-1))
    yield case("dtype", "cannot be replayed", settings(dtype="fp12"))
    yield case("rounding", "cannot be replayed", settings(rounding="up"))
    yield case("only", "cannot be replayed", settings(only=["hat"]))
    yield case("packaging", "malformed", {**record, "base": {**record["base"], "packaging": "crate", "files": []}})


def stored(data: bytes) -> bytes:
    """`data` as zlib stores what it cannot compress: the same bytes from every zlib."""
    block = struct.pack("<BHH", 1, len(data), len(data) ^ 0xFFFF) + data
    return b"\x78\x01" + block + struct.pack(">I", zlib.adler32(data))


def frame(data: bytes) -> bytes:
    """A frame of an undo file with bytes that nothing in the output is like: their signs are folded."""
    return framed(stored(bytes(byte << 1 if byte < 128 else (255 - byte) * 2 + 1 for byte in data)))


def framed(content: bytes) -> bytes:
    return len(content).to_bytes(4, "little") + content


def undos() -> Iterator[Case]:
    """Outputs with undo files beside them. The base is the output with another header."""
    length = int.from_bytes(GOOD_BASE[:8], "little")
    header = (length + 2).to_bytes(8, "little") + GOOD_BASE[8 : 8 + length] + b"  "
    base = header + GOOD_BASE[8 + length :]
    written = {"name": "", "size": len(GOOD_BASE), "sha256": sha256(GOOD_BASE).hexdigest()}
    kept = {"name": "", "size": len(base), "sha256": sha256(base).hexdigest(), "like": "", "header": len(header)}
    record: dict[str, Any] = {"schema": 1, "version": "0.1.0", "packing": "zlib", "output": [written], "base": [kept]}
    parts = {"0": frame(header)}

    def case(what: str, exit: int, says: str, written: Any = None, parts: Mapping[str, bytes] = parts) -> Case:
        text = written if isinstance(written, str) else json.dumps(record if written is None else written)
        entries: dict[str, Any] = {"__metadata__": {"bake.undo": text}}
        data = b""
        for key, content in parts.items():
            entries[key] = entry("U8", [len(content)], len(data))
            data += content
        return Case(
            f"undo-{what}",
            "undone",
            exit,
            says,
            files={"out.safetensors": GOOD_BASE, "out.undo": container(entries, data)},
        )

    def of_base(what: str, exit: int, says: str, parts: Mapping[str, bytes] = parts, **changed: Any) -> Case:
        return case(what, exit, says, {**record, "base": [{**kept, **changed}]}, parts)

    def of_output(what: str, exit: int, says: str, **changed: Any) -> Case:
        return case(what, exit, says, {**record, "output": [{**record["output"][0], **changed}]})

    yield case("good", FINE, "")
    yield case("no-json", MALFORMED, "not valid JSON", "{")
    yield case("no-object", MALFORMED, "not a JSON object", "[]")
    yield case("twice", MALFORMED, "names 'schema' twice", '{"schema":1,"schema":1}')
    yield case("schema", MALFORMED, "schema 99", {**record, "schema": 99})
    yield case("empty", MALFORMED, "malformed", {"schema": 1})
    yield case("packing", MALFORMED, "'rar' is unknown", {**record, "packing": "rar"})
    yield case("base-none", MALFORMED, "no list of different files", {**record, "base": []})
    yield case("base-number", MALFORMED, "malformed", {**record, "base": 1})
    yield case("base-twice", MALFORMED, "no list of different files", {**record, "base": [kept, kept]})
    inside = [{**kept, "name": "a"}, {**kept, "name": "a/b"}]
    yield case("base-inside-itself", MALFORMED, "is a file and a folder", {**record, "base": inside})
    for what, climbing in (
        *(("climbs", "../owned.safetensors"), ("absolute", "/tmp/owned.safetensors"), ("drive", "C:owned.safetensors")),
        *(("backslash", "..\\owned.safetensors"), ("nul", "owned\0.safetensors"), ("dot", ".")),
    ):
        yield of_base(f"name-{what}", MALFORMED, "is not the name of a file", name=climbing)
    yield of_base("name-number", MALFORMED, "malformed", name=1)
    yield of_output("output-climbs", MALFORMED, "is not the name of a file", name="../good/base.safetensors")
    yield of_base("like-unknown", MALFORMED, "'x' is unknown", like="x")
    yield of_base("size-negative", MALFORMED, "is no size", size=-1)
    yield of_base("size-fraction", MALFORMED, "is no size", size=1.5)
    yield of_base("size-huge", MALFORMED, "is no size", size=2**70)
    yield of_base("size-absurd", 8, "the output takes", size=2**60)
    yield of_base("size-other", MALFORMED, "unknown bytes", size=len(base) + 1)
    yield of_base("sha256-short", MALFORMED, "is no SHA-256", sha256="ab")
    yield of_base("sha256-other", DIFFERENT, "it is damaged", sha256="0" * 64)
    yield of_output("output-other", MISFIT, "does not belong to", sha256="0" * 64)
    elsewhere = {**written, "name": "more.safetensors"}
    yield case(
        "output-missing",
        MISFIT,
        "is missing",
        {**record, "output": [written | {"name": "a"}, elsewhere], "base": [{**kept, "like": "more.safetensors"}]},
    )
    yield of_base("header-huge", MALFORMED, "a header of", header=2**40, size=2**50)
    yield of_base("header-longer", MALFORMED, "damaged", header=len(header) + 8)
    yield of_base("header-none", DIFFERENT, "it is damaged", parts={"0": frame(base)}, header=None, sha256="1" * 64)
    yield case("header-missing", MALFORMED, "should hold '0'", parts={})
    hole = header.replace(b'"data_offsets":[0,64]', b'"data_offsets":[4,64]')
    yield case("header-malformed", MALFORMED, "its offsets span 60", parts={"0": frame(hole)})
    more = header.replace(b"model.norm", b"model.Norm")
    yield case("tensor-missing", MALFORMED, "should hold '0:model.Norm.weight'", parts={"0": frame(more)})
    yield case("frame-longer", MALFORMED, "a frame is longer", parts={"0": framed(b"")[:-1] + b"\x7f"})
    yield case("frame-cut", MALFORMED, "a frame is longer", parts={"0": frame(header)[:-1]})
    yield case("frame-more", MALFORMED, "more follows", parts={"0": frame(header) + b"\0"})
    yield case("frame-nonsense", MALFORMED, "damaged", parts={"0": framed(b"nonsense")})
    yield case("frame-short", MALFORMED, "does not hold", parts={"0": frame(header[:-1])})
    yield case("frame-long", MALFORMED, "does not hold", parts={"0": frame(header + b" ")})
    yield case("frame-followed", MALFORMED, "does not hold", parts={"0": framed(frame(header)[4:] + b"x")})


def prompts() -> Iterator[Case]:
    """Names in prompts; the folder is good/, in which there is an adapter called "adapter"."""

    def case(what: str, prompt: str, says: str = "no LoRA called", exit: int = USAGE) -> Case:
        return Case(f"prompt-{what}", "prompt", exit, says, prompt=prompt)

    yield case("good", "<lora:adapter:1>", "", FINE)
    yield case("climbs", "<lora:../good/adapter:1>")
    yield case("climbs-within", "<lora:x/../adapter:1>")
    yield case("absolute", "<lora:/etc/passwd:1>")
    yield case("two-dots", "<lora:..:1>")
    yield case("nul", "<lora:adapter\0:1>")
    yield case("pattern", "<lora:*:1>")
    yield case("suffix", "<lora:adapter.safetensors:1>")
    yield case("no-name", "<lora::1>")
    yield case("weight-nan", "<lora:adapter:nan>", "not a finite number")
    yield case("weight-infinite", "<lora:adapter:1e999>", "not a finite number")
    yield case("weight-text", "<lora:adapter:much>", "not a number")
    yield case("ranks-zero", "<lora:adapter:1:1:0>", "at least 1")


def recipe_files() -> Iterator[Case]:
    """Files for `bake run`, beside good/."""
    base, lora = "good/base.safetensors", "good/adapter.safetensors"
    good = f"base: {base}\nloras: [{lora}]\noutput: work/out.safetensors\n"

    def case(what: str, says: str, content: str | bytes, exit: int = MALFORMED) -> Case:
        data = content if isinstance(content, bytes) else content.encode()
        return Case(f"yaml-{what}", "run", exit, says, files={"": data}, suffix=".yaml")

    bomb = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
        f"a{level}: &a{level} [{', '.join([f'*a{level - 1}'] * 10)}]\n" for level in range(1, 9)
    )
    yield case("good", "", good, FINE)
    yield case("empty", "the file is empty", "")
    yield case("open-quote", "not valid YAML", good + "name: 'mine\n")
    yield case("bad-utf8", "not UTF-8", b"base: \xff\n")
    yield case("control-character", "YAML does not allow", b"base: \x07\n")
    yield case("nul", "control character", 'base: "a\\0b"\n')
    yield case("half-a-character", "control character", 'base: "\\uD800"\n')
    yield case("no-character", "not valid YAML", 'base: "\\UFFFFFFFF"\n')
    yield case("version-of-5000-digits", "not valid YAML", "%YAML 1." + "9" * 5000 + "\n---\nbase: a\n")
    yield case("nesting", "nested deeper", "loras: " + "[" * 5_000)
    yield case("alias-bomb", "aliases written out", bomb)
    yield case("alias-of-itself", "aliases written out", "loras: &a [*a]\n")
    yield case("merge-of-itself", "aliases written out", "merge: &a {<<: *a}\n")
    yield case("tag-system", "tags", "base: !!python/object/apply:os.system ['touch owned']\n")
    yield case("tag-module", "tags", "!!python/module:os\n")
    yield case("tag-env", "tags", "base: !ENV ${HOME}\n")
    yield case("key-twice", "stands here twice", good + f"base: {lora}\n")
    yield case("key-is-a-list", "a key is one word", "? [a]\n: b\n")
    yield case("two-documents", "single document", good + "---\n" + good)
    yield case("list", "a mapping, was expected", "- base\n", USAGE)
    yield case("key-unknown", "is it loras?", good.replace("loras:", "lora:"), USAGE)
    yield case("home", "there is no such file", good.replace(base, "$HOME/base.safetensors"))
    yield case("name-too-long", "a path of 5000 characters", good.replace(base, "b" * 5000), USAGE)
    yield case("weight-nan", "not a finite number", good.replace(f"[{lora}]", f"{{path: {lora}, weight: .nan}}"), USAGE)
    yield case("weight-overflows", "not a finite number", good.replace(lora, f"{lora}:1e999"), USAGE)
    yield case("number-of-5000-digits", "a whole number was expected", good + f"seed: {'9' * 5000}\n", USAGE)
    yield case("mergekit-hub", "bake downloads nothing", "merge_method: linear\nmodels: [{model: someone/model}]\n")
    yield case("mergekit-climbs", "there is no such folder", "merge_method: linear\nmodels: [{model: ../../x}]\n")
    yield case("mergekit-models-number", "a list of models", "merge_method: linear\nmodels: 1\n", USAGE)


def make_cases() -> list[Case]:
    """Every case."""
    kinds = (headers, indexes, configurations, numbers, pickles, recipes, undos, prompts, recipe_files)
    return [case for kind in kinds for case in kind()]


def make_files() -> dict[Path, bytes]:
    """Path -> content of everything below fixtures/hostile."""
    cases = make_cases()
    files = {FOLDER / "good" / "base.safetensors": GOOD_BASE, FOLDER / "good" / "adapter.safetensors": GOOD_ADAPTER}
    files[FOLDER / "cases.json"] = (json.dumps([case.entry() for case in cases], indent=1) + "\n").encode()
    for case in cases:
        for relative, content in case.files.items():
            files[FOLDER / case.path / relative if relative else FOLDER / case.path] = content
    return files


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--check", action="store_true", help="only compare; exit 1 if a file is stale")
    check = parser.parse_args().check
    files = make_files()
    stale = [path for path, content in files.items() if not path.is_file() or path.read_bytes() != content]
    stale += [path for path in FOLDER.rglob("*") if path.is_file() and path not in files]
    if check:
        if stale:
            sys.exit(f"{len(stale)} files are stale, e.g. {stale[0]}: run python scripts/make_hostile.py")
        print(f"{len(files)} files are current")
        return
    for path in stale:
        if path not in files:
            path.unlink()
            continue
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(files[path])
    print(f"{len(stale)} files written or removed")


if __name__ == "__main__":
    main()
