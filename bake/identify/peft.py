"""adapter_config.json of PEFT and MLX: everything in it that decides what the factors mean."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from bake.errors import InputError, Unsupported
from bake.identify.patterns import Patterns
from bake.io.jsontext import parse_object
from bake.keys.experts import is_targeted

# What PEFT calls a type -> the setting that holds its alpha; None: it has no scale of its own.
_KINDS: dict[str, str | None] = {
    "LORA": "lora_alpha",
    "LOHA": "alpha",
    "LOKR": "alpha",
    "ADALORA": "lora_alpha",
    "OFT": None,
    "BOFT": None,
    "IA3": None,
    "VERA": None,
    "HRA": None,
    "TRAINABLE_TOKENS": None,
    "LN_TUNING": None,
}
_CHANGES_NO_WEIGHT = frozenset(
    {"PROMPT_TUNING", "MULTITASK_PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING", "ADAPTION_PROMPT", "CPT", "CARTRIDGE"}
)
_CHOOSES_AT_RUN_TIME = frozenset({"XLORA", "POLY"})
_RANKED = ("LORA", "LOHA", "LOKR")  # the stored rank is the configured one; AdaLoRA prunes, and divides by the first

# Settings that no sum of weights can express, or that need what bake does not have.
#   setting                    what it is                                                 what to do instead
_UNSUPPORTED_IF_SET = {
    "layer_replication": ("replicated layers (layer_replication)", "Expand the base first: it has fewer layers."),
    "alora_invocation_tokens": (
        "an activated LoRA (aLoRA), which is switched on by certain tokens only",
        "Serve it beside its base.",
    ),
    "use_qalora": ("QALoRA, whose factors belong to groups of quantised inputs", "PEFT cannot merge it either."),
    "arrow_config": ("an Arrow router, which mixes adapters per token", "Fuse the adapters it routes to one by one."),
    "kasa_config": ("KaSA, which truncates the base first", "Call merge_and_unload() in PEFT."),
    "use_bdlora": ("a block-diagonal LoRA (BD-LoRA)", "Call merge_and_unload() in PEFT."),
}
# Initialisations that change the base itself: the factors only fit the changed base.
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")

_QUANTISED_NAME = re.compile(
    r"(?:^|[-_./])(?:bnb|[48]-?bits?|int[48]|nf4|fp4|mxfp4|nvfp4|gptq|awq|q[48](?:_\w+)?|qlora|quanti[sz]ed)(?=$|[-_./])",
    re.IGNORECASE,
)
_INPUT_EMBEDDING = ""  # key of PeftConfig.token_rows for "whatever the model's input embedding is called"
_MOST_TERMS = 100
_OFT_CHANGED_IN = (0, 18)


@dataclass(frozen=True, slots=True)
class PeftConfig:
    """The part of a configuration that decides scales, orientation and which tensors replace which."""

    rank: int | None
    alpha: float | None
    rank_pattern: Patterns
    alpha_pattern: Patterns
    rank_stabilised: bool
    fan_in_fan_out: bool
    source: str  # where it was read, for messages
    kind: str = "LORA"  # peft_type; "MLX" for the adapters of mlx-lm
    fixed_scale: float | None = None  # MLX: the factor itself, not divided by any rank
    dora: bool = False
    bias: str = "none"  # "all", "lora_only", "boft_only", ...: tensors named .bias replace the base's
    lora_bias: bool = False  # each lora_B has a bias of its own, scaled like the weight
    modules_to_save: tuple[str, ...] = ()  # modules stored whole, which replace the base's
    token_rows: Mapping[str, tuple[int, ...]] = field(default_factory=dict)  # embedding ("": the input's) -> rows
    ties_embeddings: bool = False  # ensure_weight_tying: what changes the embedding changes its tied head as well
    target_parameters: tuple[str, ...] = ()  # bare parameters that were trained, see bake.keys.experts
    feedforward_modules: Patterns | tuple[str, ...] = ()  # IA3: scaled on the input; shapes tell too
    block_share: bool = False  # OFT: one block stands for all
    neumann_terms: int | None = None  # OFT: terms of the series for the inverse; None: the exact inverse
    rotation_limit: float | None = None  # OFT: the eps of coft, which PEFT applies whenever it uses the factors
    gram_schmidt: bool = False  # HRA: the vectors are made orthogonal first (apply_GS)
    peft_version: str | None = None  # None before 0.18
    base_model: str | None = None  # the base it was trained on, as the trainer called it
    notes: tuple[str, ...] = ()  # what the user should know

    def scale(self, module: str, rank: int | None) -> float:
        """alpha / rank of `module` (alpha / sqrt(rank) if rank-stabilised); 1 where no alpha is known.

        module: dotted path without the `base_model.model.` before it; for a target parameter the path of
        the parameter. rank: of its stored factors; None where they have none (LoKr with full factors), then
        the configured one counts.
        Raises InputError if the configuration names another rank than the factors have, Unsupported if that
        may be because they belong to a target parameter under another path.
        Source: PEFT utils/other.py get_pattern_key, update_layer in tuners/lora, lokr and adalora layer.py.
        """
        if self.fixed_scale is not None:
            return self.fixed_scale
        if _KINDS.get(self.kind) is None:
            return 1.0
        if is_targeted(f"{module}.weight", self.target_parameters):
            module = f"{module}.weight"  # the patterns are matched with the parameter's path
        configured = self.rank_pattern.find(module, self.rank)
        if self.kind in _RANKED and None not in (rank, configured) and configured != rank:
            if self.target_parameters and not is_targeted(module, self.target_parameters):
                raise Unsupported(
                    f"{self.source}: {module} was trained on a bare parameter (target_parameters) that is no stack of "
                    f"experts of this base, so its factors of rank {rank} cannot be taken apart. "
                    f"Call merge_and_unload() in PEFT.",
                    module=module,
                )
            raise InputError(
                f"{self.source}: rank {configured:g} for {module}, but its factors have rank {rank}; "
                f"the configuration belongs to another adapter",
                module=module,
            )
        divisor = configured if rank is None or self.kind not in _RANKED else rank
        alpha = self.alpha_pattern.find(module, self.alpha)
        if alpha is None:
            return 1.0
        if not divisor:
            raise InputError(f"{self.source}: no rank for {module}, by which its alpha has to be divided")
        if self.kind == "ADALORA":
            return float(alpha / (divisor + 1e-5))  # as PEFT guards it against a rank of 0
        return float(alpha / (math.sqrt(divisor) if self.rank_stabilised else divisor))

    def is_feedforward(self, module: str) -> bool:
        """True if the (IA)3 numbers of `module` scale its inputs. Source: PEFT tuners/ia3/model.py."""
        named = self.feedforward_modules
        if isinstance(named, Patterns):
            return named.find(module) is not None
        return any(module == name or module.endswith("." + name) for name in named)

    def rows_of(self, module: str) -> tuple[int, ...] | None:
        """The rows of the embedding `module` that were trained, in the order in which they are stored.

        PEFT's trainable tokens are stored for a tied output head as well, under the numbers of the embedding.
        Source: PEFT tuners/trainable_tokens/model.py.
        """
        for name, rows in self.token_rows.items():
            if name == _INPUT_EMBEDDING or module == name or module.endswith("." + name):
                return rows
        return next(iter(self.token_rows.values()), None) if self.kind == "TRAINABLE_TOKENS" else None


def parse_config(config: Mapping[str, Any], source: str) -> PeftConfig | None:
    """What an adapter_config.json of PEFT or MLX says; None if it is neither's.

    Raises InputError if it is malformed, Unsupported if it asks for what bake does not fuse.
    """
    if "peft_type" in config:
        return parse_peft_config(config, source)
    if "fine_tune_type" in config or "lora_parameters" in config:
        return parse_mlx_config(config, source)
    return None


def parse_peft_config(config: Mapping[str, Any], source: str) -> PeftConfig:
    """The settings of a PEFT configuration; settings that are not known are passed over.

    Raises InputError if it is malformed, Unsupported if it asks for what bake does not fuse.
    """
    kind = str(config.get("peft_type", "LORA"))
    _refuse_kind(kind, source)
    _refuse_settings(config, kind, source)
    neumann = kind == "OFT" and bool(config.get("use_cayley_neumann", True))
    rank = config.get("init_r", 12) if kind == "ADALORA" else config.get("r")
    alpha_name = _KINDS[kind]
    alpha = config.get(alpha_name) if alpha_name is not None else None
    try:
        return PeftConfig(
            rank=None if rank is None else int(rank),
            alpha=None if alpha is None else _finite(alpha),
            rank_pattern=_patterns(config, "rank_pattern") if kind in _RANKED else Patterns(),
            alpha_pattern=_patterns(config, "alpha_pattern"),
            rank_stabilised=kind == "LORA" and bool(config.get("use_rslora")),
            fan_in_fan_out=bool(config.get("fan_in_fan_out")),
            source=source,
            kind=kind,
            dora=bool(config.get("use_dora")),
            bias=str(config.get("bias") or "none"),
            lora_bias=bool(config.get("lora_bias")),
            modules_to_save=_names(config, "modules_to_save"),
            token_rows=_token_rows(config, kind),
            ties_embeddings=bool(config.get("ensure_weight_tying")),
            target_parameters=_names(config, "target_parameters"),
            feedforward_modules=_names_or_pattern(config, "feedforward_modules"),
            block_share=bool(config.get("block_share")),
            neumann_terms=_terms(config) if neumann else None,
            rotation_limit=_finite(config.get("eps", 6e-5)) if config.get("coft") else None,
            gram_schmidt=bool(config.get("apply_GS")),
            peft_version=None if config.get("peft_version") is None else str(config["peft_version"]),
            base_model=None
            if config.get("base_model_name_or_path") is None
            else str(config["base_model_name_or_path"]),
            notes=tuple(_notes(config, "base_model_name_or_path", neumann)),
        )
    except (TypeError, ValueError, OverflowError, re.error) as error:
        raise InputError(f"{source}: malformed {kind} configuration: {error}") from None
    except Unsupported as refusal:
        raise Unsupported(f"{source}: {refusal.message}", **refusal.details) from None


def parse_mlx_config(config: Mapping[str, Any], source: str) -> PeftConfig:
    """The settings of an adapter_config.json that mlx-lm wrote.

    Raises InputError if it is malformed, Unsupported for whole fine-tunes and for the ambiguous scale of
    old releases. Source: mlx-lm tuner/lora.py and tuner/utils.py.
    """
    kind = config.get("fine_tune_type", "lora")
    if kind not in ("lora", "dora"):
        raise Unsupported(
            f"{source}: fine_tune_type {kind!r}: the file holds whole weights, which take the place of the base's. "
            f"Fuse it with mlx_lm.fuse.",
            fine_tune_type=kind,
        )
    try:
        settings = dict(config.get("lora_parameters") or {})
        if settings.get("scale") is None:
            raise ValueError("lora_parameters has no scale")
        scale, rank, alpha = _finite(settings["scale"]), settings.get("rank"), settings.get("alpha")
        if alpha is not None and (rank is None or float(alpha) != float(rank)):
            raise Unsupported(
                f"{source}: lora_parameters has scale {scale:g} and alpha {alpha}. Old releases of mlx-lm "
                f"multiplied the two and divided by the rank, newer ones ignore alpha: which one trained this adapter "
                f"cannot be told. Delete alpha, after changing scale to scale * alpha / rank if it was an old one."
            )
        return PeftConfig(
            rank=None if rank is None else int(rank),
            alpha=None,
            rank_pattern=Patterns(),
            alpha_pattern=Patterns(),
            rank_stabilised=False,
            fan_in_fan_out=False,
            source=source,
            kind="MLX",
            fixed_scale=scale,
            dora=kind == "dora" or bool(config.get("use_dora")),
            base_model=None if config.get("model") is None else str(config["model"]),
            notes=tuple(_notes(config, "model", False)),
        )
    except (TypeError, ValueError, OverflowError) as error:
        raise InputError(f"{source}: malformed MLX configuration: {error}") from None


def _refuse_kind(kind: str, source: str) -> None:
    if kind in _KINDS:
        return
    if kind in _CHANGES_NO_WEIGHT:
        remedy = "It changes no weights of the base, so there is nothing to fuse: use it with PEFT."
    elif kind in _CHOOSES_AT_RUN_TIME:
        remedy = "It chooses among adapters for every input, so no one set of weights stands for it: use it with PEFT."
    else:
        remedy = f"bake fuses {', '.join(_KINDS)}; for this one call merge_and_unload() in PEFT itself."
    raise Unsupported(f"{source}: a PEFT adapter of type {kind}. {remedy}", peft_type=kind)


def _refuse_settings(config: Mapping[str, Any], kind: str, source: str) -> None:
    for setting, (meaning, remedy) in _UNSUPPORTED_IF_SET.items():
        if config.get(setting):
            raise Unsupported(f"{source}: {meaning}, which bake does not fuse. {remedy}", setting=setting)
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(_CHANGES_BASE):
        raise Unsupported(
            f"{source}: initialised with {start}, so it was trained against a changed base and would "
            f"spoil the original one. Convert it in PEFT first (save_pretrained with "
            f"path_initial_model_for_weight_conversion).",
            init_lora_weights=start,
        )
    if kind == "OFT" and "oft_block_size" not in config:
        raise Unsupported(
            f"{source}: an OFT adapter of PEFT 0.14 or older, which meant something else by its factors. "
            f"Call merge_and_unload() in the release that trained it.",
            setting="oft_block_size",
        )
    if kind == "VERA" and config.get("save_projection") is False:
        raise Unsupported(
            f"{source}: VeRA without its projections (save_projection is false): they would have to be drawn again "
            f"by the very random generator of the training. Save it again with save_projection=True.",
            setting="save_projection",
        )


def _notes(config: Mapping[str, Any], base: str, neumann: bool) -> list[str]:
    notes = []
    name = str(config.get(base) or "")
    if _QUANTISED_NAME.search(name) or config.get("quantization_config"):
        notes.append(
            f"trained on a quantised base ({name or 'quantization_config'}): the same update on 16-bit weights "
            f"starts from slightly other values than in training"
        )
    if neumann and _version(config.get("peft_version")) < _OFT_CHANGED_IN:
        notes.append("trained with PEFT before 0.18, whose Cayley-Neumann series differs slightly from today's")
    return notes


def _version(found: Any) -> tuple[int, ...]:
    numbers = re.match(r"(\d{1,9})\.(\d{1,9})", str(found or "0.0"))
    return tuple(map(int, numbers.groups())) if numbers is not None else (0, 0)


def _patterns(config: Mapping[str, Any], setting: str) -> Patterns:
    return Patterns({str(pattern): _finite(value) for pattern, value in dict(config.get(setting) or {}).items()})


def _finite(value: Any) -> float:
    number = float(value)
    if not math.isfinite(number):
        raise ValueError(f"{number} is no finite number")
    return number


def _terms(config: Mapping[str, Any]) -> int:
    terms = int(config.get("num_cayley_neumann_terms", 5))
    if terms > _MOST_TERMS:  # each costs a product of matrices, and the file is a stranger's
        raise ValueError(f"num_cayley_neumann_terms is {terms}; at most {_MOST_TERMS} make sense")
    return terms


def _names(config: Mapping[str, Any], setting: str) -> tuple[str, ...]:
    found = config.get(setting) or []
    if not isinstance(found, (list, tuple)) or not all(isinstance(name, str) for name in found):
        raise ValueError(f"{setting} is no list of names")
    return tuple(found)


def _names_or_pattern(config: Mapping[str, Any], setting: str) -> Patterns | tuple[str, ...]:
    found = config.get(setting)
    return Patterns({found: 1.0}) if isinstance(found, str) else _names(config, setting)


def _token_rows(config: Mapping[str, Any], kind: str) -> dict[str, tuple[int, ...]]:
    """Embedding -> rows that are replaced, in the order in which their new values are stored."""
    if kind == "TRAINABLE_TOKENS":
        targets = config.get("target_modules")
        names = [targets] if isinstance(targets, str) else _names(config, "target_modules") or [_INPUT_EMBEDDING]
        return {name: _rows(config.get("token_indices") or []) for name in names}
    found = config.get("trainable_token_indices") or {}
    if isinstance(found, Mapping):
        return {str(name): _rows(rows) for name, rows in found.items()}
    return {_INPUT_EMBEDDING: _rows(found)}


def _rows(found: Any) -> tuple[int, ...]:
    if not isinstance(found, (list, tuple)) or not all(type(row) is int and row >= 0 for row in found):
        raise ValueError(f"token indices {found!r} are no list of row numbers")
    if len(set(found)) != len(found):
        raise ValueError("token indices name a row twice")
    return tuple(found)


def configs_in_metadata(metadata: Mapping[str, str], path: str) -> dict[str, PeftConfig]:
    """Component prefix ("unet", "text_encoder", ...) -> configuration, as diffusers stores them; "": of the whole file.

    Source: diffusers loaders/lora_base.py: one JSON object under "lora_adapter_metadata", its keys
    are "<component>.<setting>"; loaders/peft.py (save_lora_adapter): "<setting>", for one model alone.
    """
    if "lora_adapter_metadata" not in metadata:
        return {}
    source = f"{path}: lora_adapter_metadata"
    parts: dict[str, dict[str, Any]] = {}
    for key, value in parse_object(metadata["lora_adapter_metadata"].encode("utf-8", "replace"), source).items():
        component, _, setting = key.rpartition(".")
        parts.setdefault(component, {})[setting] = value
    return {component: parse_peft_config(settings, source) for component, settings in parts.items()}
