"""The format of recipes: every key with what it may be and what it means, for the reader and for the schema.

docs/recipes.md explains it for people.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from bake.dtypes import OUTPUT_DTYPES
from bake.errors import UsageError
from bake.keys.blocks import SCHEMES
from bake.merges import METHODS, Method, Parameter
from bake.plan.recipe import EMA, EMBEDDING_MODES, EVERY, LAYOUTS, ROUNDINGS, AdapterChoice, Layers, MergeChoice
from bake.plan.selection import Gradient, NameRule, Selection, Setting
from bake.plan.words import SELECTION_KEYS, parse_adapter
from bake.recipes.document import Mark, Node
from bake.recipes.kinds import (
    Either,
    Field,
    File,
    Kind,
    ListOf,
    Made,
    MapOf,
    Number,
    OrNothing,
    Record,
    Schema,
    Shared,
    Size,
    Switch,
    Text,
    Unread,
    Word,
)

FORMAT = 1
VERIFICATIONS = ("none", "sample", "full")
_COMPONENTS = ListOf(Text("the name of a component, such as unet"), single=True)
_EVERYWHERE = "*"  # as a gradient's filter: all that no other is about


@dataclass(frozen=True, slots=True)
class _Version:
    """The version of the format."""

    def read(self, node: Node) -> float:
        found = Number(whole=True).read(node)
        if found != FORMAT:
            node.mark.refuse(f"a recipe of format {found:g}; this bake reads {FORMAT}")
        return found

    def schema(self) -> Schema:
        return {"const": FORMAT}


DEFINITIONS: dict[str, Kind] = {}  # what the schema spells out once


def _shared(name: str, kind: Kind) -> Shared:
    DEFINITIONS[name] = kind
    return Shared(name, kind)


_DTYPE = _shared("dtype", Word(("keep", *OUTPUT_DTYPES)))


# ---- Numbers that differ between parts of a model --------------------------------------------------------------------


def _selection_fields(number: Kind) -> tuple[Field, ...]:
    """How numbers may differ by block, depth and name. number: what each of them may be."""
    return (
        Field(
            "lbw",
            Either(Text("block values or a preset"), ListOf(number, least=1)),
            "block values, or the name of a preset",
        ),
        Field("blocks", Word(tuple(SCHEMES)), "whose reading of block lists counts", needs="lbw"),
        Field(
            "gradient",
            Either(Text("numbers over the depth"), ListOf(number, least=1), MapOf(ListOf(number, True, 1))),
            "numbers from the first layer to the last; or such for parts of tensor names, '*' for the rest",
        ),
        Field(
            "names", Either(Text("PATTERN=RATIO"), None, MapOf(number)), "patterns of tensor names with their numbers"
        ),
        Field("lbwe", ListOf(Text("a rule BLOCKS:ELEMENTS:RATIO"), True, 1), "elemental rules, BLOCKS:ELEMENTS:RATIO"),
    )


def _selection(given: Mapping[str, Any]) -> Selection:
    """What the keys of `_selection_fields` say, written as on the command line or as YAML."""
    words = {**given, "lbwe": ",".join(given.get("lbwe", ()))}
    chosen = Selection.parse(**{SELECTION_KEYS[key]: word for key, word in words.items() if _is_word(key, word)})
    gradient, names = given.get("gradient"), given.get("names")
    if isinstance(gradient, tuple):
        gradient = {_EVERYWHERE: gradient}
    if isinstance(given.get("lbw"), tuple):
        chosen = dataclasses.replace(chosen, values=given["lbw"])
    if isinstance(gradient, dict):
        each = (Gradient(values, "" if part == _EVERYWHERE else part) for part, values in gradient.items())
        chosen = dataclasses.replace(chosen, gradients=tuple(each))
    if isinstance(names, dict):
        chosen = dataclasses.replace(chosen, names=tuple(NameRule(*each) for each in names.items()))
    return chosen


def _is_word(key: str, value: Any) -> bool:
    return key in SELECTION_KEYS and isinstance(value, str)


# ---- Adapters --------------------------------------------------------------------------------------------------------


def _typed_adapter(word: str, mark: Mark) -> AdapterChoice:
    return parse_adapter(word, mark.file.parent)


def _adapter(given: dict[str, Any], mark: Mark) -> AdapterChoice:
    return AdapterChoice(
        given["path"],
        given.get("weight", 1.0),
        te=given.get("te"),
        unet=given.get("unet"),
        rank_limit=given.get("dyn"),
        selection=_selection(given) if any(key in given for key in SELECTION_KEYS) else None,
    )


LORA = Record(
    "a LoRA",
    (
        Field("path", File(), "the adapter, a file or a folder", required=True),
        Field("weight", Number(), "how much of it; any sign, 0 leaves it out; default 1"),
        Field("te", Number(), "the weight for the text encoders; default: weight"),
        Field("unet", Number(), "the weight for everything else; default: weight"),
        Field("dyn", Number(low=1, whole=True), "use only so many ranks"),
        *_selection_fields(Number()),
    ),
)
_ADAPTER = _shared("lora", Either(Made(Text("a LoRA, as behind -l"), _typed_adapter), mapping=Made(LORA, _adapter)))
_ADAPTERS = ListOf(_ADAPTER, single=True)


# ---- Merges ----------------------------------------------------------------------------------------------------------


def _parameter_kind(parameter: Parameter) -> Kind:
    """What a parameter of a method may be."""
    if parameter.choices:
        return Word(parameter.choices)
    if isinstance(parameter.default, bool):
        return Switch()
    number = Number(parameter.low, parameter.high, parameter.above, parameter.whole)
    parts = Record(
        "a parameter by parts of the model",
        (Field("value", number, "the number where nothing else is said"), *_selection_fields(number)),
        others=number,  # of components
    )
    span = "".join(letter if letter.isalnum() else "-" for letter in parameter.span)
    one = _shared(f"{'whole-' if parameter.whole else ''}{span}", Either(number, mapping=Made(parts, _parts)))
    return Either(one, Made(ListOf(one), _listed), one) if parameter.per_model else one


def _parts(given: dict[str, Any], mark: Mark) -> Selection:
    known = {"value", *SELECTION_KEYS}
    components = tuple((name, number) for name, number in given.items() if name not in known)
    return dataclasses.replace(_selection(given), number=given.get("value"), components=components)


def _listed(settings: tuple[Any, ...], mark: Mark) -> list[Any]:
    return list(settings)


def parameters_of(method: Method) -> Record:
    """What stands under `parameters` for a method."""
    return Record(
        f"the method {method.name}",
        tuple(
            Field(
                each.name,
                _parameter_kind(each),
                f"{each.meaning}: {each.span}; "
                + ("has to be given" if each.default is None else f"default {str(each.default).lower()}"),
                required=each.default is None,
            )
            for each in method.parameters
        ),
    )


_NO_PARAMETERS: dict[str, Setting] = {}


def _merge(given: dict[str, Any], mark: Mark) -> MergeChoice:
    kind = parameters_of(METHODS[given["method"]])
    node = given.get("parameters")
    if node is None and any(each.required for each in kind.fields):
        mark.refuse(f"{kind.what} needs parameters: {', '.join(each.key for each in kind.fields if each.required)}")
    return MergeChoice(
        method=given["method"],
        models=given["models"],
        base=given.get("base"),
        parameters=_NO_PARAMETERS if node is None else kind.read(node),
        only=given.get("only", ()),
        allow_missing=given.get("allow_missing", False),
        layers=given.get("layers", ()),
    )


def _layers(text: str, mark: Mark) -> Layers:
    try:
        return Layers.parse(text)
    except UsageError as error:
        mark.refuse(error.message)


def _by_method() -> list[Schema]:
    """For each method the schema of its parameters."""
    rules: list[Schema] = []
    for name, method in METHODS.items():
        kind = parameters_of(method)
        then: Schema = {"properties": {"parameters": kind.schema()}}
        then |= {"required": ["parameters"]} if any(each.required for each in kind.fields) else {}
        rules.append({"if": {"properties": {"method": {"const": name}}, "required": ["method"]}, "then": then})
    return rules


_LAYERS = Made(Text("layers such as 2=8:32"), _layers)

MERGE = Record(
    "a merge",
    (
        Field("method", Word(tuple(METHODS)), "how the models are merged: see docs/merging.md", required=True),
        Field("models", ListOf(File(), least=1), "the models, in the order in which it takes them", required=True),
        Field("base", File(), "the model that the others were trained from, for methods that have one"),
        Field("parameters", Unread(), "the parameters of the method"),
        Field("only", _COMPONENTS, "merge these components alone; the rest is the first model's"),
        Field("allow_missing", Switch(), "tensors that another model lacks stay the first one's"),
        Field(
            "layers", ListOf(_LAYERS, least=1), "of passthrough: MODEL=FIRST:END for each run of layers, as --layers"
        ),
    ),
    rules={"allOf": _by_method()},
)
_MERGE = _shared("merge", Made(MERGE, _merge))


# ---- A bake ----------------------------------------------------------------------------------------------------------

# Keys whose values are those of a field of bake.plan.recipe.Recipe, and the name of that field.
SETTINGS = {
    "also": "also",
    "dtype": "dtype",
    "rounding": "rounding",
    "seed": "seed",
    "only": "only",
    "allow_unmatched": "allow_unmatched",
    "allow_nonfinite_base": "allow_nonfinite_base",
    "embeddings": "embeddings",
    "metadata": "metadata",
    "record": "record",
    "layout": "layout",
    "like": "like",
    "shard_size": "shard_size",
    "drop": "drop",
    "ema": "ema",
    "strict": "strict",
}
# How a bake is run; the command line has the last word.
RUN_KEYS = ("device", "memory", "threads", "verify", "overwrite", "keep_undo")

_BAKE = (
    Field("name", Text(), "what the bake is called, for --select; default: the name of its output"),
    Field("base", File(), "the checkpoint to begin with: a file, a sharded folder, a diffusers folder"),
    Field("merge", _MERGE, "in the place of base: several checkpoints that are merged"),
    Field("also", ListOf(File(), single=True), "further files of a split model; the output is then a folder"),
    Field("loras", _ADAPTERS, "adapters: files, files with weights as behind -l, or mappings"),
    Field("more_loras", _ADAPTERS, "adapters beside those of loras"),
    Field("prompt", Text("a prompt"), "a text with <lora:name:weight> tags"),
    Field("lora_dir", File(), "the folder in which the prompt's LoRAs are found"),
    Field("vae", File(), "a file whose VAE takes the place of the base's"),
    Field("replace", MapOf(File()), "components that are taken from other files: te1, vae, ..."),
    Field("layout", Word(LAYOUTS), "original: one file; diffusers: a folder, for which like names the configuration"),
    Field("like", File(), "a diffusers folder whose configuration, tokenizer and scheduler files are taken"),
    Field("shard_size", Size(none=True), "divide the weights into shards of at most this size; none: one file"),
    Field("drop", _COMPONENTS, "leave out components, ema, training or rest (docs/convert.md)"),
    Field("ema", Word(EMA), "use: averaged weights take the place of the others"),
    Field("only", _COMPONENTS, "fuse into these components alone"),
    Field("dtype", Either(_DTYPE, mapping=MapOf(_DTYPE)), f"stored dtype, or one by component ({EVERY}: the rest)"),
    Field("rounding", Word(ROUNDINGS), "how results are rounded"),
    Field("seed", Number(whole=True), "of stochastic rounding, and of merges by chance"),
    Field("embeddings", Word(EMBEDDING_MODES), "what becomes of token embeddings that travel in adapters"),
    Field("allow_unmatched", Switch(), "fuse what matches even if some modules have no place"),
    Field("strict", Switch(), "refuse adapters that the record of the base says are in it already"),
    Field("allow_nonfinite_base", Switch(), "elements of the base that are not finite stay as they are"),
    Field("metadata", MapOf(Text()), "added to the metadata of the output"),
    Field("record", Switch(), "write names, weights and digests of the inputs into the output; default true"),
    Field("output", File(), "where to write: a .safetensors file, or a folder if the base is one"),
    Field("overwrite", Switch(), "replace an existing output"),
    Field("keep_undo", Switch(), "write an undo file beside the output, for bake undo"),
    Field("device", Text("a device"), "where to compute: auto, cpu, cuda, cuda:N or mps"),
    Field("memory", Size(), "memory for buffers, such as 512MiB"),
    Field("threads", Number(low=1, high=256, whole=True), "threads that compute"),
    Field("verify", Word(VERIFICATIONS), "how much of the draft is read back and recomputed"),
)
_ONE_BASE: Schema = {"not": {"required": ["base", "merge"]}}

ENTRY = Record("a bake", tuple(dataclasses.replace(each, kind=OrNothing(each.kind)) for each in _BAKE), rules=_ONE_BASE)
RECIPE = Record(
    "a recipe",
    (
        Field("bake", _Version(), "the version of this format: 1"),
        *_BAKE,
        Field("bakes", ListOf(ENTRY, least=1), "several bakes: each has what stands above, but for the keys it gives"),
    ),
    rules={**_ONE_BASE, "anyOf": [{"required": [key]} for key in ("base", "merge", "bakes")]},
)
