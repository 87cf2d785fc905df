"""mergekit's YAML, read as it is for the methods that both have.

Source: mergekit 0.1.5 config.py (keys, precedence of parameters, filters and gradients), plan.py (models as slices,
the base among them) and merge_methods/ (parameters, defaults, what a base is for).
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from bake.errors import InputError, Unsupported
from bake.io.checkpoint import read_json_object
from bake.io.jsontext import shortened
from bake.keys.nearest import nearest_names
from bake.merges import METHODS
from bake.plan.recipe import Layers, MergeChoice
from bake.plan.selection import Gradient, Selection, Setting
from bake.recipes.document import Entries, Items, Mark, Node, Scalar
from bake.recipes.kinds import ListOf, Number, Switch, Text, Word, expect

METHOD_KEY = "merge_method"  # what tells such a file from a recipe of bake
_DTYPES = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}
_TOP = (
    *(METHOD_KEY, "models", "slices", "modules", "base_model", "parameters", "dtype", "out_dtype"),
    *("tokenizer_source", "tokenizer", "chat_template"),
)
_LAYER_COUNTS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers")  # what configurations call them


@dataclass(frozen=True, slots=True)
class _Parameter:
    """A parameter of mergekit's, and the one of bake's that does the same."""

    theirs: str
    ours: str  # "": it changes nothing here
    per_model: bool = False
    default: float | None = None  # theirs, where ours has none or another one
    required: bool = False
    words: tuple[str, str] | None = None  # of a switch: what ours says for false and for true
    is_switch: bool = False


def _number(theirs: str, ours: str = "", **more: Any) -> _Parameter:
    return _Parameter(theirs, ours or theirs, **more)


def _switch(theirs: str, ours: str, words: tuple[str, str] | None = None) -> _Parameter:
    return _Parameter(theirs, ours, words=words, is_switch=True)


@dataclass(frozen=True, slots=True)
class _Method:
    """A method that both have."""

    ours: str
    parameters: tuple[_Parameter, ...] = ()
    # What base_model is for: a model like the others, our base, or the first of two models.
    base: Literal["model", "base", "base or none", "first"] = "base"
    fixed: dict[str, Setting] = field(default_factory=dict)  # what is so there unless it is given


_INT8 = _switch("int8_mask", "")
_WEIGHT = _number("weight", per_model=True, required=True)


def _task_vectors(name: str, *more: _Parameter, density: bool = True, rescale: bool | None = None) -> _Method:
    """A relative of task arithmetic. rescale: if sums of magnitudes are restored by default; None: they cannot be."""
    has_rescale = rescale is not None
    return _Method(
        name,
        (
            *(_WEIGHT, _number("lambda"), _switch("normalize", "normalize"), _INT8),
            _Parameter("density", "density" if density else "", per_model=True, default=1.0 if density else None),
            _switch("rescale", "rescale" if has_rescale else "", ("none", "l1")),
            *more,
        ),
        fixed={"rescale": "l1" if rescale else "none"} if has_rescale else {},
    )


_GAMMA, _EPSILON = _number("gamma", per_model=True), _number("epsilon", per_model=True)
_METHODS = {
    "linear": _Method("linear", (_WEIGHT, _switch("normalize", "normalize")), "model"),
    "slerp": _Method("slerp", (_number("t", "alpha", required=True),), "first"),
    "nearswap": _Method("nearswap", (_number("t", required=True),), "first"),
    "arcee_fusion": _Method("arcee_fusion"),
    "nuslerp": _Method(
        "nuslerp",
        (_WEIGHT, _switch("nuslerp_flatten", "flatten"), _switch("nuslerp_row_wise", "row_wise")),
        "base or none",
    ),
    "multislerp": _Method(
        "multislerp",
        (_WEIGHT, _switch("normalize_weights", "normalize"), _Parameter("eps", "")),
        "base or none",
    ),
    "karcher": _Method("karcher", (_number("max_iter"), _number("tol")), "model"),
    "passthrough": _Method("passthrough", (_number("scale", per_model=True),), "model"),
    "model_stock": _Method("model_stock", (_switch("filter_wise", "filter_wise"),)),
    "sce": _Method("sce", (_number("select_topk"), _INT8)),
    "ram": _Method("ram", (_number("epsilon"),)),
    "ramplus_tl": _Method("ram_plus", (_number("r"), _number("alpha"), _number("epsilon"))),
    "task_arithmetic": _task_vectors("task_arithmetic", density=False),
    "ties": _task_vectors("ties", rescale=False),
    "dare_linear": _task_vectors("dare_linear", rescale=True),
    "dare_ties": _task_vectors("dare_ties", rescale=True),
    "breadcrumbs": _task_vectors("breadcrumbs", _GAMMA, rescale=False),
    "breadcrumbs_ties": _task_vectors("breadcrumbs_ties", _GAMMA, rescale=False),
    "della": _task_vectors("della", _EPSILON, rescale=True),
    "della_linear": _task_vectors("della_linear", _EPSILON, rescale=True),
}


@dataclass(frozen=True, slots=True)
class Configuration:
    """What a file of mergekit's asks for."""

    merge: MergeChoice
    dtype: str
    notes: tuple[str, ...]  # what stands there and changes nothing


def is_mergekit(node: Node) -> bool:
    """True for a file of mergekit's."""
    return isinstance(node, Entries) and METHOD_KEY in node.entries


def read_configuration(node: Entries) -> Configuration:
    """The merge that a file of mergekit's asks for.

    Raises UsageError for mistakes, InputError for models that are not there, and Unsupported for what bake does not
    do, each with its place.
    """
    return _Reader(node).configuration()


@dataclass(frozen=True, slots=True)
class _Model:
    """A model with what is said of it alone, the narrowest first."""

    path: Path
    mark: Mark
    parameters: tuple[Entries, ...]


class _Reader:
    """Reads one file."""

    def __init__(self, top: Entries) -> None:
        self._top = top
        self._notes: dict[Mark, str] = {}
        name = Word(tuple(_METHODS)).read(top.entries[METHOD_KEY])
        self._theirs, self._method = name, _METHODS[name]
        self._defaults: dict[str, Any] = {each.name: each.default for each in METHODS[self._method.ours].parameters}

    def configuration(self) -> Configuration:
        self._check_keys(self._top, _TOP, "mergekit")
        self._refuse("modules", "bake merges a model as a whole: write its models: at the top")
        self._refuse("chat_template", "leave it out, and set it in the tokenizer_config.json of the output")
        stacked = self._stacked()
        if stacked is not None:
            return self._configured(stacked)
        models, shared, base = self._models()
        base = self._base() if base is None else base
        chosen, is_base = self._arranged(models, base)
        self._check_tokenizer(base.path if base is not None else chosen[0].path)
        merge = MergeChoice(
            method=self._method.ours,
            models=tuple(each.path for each in chosen),
            base=base.path if base is not None and is_base else None,
            parameters=self._parameters(chosen, shared),
        )
        return self._configured(merge)

    def _configured(self, merge: MergeChoice) -> Configuration:
        dtype = self._dtype()
        in_order = sorted(self._notes, key=lambda mark: (mark.line, mark.column))
        return Configuration(merge, dtype, tuple(self._notes[mark] for mark in in_order))

    # ---- what there is

    def _check_keys(self, node: Entries, known: Sequence[str], what: str) -> None:
        """Refuse what looks like a misspelling, note what mergekit does not read either."""
        for key, mark in node.keys.items():
            if key not in known:
                near = nearest_names(key, known, 1)
                if near:
                    mark.refuse(f"{what} has no {shortened(key)}; is it {near[0]}?")
                self._note(mark, f"{what} has no {shortened(key)}: it changes nothing there, nor here")

    def _note(self, mark: Mark, text: str) -> None:
        self._notes[mark] = f"{mark}: {text}"

    def _refuse(self, key: str, advice: str) -> None:
        if self._given(key) is not None:
            raise _unsupported(self._top.keys[key], f"{key} of mergekit is not done by bake; {advice}")

    def _given(self, key: str) -> Node | None:
        node = self._top.entries.get(key)
        return None if node is None or _is_null(node) else node

    def _base(self) -> _Model | None:
        node = self._given("base_model")
        return None if node is None else _Model(_model_path(node), node.mark, ())

    def _models(self) -> tuple[list[_Model], tuple[Entries, ...], _Model | None]:
        """The models, what is said of all of them, and the base where slices name one of their own."""
        models, slices = self._given("models"), self._given("slices")
        overall = _entries(self._given("parameters"), "parameters")
        if (models is None) == (slices is None):
            self._top.mark.refuse("mergekit's files have either models: or slices:")
        if models is not None:
            return self._sources(models, ("model", "parameters")), overall, None
        assert slices is not None
        return self._slice(slices, overall)

    def _sources(self, node: Node, known: tuple[str, ...]) -> list[_Model]:
        if not isinstance(node, Items) or not node.items:
            expect(node, "a list of models")
        found = []
        for item in node.items:
            if not isinstance(item, Entries) or "model" not in item.entries:
                expect(item, "a mapping with model:")
            self._check_keys(item, known, "a model")
            path = _model_path(item.entries["model"])
            own = _entries(item.entries.get("parameters"), "parameters")
            found.append(_Model(path, item.entries["model"].mark, own))
        return found

    def _stacked(self) -> MergeChoice | None:
        """Slices of one model each, which passthrough puts one above the other; None if it is not that."""
        slices = self._given("slices")
        if self._theirs != "passthrough" or slices is None or self._given("models") is not None:
            return None
        paths: list[Path] = []
        layers: list[Layers] = []
        for each in self._slices(slices):
            if "sources" not in each.entries:
                each.mark.refuse("a slice needs sources")
            sources = each.entries["sources"]
            models = self._sources(sources, ("model", "layer_range", "parameters"))
            assert isinstance(sources, Items)
            if len(models) > 1:
                raise _unsupported(sources.items[1].mark, "passthrough takes one model in each slice")
            (source,) = sources.items
            assert isinstance(source, Entries)
            for part in (each, source):
                if "parameters" in part.entries:
                    raise _unsupported(part.keys["parameters"], "scales of single slices are not done by bake")
            if models[0].path not in paths:
                paths.append(models[0].path)
            layers.append(Layers(paths.index(models[0].path), *_layer_range(source)))
        base = self._base()
        self._check_tokenizer(base.path if base is not None else paths[0])
        alone = [_Model(paths[0], slices.mark, ())]
        parameters = self._parameters(alone, _entries(self._given("parameters"), "parameters"))
        return MergeChoice("passthrough", tuple(paths), parameters=parameters, layers=tuple(layers))

    def _slices(self, node: Node) -> list[Entries]:
        """Every slice, its keys looked at."""
        known = ("sources", "base_model", "parameters", "residual_weight")
        if not isinstance(node, Items) or not node.items:
            expect(node, "a list of slices")
        found = []
        for item in node.items:
            if not isinstance(item, Entries):
                expect(node, "a list of slices")
            self._check_keys(item, known, "a slice")
            if "residual_weight" in item.entries:
                raise _unsupported(item.keys["residual_weight"], "residual_weight of mergekit is not done by bake")
            found.append(item)
        return found

    def _slice(
        self, node: Node, overall: tuple[Entries, ...]
    ) -> tuple[list[_Model], tuple[Entries, ...], _Model | None]:
        """One slice that is all layers of every model: the same as models."""
        only, *more = self._slices(node)
        if more:
            raise _unsupported(more[0].mark, f"{self._theirs} merges whole models; slices are for passthrough")
        if "sources" not in only.entries:
            only.mark.refuse("a slice needs sources")
        sources = only.entries["sources"]
        models = self._sources(sources, ("model", "layer_range", "parameters"))
        assert isinstance(sources, Items)
        for item, model in zip(sources.items, models, strict=True):
            assert isinstance(item, Entries)
            _check_whole(item, model)
        base = only.entries.get("base_model")
        own = None if base is None or _is_null(base) else _Model(_model_path(base), base.mark, ())
        return models, (*_entries(only.entries.get("parameters"), "parameters"), *overall), own

    def _arranged(self, models: list[_Model], base: _Model | None) -> tuple[list[_Model], bool]:
        """The models in the order in which our method takes them, without its base; whether the base is one."""
        how = self._method.base
        others = [model for model in models if base is None or model.path != base.path]
        if base is None:
            if how in ("base", "first"):
                self._top.mark.refuse(f"{self._theirs} needs base_model")
            return models, False
        mine = next((model for model in models if model.path == base.path), base)
        if how == "model":  # one of them, whatever it is called
            return (models if mine is not base else [*models, base]), False
        if how == "first":
            return [mine, *others], False
        if mine.parameters and any(each.entries for each in mine.parameters):
            self._note(mine.mark, "parameters of the base change nothing")
        if not others:
            self._top.mark.refuse(f"{self._theirs} needs a model beside its base")
        return others, True

    # ---- how the output is written

    def _dtype(self) -> str:
        """out_dtype, else dtype, in which mergekit computes and writes; bake always computes in float64."""
        key = "out_dtype" if self._given("out_dtype") is not None else "dtype"
        node = self._given(key)
        if node is None:
            return "keep"
        name = Text("a dtype").read(node).removeprefix("torch.")
        if name not in _DTYPES:
            raise _unsupported(node.mark, f"bake does not write {shortened(name)}; choose {', '.join(_DTYPES)}")
        return _DTYPES[name]

    def _check_tokenizer(self, first: Path) -> None:
        """Raise Unsupported unless the tokenizer is that of the model whose side files the output gets."""
        for key in ("tokenizer_source", "tokenizer"):
            node = self._given(key)
            if isinstance(node, Entries):
                self._check_keys(node, ("source", "tokens", "pad_to_multiple_of"), "tokenizer")
                for part in ("tokens", "pad_to_multiple_of"):
                    if part in node.entries and not _is_empty(node.entries[part]):
                        raise _unsupported(node.keys[part], f"{part} of mergekit's tokenizer is not done by bake")
                node = node.entries.get("source", Scalar(node.mark, "union", True))
            if node is None or _is_null(node):
                continue
            name = Text("a tokenizer's source").read(node)
            if name != "base" and node.mark.file.parent / name != first:
                raise _unsupported(
                    node.mark,
                    f"a tokenizer of {shortened(name)}: the output of bake has that of {first.name}, and models whose "
                    f"vocabularies differ are not merged; leave it out",
                )

    # ---- parameters

    def _parameters(self, models: list[_Model], shared: tuple[Entries, ...]) -> dict[str, Setting]:
        known = {each.theirs: each for each in self._method.parameters}
        self._check_parameters(models, shared, known)
        found: dict[str, Setting] = dict(self._method.fixed)
        for parameter in self._method.parameters:
            if parameter.ours and parameter.per_model and self._theirs != "passthrough":
                each: list[Any] = [
                    self._setting(parameter, (*model.parameters, *shared), model.mark) for model in models
                ]
                if any(setting is not None for setting in each):
                    rest = self._defaults[parameter.ours]
                    found[parameter.ours] = [rest if setting is None else setting for setting in each]
            elif parameter.ours:
                narrow = models[0].parameters if parameter.per_model else ()
                setting = self._setting(parameter, (*narrow, *shared), self._top.mark)
                if setting is not None:
                    found[parameter.ours] = setting
        return _nuslerp(found) if self._theirs == "nuslerp" else found

    def _check_parameters(
        self, models: list[_Model], shared: tuple[Entries, ...], known: dict[str, _Parameter]
    ) -> None:
        """Refuse misspellings, note what changes nothing."""
        for is_alone, sources in ((False, shared), *((True, model.parameters) for model in models)):
            for entries in sources:
                self._check_keys(entries, tuple(known), f"{self._theirs} of mergekit")
                for key in filter(known.__contains__, entries.entries):
                    if not known[key].ours:
                        self._note(entries.keys[key], f"{key} changes nothing")
                    elif is_alone and not known[key].per_model:
                        self._note(entries.keys[key], f"{key} is the same for all models; here it changes nothing")

    def _setting(self, parameter: _Parameter, sources: tuple[Entries, ...], place: Mark) -> Any:
        """What the sources say, the narrowest first; None if none says anything and ours has the same default."""
        nodes = [entries.entries[parameter.theirs] for entries in sources if parameter.theirs in entries.entries]
        if parameter.is_switch:
            switches = [_switched(parameter, node) for node in nodes]
            return switches[0] if switches else None
        gradients: list[Gradient] = []
        for gradient, is_one in [condition for node in nodes for condition in _conditions(node)]:
            number = gradient.values[0]
            if is_one:
                return Selection(number=number, gradients=tuple(gradients)) if gradients else number
            gradients.append(gradient)
            if not gradient.filter:
                return Selection(number=number, gradients=tuple(gradients))
        if parameter.required:
            part = "for all tensors: end its list with a value without a filter" if gradients else ""
            place.refuse(f"{self._theirs} needs {parameter.theirs}{f' {part}' if part else ''}")
        return Selection(number=parameter.default, gradients=tuple(gradients)) if gradients else parameter.default


def _unsupported(mark: Mark, message: str) -> Unsupported:
    return Unsupported(f"{mark}: {message}", **mark.details)


def _is_null(node: Node) -> bool:
    return isinstance(node, Scalar) and node.value is None


def _is_empty(node: Node) -> bool:
    return _is_null(node) or (isinstance(node, Entries) and not node.entries)


def _entries(node: Node | None, what: str) -> tuple[Entries, ...]:
    """The mapping at a node, if there is one."""
    if node is None or _is_null(node):
        return ()
    if not isinstance(node, Entries):
        expect(node, f"{what}, a mapping,")
    return (node,)


def _model_path(node: Node) -> Path:
    """Where a model lies. Raises Unsupported for LoRAs and revisions, InputError for models that are not there."""
    if isinstance(node, Entries):
        raise _unsupported(node.mark, "a model is named by the folder it lies in; name that alone")
    text = Text("the folder of a model").read(node)
    path = node.mark.file.parent / text
    if os.path.exists(path):
        return path
    model, plus, lora = text.partition("+")
    if plus:
        raise _unsupported(
            node.mark, f"fuse the LoRA first, 'bake fuse {model} -l {lora} -o FOLDER', and name FOLDER here"
        )
    raise InputError(
        f"{node.mark}: {path}: there is no such folder. bake downloads nothing: name the folder in which {text} lies, "
        f"relative to this file",
        path=str(path),
        **node.mark.details,
    )


def _layer_range(source: Entries) -> tuple[int, int]:
    """The layers [first, end) that a source of a slice names."""
    node = source.entries.get("layer_range")
    if node is None:
        source.mark.refuse("a source of a slice needs layer_range")
    found = ListOf(Number(low=0, whole=True)).read(node)
    if len(found) != 2:
        expect(node, "layer_range: [FIRST, END]")
    return int(found[0]), int(found[1])


def _check_whole(source: Entries, model: _Model) -> None:
    """Raise Unsupported unless a slice is all layers of its model."""
    found, node = _layer_range(source), source.entries["layer_range"]
    config = read_json_object(model.path / "config.json") if (model.path / "config.json").is_file() else {}
    inner = config.get("text_config")
    counts = [each[key] for each in (config, inner) if isinstance(each, dict) for key in _LAYER_COUNTS if key in each]
    if not counts:
        raise _unsupported(node.mark, f"{model.path} does not say how many layers it has; write models: for slices:")
    if found != (0, counts[0]):
        raise _unsupported(
            node.mark,
            f"layers {found[0]} to {found[1]} of {shortened(counts[0])}: bake does not cut models into slices",
        )


def _switched(parameter: _Parameter, node: Node) -> Setting:
    """The value of a switch: the same for all tensors."""
    if isinstance(node, (Items, Entries)):
        raise _unsupported(node.mark, f"{parameter.theirs} is the same for all tensors; write true or false")
    value = Switch().read(node)
    return value if parameter.words is None else parameter.words[value]


def _conditions(node: Node) -> Iterator[tuple[Gradient, bool]]:
    """What a setting says, each with whether it is one number for all tensors; the first that is about one counts."""
    entries = node.items if isinstance(node, Items) else (node,)
    if not any(isinstance(each, Entries) for each in entries):
        if entries:
            yield Gradient(_numbers(node)), isinstance(node, Scalar)
        return
    for each in entries:
        if not isinstance(each, Entries):
            expect(each, "a mapping with value: and filter:, as beside it,")
        if "value" not in each.entries:
            each.mark.refuse("there is no value:")
        unknown = each.keys.keys() - {"value", "filter"}
        if unknown:
            key = min(unknown)
            each.keys[key].refuse(f"beside value: and filter: there is no {shortened(key)}")
        given = each.entries.get("filter")
        wanted = "" if given is None or _is_null(given) else Text("part of a tensor's name").read(given)
        wanted = "" if wanted == "*" else wanted
        value = each.entries["value"]
        if isinstance(value, Items) and not value.items:
            continue
        yield Gradient(_numbers(value), wanted), isinstance(value, Scalar) and not wanted


def _numbers(node: Node) -> tuple[float, ...]:
    if isinstance(node, Items):
        return tuple(number for each in node.items for number in _numbers(each))
    if isinstance(node, Scalar) and not node.is_plain:  # mergekit reads "0.5" as a number too
        node = Scalar(node.mark, node.text.strip(), True)
    if not isinstance(node, Scalar):
        expect(node, "a number")
    return (Number().read(node),)


def _nuslerp(found: dict[str, Setting]) -> dict[str, Setting]:
    """nuslerp_flatten and nuslerp_row_wise as the one word that bake has for them."""
    flatten, row_wise = found.pop("flatten", True), found.pop("row_wise", False)
    return {**found, "along": "tensor" if flatten else "column" if row_wise else "row"}
