"""A user's problem without the user's files: names, shapes, dtypes and settings, no weights, nothing personal.

`scripts/from_bug_report.py` makes files of the same names and shapes from it, so that the problem can be
seen on another machine.
"""

from __future__ import annotations

import importlib.metadata
import json
import math
import platform
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from bake import __version__
from bake.errors import BakeError, InputError, OutputExists, OutputRefused, Unsupported
from bake.inspection import inspect
from bake.io.adapter import has_adapter, open_adapter
from bake.io.checkpoint import open_checkpoint
from bake.io.tensorfile import SafetensorsFile, TensorFile, read_number
from bake.keys.factors import SCALARS, split_key

SCHEMA = 1

_PACKAGES = ("torch", "safetensors", "numpy", "click")
_DIAGNOSIS = (
    "kind",
    "family",
    "families",
    "evidence",
    "layout",
    "variant",
    "dialects",
    "algorithms",
    "ranks",
    "modules",
)

# Metadata that says how a file was made, and nothing about who made it or of what.
_SAFE_METADATA = {
    *("format", "ss_network_module", "ss_network_dim", "ss_network_alpha", "ss_base_model_version", "ss_v2"),
    *("ss_sd_scripts_commit_hash", "modelspec.sai_model_spec", "modelspec.architecture", "modelspec.resolution"),
    *("modelspec.prediction_type", "ot_branch", "ot_revision", "version"),
}
_SAFE_OBJECTS = {"ss_network_args", "lora_adapter_metadata", "software"}  # the same, as JSON objects
# Settings whose texts are words of a format. Other settings are kept where they are numbers or switches.
_SAFE_TEXTS = {
    *("peft_type", "bias", "init_lora_weights", "target_modules", "exclude_modules", "modules_to_save"),
    *("feedforward_modules", "target_parameters", "layers_pattern", "corda_config", "fine_tune_type", "keys"),
    *(
        "model_type",
        "architectures",
        "_class_name",
        "torch_dtype",
        "dtype",
        "quant_method",
        "quant_type",
        "algo",
        "name",
    ),
}
_VALUE = re.compile(r"[\w.+-]{1,80}(/[\w+-]{1,40})?")  # stable-diffusion-xl-v1-base/lora, networks.lora, 1024x1024
_NAME = re.compile(r"[\w.\-*+?|^$()\[\]{}\\,: ]{0,300}")  # of a module, or a pattern for several; never a path
_DRIVE = re.compile(r"[A-Za-z]:\\")
_ABSOLUTE = re.compile(r"(?<![\w.])([A-Za-z]:)?[/\\][^\s'\",;:]+")
_KEY = re.compile(r"[\w.]{1,60}")
_LONGEST_JSON = 1024 * 1024  # characters
_DEEPEST, _MOST_ITEMS = 4, 500


def make_report(path: Path, against: Path | None = None) -> dict[str, Any]:
    """Everything that reproduces what bake says about `path`, also against a base, as plain JSON data.

    Keys: bug_report (the schema), bake, system, command, file, against, diagnosis, error {code, exit,
    message} or None. file and against: packaging, configs (the settings that decide), parts [{group,
    name, format, tensors {name: "DTYPE ROWSxCOLUMNS"}, numbers {name: alpha and the like}, metadata,
    metadata_keys: names of what was left out}], None for what cannot be opened. The same input gives the
    same report. Raises nothing for a file that bake refuses: that is the problem to report.
    """
    diagnosis: dict[str, Any] = {}
    error: dict[str, Any] | None = None
    try:
        found = inspect(path, against)
    except BakeError as refusal:
        error = {"code": refusal.code, "exit": refusal.exit_code, "message": refusal.message}
    else:
        diagnosis = {key: found[key] for key in _DIAGNOSIS if key in found}
        if "coverage" in found:
            diagnosis["components"] = found["coverage"]["components"]
            error = found["coverage"]["refusal"]
        elif found.get("refusal") is not None:
            error = {"code": Unsupported.code, "exit": Unsupported.exit_code, "message": found["refusal"]}
    if error is not None:
        error["message"] = _without_paths(error["message"], path, against)
    return {
        "bug_report": SCHEMA,
        "bake": __version__,
        "system": {
            "python": platform.python_version(),
            "platform": f"{platform.system()} {platform.machine()}",  # a kernel's name may be a person's own
            **_versions(),
        },
        "command": "bake inspect FILE" + (" --against BASE" if against is not None else ""),
        "error": error,
        "diagnosis": diagnosis,
        "file": _open_and_describe(path, as_base=False),
        "against": None if against is None else _open_and_describe(against, as_base=True),
    }


def write_report(report: Mapping[str, Any], out: Path) -> None:
    """Write `report` to the new file `out`.

    Raises OutputExists if there is one of that name, OutputRefused if it cannot be written.
    """
    text = json.dumps(report, indent=1) + "\n"
    try:
        with out.open("x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError:
        raise OutputExists(f"{out} exists already; name another file for the report", path=str(out)) from None
    except OSError as error:
        raise OutputRefused(f"{out}: the report cannot be written: {error.strerror}", path=str(out)) from None


def _versions() -> dict[str, str | None]:
    """Of the packages that matter, without importing them."""
    found: dict[str, str | None] = {}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found


def _open_and_describe(path: Path, as_base: bool) -> dict[str, Any] | None:
    try:
        return _describe_checkpoint(path) if as_base else _describe_file(path)
    except BakeError:
        return None  # what is wrong with it is the report's error


def _describe_file(path: Path) -> dict[str, Any]:
    if path.is_dir() and not has_adapter(path):
        return _describe_checkpoint(path)
    source = open_adapter(path)
    configs = {"": _safe(source.config)} if source.config is not None else {}
    # Names of adapter files in folders are fixed, and decide whether a configuration beside them counts.
    named = path.is_dir() or source.config is not None
    name = source.file.path.name if named else f"adapter{_suffix(source.file)}"
    packaging = "adapter folder" if path.is_dir() else "file"
    return {"packaging": packaging, "configs": configs, "parts": [_describe_part("", name, source.file)]}


def _describe_checkpoint(path: Path) -> dict[str, Any]:
    checkpoint = open_checkpoint(path)
    try:
        return {
            "packaging": checkpoint.packaging,
            "configs": {group: _safe(config) for group, config in sorted(checkpoint.configs.items())},
            "parts": [_describe_part(part.group, f"model{_suffix(part.file)}", part.file) for part in checkpoint.files],
        }
    finally:
        checkpoint.close()


def _suffix(file: TensorFile) -> str:
    return ".safetensors" if isinstance(file, SafetensorsFile) else ".pt"


def _describe_part(group: str, name: str, file: TensorFile) -> dict[str, Any]:
    pickled = "pickled list" if file.is_list else "pickle"
    safe = {key: text for key in sorted(file.metadata) if (text := _safe_metadata(key, file.metadata[key])) is not None}
    return {
        "group": group,
        "name": name,
        "format": "safetensors" if isinstance(file, SafetensorsFile) else pickled,
        "tensors": {
            key: f"{info.dtype} {'x'.join(map(str, info.shape))}".rstrip() for key, info in file.tensors.items()
        },
        "numbers": dict(_numbers(file)),
        "metadata": safe,
        "metadata_keys": sorted(key for key in file.metadata.keys() - safe.keys() if _KEY.fullmatch(key)),
    }


def _numbers(file: TensorFile) -> Iterable[tuple[str, float | str]]:
    """The one-element tensors beside an adapter's factors: numbers that its trainer was given, no weights."""
    for key, info in file.tensors.items():
        split = split_key(key)
        if split is not None and split[1].factor in SCALARS and math.prod(info.shape) == 1:
            try:
                value = read_number(file, key)
            except InputError:
                continue  # of a dtype that holds no numbers: what bake says about it does not depend on the value
            yield key, value if math.isfinite(value) else str(value)  # JSON knows no NaN


def _safe_metadata(key: str, text: str) -> str | None:
    """The value of a metadata key as far as it is worth sharing; None if it is not."""
    if key in _SAFE_METADATA:
        return text if _VALUE.fullmatch(text) else None
    if key not in _SAFE_OBJECTS or len(text) > _LONGEST_JSON:
        return None
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return json.dumps(_safe(found)) if isinstance(found, dict) else None


def _safe(settings: Mapping[str, Any], depth: int = 0) -> dict[str, Any]:
    """The settings that are numbers, switches, or words of a format."""
    kept: dict[str, Any] = {}
    for key, value in list(settings.items())[:_MOST_ITEMS]:
        # diffusers puts the component before the setting: unet.target_modules
        texts = key.rpartition(".")[2] in _SAFE_TEXTS
        if not _is_name(key):
            continue
        if isinstance(value, dict):
            if depth < _DEEPEST:
                kept[key] = _safe(value, depth + 1)
        elif isinstance(value, list):
            if len(value) <= _MOST_ITEMS and all(_is_safe(item, texts) for item in value):
                kept[key] = value
        elif _is_safe(value, texts):
            kept[key] = value
    return kept


def _is_safe(value: Any, texts: bool) -> bool:
    if value is None or isinstance(value, (bool, int)):
        return True
    if isinstance(value, float):
        return math.isfinite(value)
    return isinstance(value, str) and ((texts and _is_name(value)) or value.replace(".", "", 1).isdecimal())


def _is_name(text: str) -> bool:
    return _NAME.fullmatch(text) is not None and _DRIVE.search(text) is None


def _without_paths(message: str, path: Path, against: Path | None) -> str:
    """`message` with FILE and BASE for what the user named, and no other path."""
    for place, word in ((path, "FILE"), (against, "BASE")):
        if place is not None:
            message = message.replace(str(place), word)
            message = re.sub(rf"(?<![\w.]){re.escape(place.name)}(?![\w.])", word, message) if place.name else message
    return _ABSOLUTE.sub("(path)", message)
