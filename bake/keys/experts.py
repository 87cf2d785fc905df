"""Mixtures of experts: one matrix per expert in published files, one stack of matrices in transformers 5.

    Mixtral       block_sparse_moe.experts.E.w1, w3, w2                 [i, h], [i, h], [h, i]
    Qwen, others  mlp.experts.E.gate_proj, up_proj, down_proj           the same
    stacked       mlp.experts.gate_up_proj, mlp.experts.down_proj       [E, 2i, h] (w1 above w3), [E, h, i]
    stacked, in x out (gpt-oss, Llama 4)                                [E, h, 2i], [E, i, h]

Adapters come in both: a LoRA on each expert's Linear, or one LoRA on the stack (PEFT's
`target_parameters`). Source: transformers conversion_mapping.py, PEFT tuners/lora/layer.py ParamWrapper.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from bake.errors import ShapeMismatch, Unsupported
from bake.keys.places import Parameters, Place

Shape = tuple[int, ...]

# Parameter of the stack -> what lies in it from top to bottom, as each dialect names it.
_PARTS: dict[str, dict[str, tuple[str, ...]]] = {
    "gate_up_proj": {"mlp": ("gate_proj", "up_proj"), "block_sparse_moe": ("w1", "w3")},
    "down_proj": {"mlp": ("down_proj",), "block_sparse_moe": ("w2",)},
}
# A leaf of one expert -> (parameter of the stack, place in it)
_LEAVES = {
    leaf: (stack, position)
    for stack, dialects in _PARTS.items()
    for leaves in dialects.values()
    for position, leaf in enumerate(leaves)
}
# What the block of experts is called: the same one under two names. Others (feed_forward) have only one.
_BLOCKS = ("mlp", "block_sparse_moe")
_ROUTERS = ("gate", "router")  # Mixtral's and Qwen's, PhiMoE's since transformers 5
_STACKED_ELSEWHERE = {"input_linear": "gate_up_proj", "output_linear": "down_proj"}  # GraniteMoE before transformers 5

_NUMBER = re.compile(r"\d{1,6}")

# Stored in x out and known to be so by PEFT (the class sets is_transposed); source: transformers 5, by model_type.
_IN_OUT_FOR_PEFT = frozenset({"aria", "aria_text", "gpt_oss", "openai_privacy_filter"})


def aliases(modules: Mapping[str, Parameters], shapes: Mapping[str, Shape]) -> dict[str, Parameters]:
    """The other spellings of experts and their routers: of each expert where they are stacked, and the reverse."""
    found: dict[str, Parameters] = {}
    single: dict[tuple[str, str], dict[tuple[int, int], Place]] = {}  # (block, parameter) -> (expert, position) -> it
    blocks: set[str] = set()
    for module, parameters in modules.items():
        parts = module.rsplit(".", 3)
        if len(parts) == 4 and parts[1] == "experts" and _NUMBER.fullmatch(parts[2]) and parts[3] in _LEAVES:
            stack, position = _LEAVES[parts[3]]
            if "weight" in parameters:
                single.setdefault((parts[0], stack), {})[int(parts[2]), position] = parameters["weight"][0]
            blocks.add(parts[0])
        elif parts[-1] == "gate_up_proj" and parts[-2:-1] == ["experts"]:
            block = module.removesuffix(".experts.gate_up_proj")
            found.update(_unstack(block, modules, shapes))
            blocks.add(block)
        elif parts[-1] in _STACKED_ELSEWHERE:
            block = module.rpartition(".")[0]
            found[f"{block}.experts.{_STACKED_ELSEWHERE[parts[-1]]}"] = parameters
            if f"{block}.router.layer" in modules:
                found[f"{block}.router"] = modules[f"{block}.router.layer"]
            blocks.add(block)
    for (block, stack), places in single.items():
        stacked = _stack(places, shapes)
        if stacked:
            found[f"{block}.experts.{stack}"] = {"weight": stacked}
    found.update(_under_other_names(blocks, {**modules, **found}))
    return found


def _stack(places: Mapping[tuple[int, int], Place], shapes: Mapping[str, Shape]) -> tuple[Place, ...]:
    """The places of a stack whose experts are stored one by one; () unless every expert is there in one shape."""
    experts = max(expert for expert, _ in places) + 1
    positions = max(position for _, position in places) + 1
    sizes = {shapes[place.tensor] for place in places.values()}
    if len(places) != experts * positions or len(sizes) != 1 or () in sizes:
        return ()
    (height, *_) = sizes.pop()
    ordered = (places[key] for key in sorted(places))
    return tuple(place._replace(part=(i * height, (i + 1) * height)) for i, place in enumerate(ordered))


def _unstack(block: str, modules: Mapping[str, Parameters], shapes: Mapping[str, Shape]) -> dict[str, Parameters]:
    """The spellings of each expert of a stack that is stored out x in; in x out has no such spellings."""
    if _layout(_weights(f"{block}.experts", modules), shapes) != "out_in":
        return {}
    found: dict[str, Parameters] = {}
    for stack, dialects in _PARTS.items():
        (place,) = modules[f"{block}.experts.{stack}"]["weight"]
        experts, height, _ = shapes[place.tensor]
        for dialect, leaves in dialects.items():
            name = _renamed(block, dialect)
            if name is None:
                continue
            each = height // len(leaves)
            for expert, (position, leaf) in itertools.product(range(experts), enumerate(leaves)):
                first = expert * height + position * each
                found[f"{name}.experts.{expert}.{leaf}"] = {
                    "weight": (Place(place.tensor, (first, first + each), stacked=True),)
                }
    return found


def _weights(module: str, spellings: Mapping[str, Parameters]) -> dict[str, tuple[Place, ...]]:
    """Parameter -> places, of a module of stacked experts."""
    paths = {stack: f"{module}.{stack}" for stack in _PARTS}
    return {stack: spellings[path]["weight"] for stack, path in paths.items() if "weight" in spellings.get(path, {})}


def _layout(weights: Mapping[str, tuple[Place, ...]], shapes: Mapping[str, Shape]) -> str | None:
    """ "out_in" or "in_out", told by which axis of the one stack is twice an axis of the other; None if neither."""
    dims = {name: _dimensions(name, places, shapes) for name, places in weights.items()}
    gate_up, down = dims.get("gate_up_proj"), dims.get("down_proj")
    if gate_up is None or down is None or gate_up.experts != down.experts:
        return None
    if (gate_up.height, gate_up.width) == (2 * down.width, down.height):
        return "out_in"
    if (gate_up.height, gate_up.width) == (down.width, 2 * down.height):
        return "in_out"
    return None


def _renamed(block: str, dialect: str) -> str | None:
    """`block` with its last name in `dialect`; None where it is called like neither of the two."""
    above, _, name = block.rpartition(".")
    if name not in _BLOCKS:
        return block if dialect == "mlp" else None
    return f"{above}.{dialect}" if above else dialect


def _under_other_names(blocks: set[str], modules: Mapping[str, Parameters]) -> dict[str, Parameters]:
    """The routers under all their names, and Mixtral's experts under the name that transformers 5 gives the block."""
    found: dict[str, Parameters] = {}
    for block in blocks:
        for router in _ROUTERS:
            if f"{block}.{router}" in modules:
                for dialect, other in itertools.product(_BLOCKS, _ROUTERS):
                    name = _renamed(block, dialect)
                    if name is not None:
                        found[f"{name}.{other}"] = modules[f"{block}.{router}"]
    renamed = {block: _renamed(block, "mlp") for block in blocks if block.endswith(".block_sparse_moe")}
    for path, parameters in modules.items() if renamed else ():
        block = path.rpartition(".experts.")[0]
        if block in renamed:
            found[f"{renamed[block]}{path[len(block) :]}"] = parameters
    return {path: parameters for path, parameters in found.items() if path not in modules}


class Level(NamedTuple):
    """One LoRA among those that PEFT nests around a module whose parameters it targets."""

    name: str  # the module as the adapter spells it, with every ".base_layer"
    down: Shape  # lora_A: (experts * rank, in)
    up: Shape  # lora_B: (out, rank * experts)


class ExpertSlice(NamedTuple):
    """What one expert takes from the two factors, and where it goes.

    Its update is `up[:, first::step] @ down[begin:end]`; a place with `transposed` takes the transpose of
    that. `part` of a place are rows of the update after that transposition.
    """

    expert: int
    down_rows: tuple[int, int]  # (begin, end) rows of lora_A
    up_columns: tuple[int, int]  # (first, step) of the columns of lora_B: the expert's number runs fastest
    places: tuple[Place, ...]


class ExpertUpdate(NamedTuple):
    """One LoRA on a stack of experts, taken apart."""

    name: str  # of the level
    parameter: str  # dotted path of the parameter: what rank_pattern and alpha_pattern are matched with
    rank: int  # of each expert
    slices: tuple[ExpertSlice, ...]


class _Dimensions(NamedTuple):
    experts: int
    height: int  # of one expert's matrix as it is stored
    width: int


class _Fit(NamedTuple):
    rank: int
    transposed: bool | None  # None: both ways fit


def split_nesting(module: str) -> tuple[str, int]:
    """(module without `.base_layer`, how many of them there were)."""
    parts = module.split(".")
    kept = [part for part in parts if part != "base_layer"]
    return ".".join(kept), len(parts) - len(kept)


def is_targeted(path: str, targets: Sequence[str]) -> bool:
    """True if `target_parameters` names the parameter at `path`. Source: PEFT tuners_utils _inject_parameters."""
    return any(path == target or path.endswith("." + target) for target in targets)


def is_stack(module: str, targets: Sequence[str]) -> bool:
    """True if `target_parameters` names bare parameters of `module`, so that its factors are those of a stack.

    A target may be the last name alone, as PEFT writes it itself for "all-linear" since transformers 5; only
    the module called `experts` has such parameters. Any other parameter, such as the `.weight` of a router,
    is a matrix with factors like any layer's.
    Source: PEFT utils/transformers_weight_conversion.py, _convert_peft_config_moe.
    """
    above = {target.rpartition(".")[0] for target in targets if target.rpartition(".")[2] in _PARTS}
    return ("" in above and module.rpartition(".")[2] == "experts") or is_targeted(module, list(above - {""}))


def expert_updates(
    module: str,
    levels: Sequence[Level],
    targets: Sequence[str],
    spellings: Mapping[str, Parameters],
    shapes: Mapping[str, Shape],
    *,
    peft_version: str | None = None,
    model_type: str = "",
) -> tuple[ExpertUpdate, ...]:
    """Where every expert's share of every level goes; one update per level, in the order of `levels`.

    module: path of the experts without ".base_layer", as `spellings` has it. targets: `target_parameters`
    of the configuration. shapes: full tensor name -> shape. peft_version, model_type: of the adapter's and
    the base's configuration; they matter for square matrices only.
    Which level is which parameter is told by the shapes: PEFT nests in the order in which the model
    registers its parameters, not in the order of the list.
    Raises ShapeMismatch if the levels fit no parameters, Unsupported if they fit in two ways.
    """
    weights = _weights(module, spellings)
    sizes = {
        stack: size
        for stack, places in weights.items()
        if is_targeted(f"{module}.{stack}", targets) and (size := _dimensions(stack, places, shapes)) is not None
    }
    choices = []
    for order in itertools.permutations(sizes, len(levels)):
        fits = [_fit(level, sizes[stack]) for level, stack in zip(levels, order, strict=True)]
        if None not in fits:
            choices.append([(stack, fit) for stack, fit in zip(order, fits, strict=True) if fit is not None])
    if not choices:
        held = ", ".join(f"{level.name} {list(level.down)} and {list(level.up)}" for level in levels)
        there = ", ".join(f"{stack} {list(size)}" for stack, size in sizes.items()) or "no such stack of experts"
        raise ShapeMismatch(f"{module}: {held} do not fit the base: {there} (experts, rows, columns)", module=module)
    if len(choices) > 1:
        raise Unsupported(f"{module}: which of its factors update {' and which '.join(sizes)} cannot be told apart")
    square = _square_rule(_layout(weights, shapes), peft_version, model_type)
    updates = []
    for level, (stack, fit) in zip(levels, choices[0], strict=True):
        transposed = square if fit.transposed is None else fit.transposed
        if transposed is None:
            raise Unsupported(
                f"{level.name}: the experts' matrices are square, and which release of PEFT trained the adapter is "
                f"not known for certain, so neither is whether its update has to be transposed. "
                f"Merge it with the release that trained it (merge_and_unload).",
                module=level.name,
            )
        slices = _slices(fit.rank, weights[stack], sizes[stack], transposed)
        updates.append(ExpertUpdate(level.name, f"{module}.{stack}", fit.rank, tuple(slices)))
    return tuple(updates)


def _dimensions(stack: str, places: tuple[Place, ...], shapes: Mapping[str, Shape]) -> _Dimensions | None:
    """The size of a stack, stored whole or expert by expert; None if it is no stack."""
    shape = shapes[places[0].tensor]
    if len(places) == 1 and len(shape) == 3:
        return _Dimensions(*shape)
    each = len(next(iter(_PARTS[stack].values())))
    if len(shape) != 2 or len(places) % each:
        return None
    return _Dimensions(len(places) // each, shape[0] * each, shape[1])


def _fit(level: Level, size: _Dimensions) -> _Fit | None:
    if len(level.down) != 2 or len(level.up) != 2:
        return None
    rank, rest = divmod(level.down[0], size.experts)
    if rest or level.up[1] != level.down[0]:
        return None
    out_in = (level.up[0], level.down[1])
    straight, flipped = out_in == (size.height, size.width), out_in == (size.width, size.height)
    if not straight and not flipped:
        return None
    return _Fit(rank, None if straight and flipped else flipped)


def _square_rule(layout: str | None, peft_version: str | None, model_type: str) -> bool | None:
    """Whether the update of a square matrix is transposed; None if that cannot be known.

    PEFT took the axes of the stack for (in, out) up to 0.18 and takes them for (out, in) since 0.19.1,
    except where the model says that it stores in x out.
    """
    if layout == "in_out":
        return True if model_type in _IN_OUT_FOR_PEFT else None
    version = re.match(r"(\d+)\.(\d+)\.(\d+)", peft_version or "")
    if layout is None or version is None:
        return None
    number = tuple(map(int, version.groups()))
    return False if number >= (0, 19, 1) else True if number < (0, 19, 0) else None


def _slices(rank: int, places: tuple[Place, ...], size: _Dimensions, transposed: bool) -> Iterator[ExpertSlice]:
    for expert in range(size.experts):
        own = tuple(_places_of(expert, places, size, transposed))
        yield ExpertSlice(expert, (expert * rank, (expert + 1) * rank), (expert, size.experts), own)


def _places_of(expert: int, places: tuple[Place, ...], size: _Dimensions, transposed: bool) -> Iterator[Place]:
    if len(places) == 1 and places[0].part is None:
        rows = (expert * size.height, (expert + 1) * size.height)
        yield Place(places[0].tensor, rows, transposed, None, stacked=True)
        return
    each = len(places) // size.experts
    height = size.height // each
    for position in range(each):
        place = places[expert * each + position]
        part = (position * height, (position + 1) * height) if each > 1 else None
        yield Place(place.tensor, place.rows, transposed, part)
