"""Make the models and adapters that scripts/bench.py measures: real names and shapes, random values.

    python scripts/bench_models.py FOLDER --model sd15 --adapter lora:32:attention:0.8 [--scale-down 32]
    python scripts/bench_models.py FOLDER --model sd15 --merge 0.5

writes FOLDER/sd15.safetensors (or FOLDER/llm/), the adapters, and FOLDER/job.json, which says what is where
and which tensor each adapter module belongs to, so that results can be judged without bake's own tables. --merge
writes a second model instead of adapters, FOLDER/tuned/sd15.safetensors, and says how much of it is wanted.

A model is sd15, sdxl, llm, or the path of a name list: JSON, perhaps gzipped, with "tensors"
{name: [dtype, shape]} in file order and "about" {"layout", "files" {path: count}, "config" {path: JSON}}.

An adapter is KIND:RANK:OVER:WEIGHT. Kinds: lora, loha, lokr, dora in kohya's names for Stable Diffusion,
lora in PEFT's for language models and in ComfyUI's or diffusers' for other lists. OVER: cross (keys and values
of the cross-attention), attention (all of the UNet's transformers, and the text encoder), everything (convolutions
too).

How large an update is decides how many bits of the result it changes, so it has to be that of trained adapters. The
root mean square of their updates at weight 1 was measured on published files: 0.0004 to 0.005 on Stable Diffusion 1
(four LoRAs and LoKrs; the weights there are around 0.02 to 0.05), 0.003 on GPT-2's 0.14. Here it is 2 % of the
weights', everywhere: down has the spread of the trainers' initialisation, up is scaled to fit.
"""

from __future__ import annotations

import argparse
import gzip
import itertools
import json
import math
import re
import shutil
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import layouts
import numpy as np

from bake.dtypes import DTYPES
from bake.io.header import build_header, lay_out
from bake.keys import unet

WEIGHT_SPREAD = 0.02  # standard deviation of every weight
UPDATE_SHARE = 0.02  # root mean square of an update at weight 1, over that of the weights
TUNED_SHARE = 0.1  # the same of what a second model has learned
LOKR_FACTOR = 8  # of LyCORIS: the size of the small Kronecker factor
_POOL = 4_194_301  # random values, used over and over; prime, so that the rows of a tensor do not repeat
_SMALLEST = 64  # dimensions up to this are not scaled down: kernels, channels of images

Shape = tuple[int, ...]
Tensors = dict[str, tuple[str, Shape]]  # name -> (dtype, shape)


@dataclass(frozen=True)
class Model:
    """What a checkpoint is made of."""

    name: str
    files: Mapping[str, Tensors]  # by path in its folder; one file "" where it is no folder
    config: Mapping[str, Any] = field(default_factory=dict)  # JSON files of the folder, by path
    layout: str = "original"

    @property
    def shapes(self) -> dict[str, Shape]:
        return {name: shape for tensors in self.files.values() for name, (_, shape) in tensors.items()}


@dataclass(frozen=True)
class Module:
    """One place that adapters train."""

    name: str  # in the adapter's names
    tensor: str  # of the base
    shape: Shape
    rows: tuple[int, int]  # of that tensor


@dataclass(frozen=True)
class Adapter:
    """KIND:RANK:OVER:WEIGHT, parsed."""

    kind: str
    rank: int
    over: str
    weight: float

    @property
    def scale(self) -> float:
        """alpha / rank: kohya's users set alpha to half the rank, PEFT's to twice the rank."""
        return 2.0 if self.kind == "peft" else 0.5


KINDS = ("lora", "loha", "lokr", "dora")
OVER = {"cross": r"_attn2_to_[kv]$", "attention": r"^lora_te|_attentions_", "everything": ""}


def parse_adapter(text: str) -> Adapter:
    """Raises ValueError for words that are no adapter."""
    kind, rank, over, weight = text.split(":")
    if kind not in KINDS or over not in OVER:
        raise ValueError(f"{text}: KIND is one of {', '.join(KINDS)}, OVER of {', '.join(OVER)}")
    return Adapter(kind, int(rank), over, float(weight))


# ---- models


def build_model(name: str, scale_down: int = 1) -> Model:
    """The model called `name`, or that of the list at the path `name`, dimensions above 64 divided by `scale_down`."""
    if name in ("sd15", "sdxl"):
        shapes = layouts.sd1() if name == "sd15" else layouts.sdxl()
        stored = {tensor: (layouts.stored_dtype(tensor), shape) for tensor, shape in shapes.items()}
        model = Model(name, {"": stored})
    elif name == "llm":
        model = _language_model()
    else:
        model = _listed(Path(name))
    files = {
        path: {
            tensor: (dtype, tuple(size // scale_down if size > _SMALLEST else size for size in shape))
            for tensor, (dtype, shape) in tensors.items()
        }
        for path, tensors in model.files.items()
    }
    return Model(model.name, files, model.config, model.layout)


def _language_model(layers: int = 24, width: int = 896, inner: int = 4864, words: int = 151936) -> Model:
    """Qwen2.5-0.5B with a head of its own, 630 million values, in three shards."""
    tensors: Tensors = {"model.embed_tokens.weight": ("BF16", (words, width))}
    keys = 128  # two heads of 64, shared by seven queries each
    for layer in (f"model.layers.{number}" for number in range(layers)):
        for projection, out in (("q", width), ("k", keys), ("v", keys)):
            tensors[f"{layer}.self_attn.{projection}_proj.weight"] = ("BF16", (out, width))
            tensors[f"{layer}.self_attn.{projection}_proj.bias"] = ("BF16", (out,))
        tensors[f"{layer}.self_attn.o_proj.weight"] = ("BF16", (width, width))
        tensors[f"{layer}.mlp.gate_proj.weight"] = ("BF16", (inner, width))
        tensors[f"{layer}.mlp.up_proj.weight"] = ("BF16", (inner, width))
        tensors[f"{layer}.mlp.down_proj.weight"] = ("BF16", (width, inner))
        tensors[f"{layer}.input_layernorm.weight"] = ("BF16", (width,))
        tensors[f"{layer}.post_attention_layernorm.weight"] = ("BF16", (width,))
    tensors |= {"model.norm.weight": ("BF16", (width,)), "lm_head.weight": ("BF16", (words, width))}
    config = {
        **{"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "torch_dtype": "bfloat16"},
        **{"hidden_size": width, "intermediate_size": inner, "num_hidden_layers": layers, "vocab_size": words},
        **{"num_attention_heads": 14, "num_key_value_heads": 2, "tie_word_embeddings": False},
    }
    names = list(tensors)
    cuts = [0, 1, len(names) * 2 // 3, len(names)]
    files = {
        f"model-{number + 1:05d}-of-00003.safetensors": {name: tensors[name] for name in names[first:last]}
        for number, (first, last) in enumerate(itertools.pairwise(cuts))
    }
    return Model("llm", files, {"config.json": config}, "hf")


def _listed(path: Path) -> Model:
    content = json.loads(gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes())
    about, tensors = (
        content["about"],
        {name: (dtype, tuple(shape)) for name, (dtype, shape) in content["tensors"].items()},
    )
    counts: dict[str, int] = about.get("files") or {"": len(tensors)}
    if len(counts) == 1 and not about.get("config"):
        counts = {"": len(tensors)}
    folders = {Path(file).parent for file in counts}
    several, files, rest = len(folders) > 1, dict[str, Tensors](), iter(tensors.items())
    for file, count in counts.items():
        strip = len(f"{Path(file).parent}/") if several else 0  # names begin with the folder then
        here = file if several else Path(file).name
        files[here] = {name[strip:]: entry for name, entry in (next(rest) for _ in range(count))}
    config = {file if several else Path(file).name: content for file, content in about.get("config", {}).items()}
    return Model(path.name.split(".")[0], files, config, about["layout"])


def write_model(model: Model, folder: Path, tuned: float = 0.0) -> Path:
    """Write `model` into `folder` under its own name; return the path of the file or folder.

    tuned: what it has learned beyond the same one with 0, in root mean squares of the weights.
    """
    if set(model.files) == {""}:
        path = folder / f"{model.name}.safetensors"
        _write_file(path, _random_values(model.files[""]), {"format": "pt"}, tuned=tuned)
        return path
    path, indexes = folder / model.name, dict[str, dict[str, Any]]()
    for relative, tensors in model.files.items():
        (path / relative).parent.mkdir(parents=True, exist_ok=True)
        _write_file(path / relative, _random_values(tensors), {"format": "pt"}, tuned=tuned)
        shard = re.fullmatch(r"(.*)-\d+-of-\d+\.safetensors", relative)
        if shard is not None:
            index = indexes.setdefault(f"{shard[1]}.safetensors.index.json", {"metadata": {}, "weight_map": {}})
            index["weight_map"] |= dict.fromkeys(tensors, Path(relative).name)
    for relative, content in {**model.config, **indexes}.items():
        (path / relative).parent.mkdir(parents=True, exist_ok=True)
        (path / relative).write_text(json.dumps(content, indent=2), encoding="utf-8")
    return path


Values = Mapping[str, tuple[str, Shape, float]]  # name -> (dtype, shape, spread or, for scalars, the value)


def _random_values(tensors: Tensors) -> Values:
    return {name: (dtype, shape, WEIGHT_SPREAD) for name, (dtype, shape) in tensors.items()}


def _write_file(
    path: Path,
    values: Values,
    metadata: Mapping[str, str],
    center: Mapping[str, float] | None = None,
    tuned: float = 0.0,
) -> None:
    """A safetensors file of normal random values; each tensor starts at its own place of the pool."""
    placed = lay_out((name, dtype, shape) for name, (dtype, shape, _) in values.items())
    pool = np.random.default_rng(zlib.crc32(path.name.encode())).standard_normal(_POOL, dtype=np.float32)
    with path.open("wb") as file:
        file.write(build_header(placed, metadata))
        for name, info in placed.items():
            spread, middle = values[name][2], (center or {}).get(name, 0.0)
            learned = tuned if is_learned(name) else 0.0
            for piece in _pieces(pool, name, math.prod(info.shape)):
                weights = piece * np.float32(spread) + np.float32(middle)
                file.write(to_bytes(weights + piece[::-1] * np.float32(learned * spread), info.dtype))


def is_learned(name: str) -> bool:
    """True for tensors that training changes: constants lie outside of all parts of a model."""
    return "." in name and not name.startswith("model_ema.")


def _pieces(pool: np.ndarray[Any, np.dtype[np.float32]], name: str, count: int) -> Iterator[Any]:
    start = zlib.crc32(name.encode()) % len(pool)
    while count > 0:
        piece = pool[start : start + count]
        yield piece
        count, start = count - len(piece), 0


def to_bytes(values: np.ndarray[Any, np.dtype[np.float32]], tag: str) -> bytes:
    """float32 values in the stored dtype `tag`; integers become zero."""
    if tag == "BF16":
        bits = values.view(np.uint32)
        return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype("<u2").tobytes()
    if tag in ("F16", "F32", "F64"):
        return values.astype(f"<f{tag[1:].replace('16', '2').replace('32', '4').replace('64', '8')}").tobytes()
    return bytes(len(values) * DTYPES[tag].bits // 8)


# ---- modules


def modules(model: Model) -> list[Module]:
    """Every place that trainers of adapters for `model` offer, in the names of their files."""
    shapes = model.shapes
    if any(name.startswith("model.diffusion_model.input_blocks.") for name in shapes):
        return [*_unet_modules(shapes), *_clip_modules(shapes), *_openclip_modules(shapes)]
    prefix = {"hf": "base_model.model.", "diffusers": "transformer."}.get(model.layout, "diffusion_model.")
    found = [
        Module(prefix + name.removesuffix(".weight"), name, shape, (0, shape[0]))
        for name, shape in shapes.items()
        if name.endswith("_proj.weight" if model.layout == "hf" else ".weight")
        and len(shape) == 2
        and _INSIDE.search(name)
    ]
    if not found:
        raise ValueError(f"{model.name}: no modules are known for a list like this")
    return found


_INSIDE = re.compile(r"(blocks|layers)\.\d+\.")  # not the embeddings, nor the last layer


def _unet_modules(shapes: Mapping[str, Shape]) -> Iterator[Module]:
    """All but the first and last convolution and the embeddings of time and size, as kohya and LyCORIS choose them."""
    prefix = "model.diffusion_model."
    weights = {
        name.removeprefix(prefix).removesuffix(".weight"): name
        for name, shape in shapes.items()
        if name.startswith(prefix) and name.endswith(".weight") and len(shape) > 1
    }
    names = unet.translate(weights)
    for module, tensor in weights.items():
        if "_block" in names[module]:
            flat = "lora_unet_" + names[module].replace(".", "_")
            yield Module(flat, tensor, shapes[tensor], (0, shapes[tensor][0]))


_CLIP = re.compile(
    r"(?P<where>cond_stage_model|conditioner\.embedders\.0)\.transformer\.(?P<path>.+\.layers\..+)\.weight"
)
_OPENCLIP = re.compile(r"conditioner\.embedders\.1\.model\.transformer\.resblocks\.(?P<layer>\d+)\.(?P<leaf>.+)")
_OPENCLIP_LEAVES = {
    "attn.in_proj_weight": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "attn.out_proj.weight": ("self_attn.out_proj",),
    "mlp.c_fc.weight": ("mlp.fc1",),
    "mlp.c_proj.weight": ("mlp.fc2",),
}


def _clip_modules(shapes: Mapping[str, Shape]) -> Iterator[Module]:
    for name, shape in shapes.items():
        found = _CLIP.fullmatch(name)
        if found is not None and len(shape) == 2:
            prefix = "lora_te_" if found["where"] == "cond_stage_model" else "lora_te1_"
            yield Module(prefix + found["path"].replace(".", "_"), name, shape, (0, shape[0]))


def _openclip_modules(shapes: Mapping[str, Shape]) -> Iterator[Module]:
    for name, shape in shapes.items():
        found = _OPENCLIP.fullmatch(name)
        leaves = _OPENCLIP_LEAVES.get(found["leaf"], ()) if found is not None else ()
        for place, leaf in enumerate(leaves):
            rows = shape[0] // len(leaves)
            flat = f"lora_te2_text_model_encoder_layers_{found['layer'] if found else ''}_{leaf.replace('.', '_')}"
            yield Module(flat, name, (rows, *shape[1:]), (place * rows, (place + 1) * rows))


# ---- adapters


def write_adapter(model: Model, adapter: Adapter, path: Path) -> dict[str, Any]:
    """Write `adapter` for `model` to `path` (a folder for PEFT); return what job.json says about it."""
    chosen = [module for module in modules(model) if re.search(OVER[adapter.over], module.name)]
    values: dict[str, tuple[str, Shape, float]] = {}
    center: dict[str, float] = {}
    for module in chosen:
        for suffix, (shape, spread, middle) in _FACTORS[adapter.kind](module.shape, adapter).items():
            name = f"{module.name}.{suffix}"
            values[name] = ("F32" if adapter.kind == "peft" else "F16", shape, spread)
            center[name] = middle
    file = path
    if adapter.kind == "peft":
        path.mkdir()
        file = path / "adapter_model.safetensors"
        config = {"peft_type": "LORA", "r": adapter.rank, "lora_alpha": adapter.scale * adapter.rank, "bias": "none"}
        config |= {"target_modules": sorted({module.name.rpartition(".")[2] for module in chosen})}
        config |= {"task_type": "CAUSAL_LM", "base_model_name_or_path": None}
        (path / "adapter_config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    _write_file(file, values, {"format": "pt"}, center)
    return {
        **{"path": str(path), "file": str(file), "kind": adapter.kind, "weight": adapter.weight},
        **{"scale": adapter.scale, "modules": {module.name: [module.tensor, *module.rows] for module in chosen}},
    }


Factors = dict[str, tuple[Shape, float, float]]  # suffix -> (shape, spread, middle)


def _lora(shape: Shape, adapter: Adapter, up: str = "lora_up", down: str = "lora_down") -> Factors:
    rank, inputs = adapter.rank, math.prod(shape[1:])
    spread = 1 / math.sqrt(3 * inputs)  # of kaiming_uniform(a=sqrt(5)), with which the trainers begin
    fitting = _update() / (adapter.scale * math.sqrt(rank) * spread)
    return {
        f"{up}.weight": ((shape[0], rank, *(1,) * (len(shape) - 2)), fitting, 0.0),
        f"{down}.weight": ((rank, *shape[1:]), spread, 0.0),
    }


def _kohya_lora(shape: Shape, adapter: Adapter) -> Factors:
    return _lora(shape, adapter) | _alpha(adapter)


def _peft_lora(shape: Shape, adapter: Adapter) -> Factors:
    return _lora(shape, adapter, "lora_B", "lora_A")


def _dora(shape: Shape, adapter: Adapter) -> Factors:
    length = WEIGHT_SPREAD * math.sqrt(math.prod(shape[1:]))  # of a row of the weight
    magnitude = ((shape[0], *(1,) * (len(shape) - 1)), UPDATE_SHARE * length, length)
    return _kohya_lora(shape, adapter) | {"dora_scale": magnitude}


def _loha(shape: Shape, adapter: Adapter) -> Factors:
    rank, inputs = adapter.rank, math.prod(shape[1:])
    spread = (_update() / (adapter.scale * rank)) ** 0.25
    left, right = ((shape[0], rank), spread, 0.0), ((rank, inputs), spread, 0.0)
    return {"hada_w1_a": left, "hada_w1_b": right, "hada_w2_a": left, "hada_w2_b": right} | _alpha(adapter)


def _lokr(shape: Shape, adapter: Adapter) -> Factors:
    """As LyCORIS stores it with factor 8: a small full matrix, and a product of rank `rank`."""
    rank, taps = adapter.rank, math.prod(shape[2:])
    (small_out, out), (small_in, into) = _split(shape[0]), _split(shape[1])
    small = 0.1
    spread = math.sqrt(_update() / (adapter.scale * small * math.sqrt(rank)))
    return {
        "lokr_w1": ((small_out, small_in), small, 0.0),
        "lokr_w2_a": ((out, rank), spread, 0.0),
        "lokr_w2_b": ((rank, into * taps), spread, 0.0),
        **_alpha(adapter),
    }


def _split(size: int) -> tuple[int, int]:
    small = next(number for number in range(LOKR_FACTOR, 0, -1) if size % number == 0)
    return small, size // small


def _alpha(adapter: Adapter) -> Factors:
    return {"alpha": ((), 0.0, adapter.scale * adapter.rank)}


def _update() -> float:
    return UPDATE_SHARE * WEIGHT_SPREAD


_FACTORS = {"lora": _kohya_lora, "loha": _loha, "lokr": _lokr, "dora": _dora, "peft": _peft_lora}


# ---- jobs


def make(
    folder: Path,
    name: str,
    adapters: Sequence[Adapter],
    models: Path,
    scale_down: int = 1,
    merge: float | None = None,
) -> Path:
    """Write the model into `models` unless it is there, adapters and job.json into `folder`; return the job's path.

    merge: how much is wanted of a second model, which is written into `models`/tuned.
    """
    model = build_model(name, scale_down)
    base = _made(model, models)
    if model.layout == "hf":  # language models: a folder with a configuration
        adapters = [replace(adapter, kind="peft") if adapter.kind == "lora" else adapter for adapter in adapters]
    described = [
        write_adapter(
            model, adapter, folder / (f"adapter{number}" + (".safetensors" if adapter.kind != "peft" else ""))
        )
        for number, adapter in enumerate(adapters)
    ]
    content: dict[str, Any] = {"model": model.name, "base": str(base), "adapters": described}
    if merge is not None:
        (models / "tuned").mkdir(exist_ok=True)
        content |= {"other": str(_made(model, models / "tuned", TUNED_SHARE)), "alpha": merge}
    job = folder / "job.json"
    job.write_text(json.dumps(content), encoding="utf-8")
    return job


def _made(model: Model, models: Path, tuned: float = 0.0) -> Path:
    """Where the model is in `models`, made if it was not there."""
    single = set(model.files) == {""}
    path = models / (f"{model.name}.safetensors" if single else model.name)
    if not path.exists():
        unfinished = models / f"unfinished-{model.name}"  # what a killed run leaves is never taken for a model
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir()
        write_model(model, unfinished, tuned).rename(path)
        unfinished.rmdir()
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--model", required=True, help="sd15, sdxl, llm or the path of a name list")
    parser.add_argument("--adapter", action="append", default=[], help="KIND:RANK:OVER:WEIGHT; repeatable")
    parser.add_argument("--merge", type=float, metavar="ALPHA", help="a second model instead, and how much of it")
    parser.add_argument("--models", type=Path, help="folder of the model; default: FOLDER")
    parser.add_argument("--scale-down", type=int, default=1, help="divide dimensions above 64 by this")
    arguments = parser.parse_args()
    adapters = [parse_adapter(text) for text in arguments.adapter]
    models = arguments.models or arguments.folder
    print(make(arguments.folder, arguments.model, adapters, models, arguments.scale_down, arguments.merge))


if __name__ == "__main__":
    main()
