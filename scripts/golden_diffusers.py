"""Golden cases by diffusers: adapters that its pipelines' save_lora_weights wrote, in each of its spellings."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from golden_case import Case, expected_of
from golden_peft import MERGED, UNET, Settings, at_weight, parameters, wrapped
from safetensors.torch import load_file, save

_TEXT = ("text_model.encoder.layers.0.self_attn.q_proj", "text_model.encoder.layers.0.mlp.fc1")
_FLUX = (
    *(f"transformer_blocks.0.attn.{leaf}" for leaf in ("to_q", "to_k", "to_v", "to_out.0", "add_v_proj")),
    *(f"single_transformer_blocks.0.{leaf}" for leaf in ("attn.to_q", "attn.to_v", "proj_mlp", "proj_out")),
)
_LEAVES = [
    "conv_in",
    "proj_in",
    "to_q",
    "to_k",
    "to_v",
    "to_out.0",
    "add_v_proj",
    "proj_mlp",
    "proj_out",
    "q_proj",
    "fc1",
]


# "": as PEFT names the factors; "diffusers": through convert_state_dict_to_diffusers, as training scripts did;
# "kohya": that, and the saved file through convert_state_dict_to_kohya (the scripts' --output_kohya_format)
Spelling = Literal["", "diffusers", "kohya"]


class Row(NamedTuple):
    """One case: how one pipeline saves."""

    name: str
    pipeline: str
    parts: dict[str, tuple[str, ...]]  # what the pipeline calls a model -> the modules that are trained
    settings: Settings
    spelling: Spelling = ""
    with_metadata: bool = True  # the configuration goes into the file's metadata
    half: bool = False


_SD1 = {"unet": UNET, "text_encoder": _TEXT}
_LORA = {"r": 2, "lora_alpha": 3}
ROWS = (
    Row("diffusers-sd1", "StableDiffusionPipeline", _SD1, _LORA),
    Row(
        *("diffusers-sd1-old", "StableDiffusionPipeline", _SD1, {"r": 2, "lora_alpha": 2}),
        spelling="diffusers",
        with_metadata=False,
    ),
    Row(
        *("diffusers-sd1-kohya", "StableDiffusionPipeline", {"unet": UNET}, {"r": 2, "lora_alpha": 2}),
        spelling="kohya",
        with_metadata=False,
    ),
    Row("diffusers-flux", "FluxPipeline", {"transformer": _FLUX}, _LORA, half=True),
)


def cases() -> Iterator[Case]:
    """Every case by diffusers. Raises ImportError if it or PEFT is not installed."""
    import_module("peft")
    import_module("diffusers")
    for row in ROWS:
        yield _case(row)


def _case(row: Row) -> Case:
    base = "flux" if "transformer" in row.parts else "sd1"
    models = {
        part: wrapped(
            *(f"{row.name} {part}", base, paths, "LoraConfig", {**row.settings, "target_modules": _LEAVES}),
            dtype=np.float16 if row.half else np.float32,
        )
        for part, paths in row.parts.items()
    }

    def at(weight: float) -> dict[tuple[str, str], Any]:
        merged = (at_weight(model, weight).merge_and_unload() for model in models.values())
        return {(path, leaf): values for model in merged for path, leaf, values in parameters(model)}

    return Case(
        name=row.name,
        base=base,
        tool=f"diffusers {version('diffusers')} {row.pipeline}.save_lora_weights, peft {version('peft')}",
        expected_from="peft " + MERGED,
        settings={**row.settings, "through": row.spelling, "adapter_metadata": row.with_metadata},
        modules=sum(map(len, row.parts.values())),
        adapter=_saved(row, models),
        expected=expected_of(base, at),
    )


def _saved(row: Row, models: dict[str, Any]) -> bytes:
    """The file that the pipeline writes."""
    utils, peft = import_module("diffusers.utils"), import_module("peft")
    arguments: dict[str, Any] = {}
    for part, model in models.items():
        state = {
            name.removeprefix("base_model.model."): (value.half() if row.half else value.float()).contiguous()
            for name, value in peft.get_peft_model_state_dict(model).items()
        }
        arguments[f"{part}_lora_layers"] = utils.convert_state_dict_to_diffusers(state) if row.spelling else state
        if row.with_metadata:
            arguments[f"{part}_lora_adapter_metadata"] = dict(row.settings)
    with tempfile.TemporaryDirectory() as folder:
        getattr(import_module("diffusers"), row.pipeline).save_lora_weights(folder, **arguments)
        file = Path(folder) / "pytorch_lora_weights.safetensors"
        if row.spelling != "kohya":
            return file.read_bytes()
        return save(utils.convert_state_dict_to_kohya(utils.convert_all_state_dict_to_peft(load_file(file))))
