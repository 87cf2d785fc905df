"""Hugging Face language models: the prefixes their towers go by, fused projections, GPT-2's layout.

The names of such a model are the adapter's names, but for what changed between releases and classes: a
head class wraps its model under a name, vision-language models moved their towers (transformers 4.52),
some checkpoints fuse q, k and v or gate and up. Source: transformers conversion_mapping.py and the
`base_model_prefix` of its model classes; experts are in `bake.keys.experts`.
"""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Collection, Iterator, Mapping
from typing import NamedTuple

from bake.keys import experts
from bake.keys.places import Parameters, Place

Shape = tuple[int, ...]
CONV1D_LEAVES = (".c_attn", ".c_proj", ".c_fc", ".q_attn")  # the layers of GPT-2 that are Conv1D


class Tower(NamedTuple):
    """One part of a model: what it may be called, and what lies directly below."""

    prefixes: tuple[str, ...]  # the longer before those they begin with
    children: tuple[str, ...] = ()  # the first must be there; () stands for everything


_TOWERS = (
    # text decoder of Llama, Mistral, Qwen, Gemma, Phi, Mixtral ...; bare in embedding models
    Tower(
        (
            "model.language_model.model.",
            "model.language_model.",
            "language_model.model.",
            "language_model.",
            "model.",
            "",
        ),
        ("layers", "embed_tokens", "norm"),
    ),
    # GPT-2, GPT-J, Falcon, Bloom; GPT-2 itself is published without the prefix
    Tower(
        ("transformer.", ""),
        ("h", "wte", "wpe", "ln_f", "drop", "word_embeddings", "word_embeddings_layernorm"),
    ),
    Tower(("gpt_neox.", ""), ("layers", "embed_in", "final_layer_norm")),
    Tower(("backbone.", ""), ("layers", "embeddings", "norm_f")),  # Mamba
    # encoders: sentence embedders are published bare, models with a head under the name of the model
    Tower(
        ("bert.", "roberta.", "electra.", "deberta.", "mpnet.", "albert.", "0.auto_model.", "auto_model.", ""),
        ("embeddings", "encoder", "pooler"),
    ),
    Tower(("distilbert.", ""), ("transformer", "embeddings")),
    # BART, Whisper, OPT, M2M100; T5 has no prefix
    Tower(("model.", ""), ("decoder", "encoder", "shared")),
    # what vision-language and audio models have beside the text decoder
    Tower(("model.visual.", "visual.")),
    Tower(
        (
            "model.vision_tower.vision_model.",
            "model.vision_tower.",
            "vision_tower.vision_model.",
            "vision_tower.",
        )
    ),
    Tower(("model.vision_model.", "vision_model.")),
    Tower(("model.audio_tower.", "audio_tower.")),
    Tower(("model.multi_modal_projector.", "multi_modal_projector.")),
    Tower(("language_model.lm_head", "lm_head", "embed_out")),  # GPT-NeoX's is renamed by transformers 5
)


class Fusion(NamedTuple):
    """Projections of one input that some checkpoints store as one tensor."""

    fused: str
    split: tuple[str, ...]  # from top to bottom
    beside: str | None = None  # a projection whose inputs are as many as the first part has rows; None: equal parts


_FUSIONS = (
    Fusion("gate_up_proj", ("gate_proj", "up_proj")),  #                 Phi-3, GLM-4
    Fusion("qkv_proj", ("q_proj", "k_proj", "v_proj"), "o_proj"),  #     Phi-3; k and v may have fewer heads
)


def aliases(modules: Mapping[str, Parameters], shapes: Mapping[str, Shape]) -> dict[str, Parameters]:
    """The other spellings of a Hugging Face language model's modules."""
    found = experts.aliases(modules, shapes)
    for module, parameters in modules.items():
        found.update(_split_and_fused(module, parameters, modules, shapes))
    found.update(_under_other_prefixes({**modules, **found}))
    return {alias: parameters for alias, parameters in found.items() if alias not in modules}


def _split_and_fused(
    module: str, parameters: Parameters, modules: Mapping[str, Parameters], shapes: Mapping[str, Shape]
) -> Iterator[tuple[str, Parameters]]:
    """The parts of a fused projection, or the fused projection of which `module` is the first part."""
    above, _, leaf = module.rpartition(".")
    for fusion in _FUSIONS:
        if leaf == fusion.fused:
            beside = modules.get(f"{above}.{fusion.beside}", {})
            bounds = _bounds(fusion, parameters, beside, shapes)
            for name, rows in zip(fusion.split, bounds, strict=bool(bounds)):
                yield (
                    f"{above}.{name}",
                    {key: (Place(places[0].tensor, rows),) for key, places in parameters.items()},
                )
        elif leaf == fusion.split[0] and not above.rpartition(".")[2].isdigit():  # an expert is no model's dense layer
            parts = [modules.get(f"{above}.{name}", {}) for name in fusion.split]
            stacks = {key: [part[key][0] for part in parts] for key in _common(parts)}
            whole = {
                key: _stack(places, shapes)
                for key, places in stacks.items()
                if all(shapes[place.tensor] for place in places)  # scalars have no rows
            }
            if "weight" in whole and all(part.keys() == whole.keys() for part in parts):
                yield f"{above}.{fusion.fused}", whole


def _bounds(
    fusion: Fusion, parameters: Parameters, beside: Parameters, shapes: Mapping[str, Shape]
) -> tuple[tuple[int, int], ...]:
    """[first, past the last) row of every part; () where the sizes cannot be known."""
    if "weight" not in parameters or len(shapes[parameters["weight"][0].tensor]) != 2:
        return ()
    height = shapes[parameters["weight"][0].tensor][0]
    first = height // len(fusion.split)
    if fusion.beside is not None:
        if "weight" not in beside:
            return ()
        first = shapes[beside["weight"][0].tensor][-1]
    each, rest = divmod(height - first, len(fusion.split) - 1)
    if rest or each <= 0 or (fusion.beside is None and each != first):
        return ()
    starts = [0, *(first + each * index for index in range(len(fusion.split) - 1)), height]
    return tuple(itertools.pairwise(starts))


def _common(parts: list[Parameters]) -> set[str]:
    return set.intersection(*(set(part) for part in parts))


def _stack(places: list[Place], shapes: Mapping[str, Shape]) -> tuple[Place, ...]:
    """The same places, each taking its share of the rows of one update."""
    heights = [shapes[place.tensor][0] for place in places]
    ends = list(itertools.accumulate(heights))
    return tuple(
        place._replace(part=(end - height, end)) for place, height, end in zip(places, heights, ends, strict=True)
    )


def _under_other_prefixes(modules: Mapping[str, Parameters]) -> dict[str, Parameters]:
    """Every module under the other prefixes of its tower; a spelling that would mean two modules is left out."""
    names = sorted(modules)
    found: dict[str, Parameters] = {}
    ambiguous: set[str] = set()
    for tower in _TOWERS:
        own = _own_prefix(tower, names)
        if own is None:
            continue
        others = [prefix for prefix in tower.prefixes if prefix != own]
        children = set(tower.children)
        for path, parameters in modules.items():
            below = path[len(own) :]
            if not path.startswith(own) or (children and below.partition(".")[0] not in children):
                continue
            for prefix in others:
                if found.setdefault(prefix + below, parameters) is not parameters:
                    ambiguous.add(prefix + below)
    return {path: parameters for path, parameters in found.items() if path not in ambiguous}


def _own_prefix(tower: Tower, names: list[str]) -> str | None:
    """The prefix that the tower goes by in a model whose modules are `names`, sorted; None if it has no such tower."""
    for prefix in tower.prefixes:
        start = prefix + (tower.children[0] + "." if tower.children else "")
        place = bisect.bisect_left(names, start)
        if place < len(names) and names[place].startswith(start):
            return prefix
    return None


class Drift(NamedTuple):
    """A constant difference between an adapter's paths and the base's."""

    dropped: str  # prefix that only the adapter has
    added: str  # prefix that only the base has

    def apply(self, path: str) -> str:
        return self.added + path.removeprefix(self.dropped)


def find_drift(paths: Collection[str], known: Collection[str]) -> Drift | None:
    """The one prefix that makes all of `paths` known, by dropping it or by adding it.

    A head class wraps its model under a name (`model.`, `transformer.`, `bert.`) and an adapter
    trained on the one is used on the other. None if no prefix, or more than one, fits all paths.
    """
    if not paths:
        return None
    first = min(paths)
    parts = first.split(".")
    candidates = [Drift("", name[: -len(first)]) for name in known if name.endswith("." + first)]
    candidates += [Drift(".".join(parts[:count]) + ".", "") for count in range(1, len(parts))]
    fitting = [
        drift
        for drift in candidates
        if all(path.startswith(drift.dropped) and drift.apply(path) in known for path in paths)
    ]
    return fitting[0] if len(fitting) == 1 else None


def encoder_aliases(modules: Mapping[str, Parameters], shapes: Mapping[str, Shape]) -> dict[str, Parameters]:
    """The names of a language model that serves as text encoder, with and without the level `model.`."""
    return {
        path.removeprefix("model.") if path.startswith("model.") else f"model.{path}": parameters
        for path, parameters in modules.items()
    }


def stores_in_out(modules: Mapping[str, Parameters], shapes: Mapping[str, Shape]) -> bool:
    """True if Linear weights are stored (in, out), as GPT-2's Conv1D does.

    Told by the fused projection c_attn, which makes q, k and v out of one input and is therefore
    wider than tall in that layout; models that took over the name for a Linear have it the other way.
    """
    for path, parameters in modules.items():
        if path.endswith("attn.c_attn") and "weight" in parameters:
            shape = shapes[parameters["weight"][0].tensor]
            return len(shape) == 2 and shape[1] > shape[0]
    return False
