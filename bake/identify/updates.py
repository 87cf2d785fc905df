"""What the tensors of one adapter module do to the parameters of its target."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace

from bake.errors import InputError, NonFinite, Unsupported
from bake.identify.grouping import Member, Members
from bake.identify.peft import PeftConfig
from bake.io.adapter import AdapterFile
from bake.io.tensorfile import read_number, read_numbers
from bake.keys.experts import is_stack, split_nesting
from bake.keys.factors import SCALARS, Algorithm, algorithm_of, as_matrix
from bake.keys.shapes_additive import Fit as Extent
from bake.keys.shapes_additive import sparse_bias_shape

_OUT_OF_ATTENTION = ".base_layer.out_proj"
_KOHYA_OFT = "oft_unet"  # what kohya's own OFT network calls its modules
_WRAPPER = "base_model.model."
# Factors that are others in disguise: (which, stored (in, out)). MLX multiplies from the other side.
_DISGUISED = {"mlx_a": ("up", True), "mlx_b": ("down", True)}
_EMBEDDINGS = ("embed_tokens", "wte", "tok_embeddings", "word_embeddings")
_PEFT_MAGNITUDE = "lora_magnitude_vector"  # part of a tensor's name; other DoRA magnitudes have shapes that tell more
_SPARSE = ("bias_indices", "bias_values", "bias_size")


@dataclass(frozen=True, slots=True)
class Update:
    """What a module does to one parameter of its target."""

    parameter: str  # "weight" or "bias"
    algorithm: str  # name of a row of ALGORITHMS
    factors: Mapping[str, str]  # factor -> tensor name in the adapter
    extent: Extent  # (rows, columns) of the tensor it fits, before any transposition
    rank: int | None = None
    scale: float = 1.0  # alpha / rank; what the user typed comes on top
    transposed: bool = False  # stored (in, out)
    block: int | None = 1  # rows that hang together; None: all
    channels: int | None = None  # input channels of the tensor, where the columns do not say
    column_block: int | None = None  # the columns are a multiple of this, where their number is not said
    magnitude: str | None = None  # the DoRA spelling: "dora_scale", "lora_magnitude_vector" or "m"
    settings: Mapping[str, float | None] = field(default_factory=dict)  # further constants of the algorithm
    row_numbers: tuple[int, ...] = ()  # the rows of the target it replaces; (): all, or those of its place
    grown: tuple[int, ...] = ()  # the shape to which the target is padded with zeros first; (): as it is
    optional: bool = False  # goes unsaid where the base has no such parameter
    stacked: bool = False  # one LoRA for each of a stack of matrices, see bake.keys.experts; scale is still to be found

    @property
    def title(self) -> str:
        """The algorithm, for people and reports."""
        return self.algorithm if self.magnitude is None else f"dora ({self.algorithm})"


class UpdateReader:
    """Makes the updates of one adapter's modules, with scales from the file, a configuration, else 1."""

    def __init__(
        self,
        source: AdapterFile,
        config: PeftConfig | None,
        by_component: Mapping[str, PeftConfig],
        shared: Members,
    ) -> None:
        """by_component: configurations of parts of a pipeline. shared: factors that all modules have in common."""
        self._source = source
        self._config = config
        self._by_component = by_component
        self._shared = shared
        self._without_alpha = 0
        self._total = 0
        self._zero = 0
        self._rankless = 0

    def updates(self, module: str, parameters: Mapping[str, Members]) -> Iterator[Update]:
        """What `module` does; parameters: its tensors by the parameter they are for.

        Raises InputError for incomplete or contradictory tensors, Unsupported for what is not fused,
        NonFinite for a NaN or infinite scale.
        """
        for parameter, members in parameters.items():
            # alpha belongs to the module, whichever of its parameters the other factors update
            if members.keys() <= set(SCALARS) and len(parameters) > 1:
                continue
            yield from self._of_parameter(module, parameter, dict(members))

    def notes(self) -> Iterable[str]:
        """What the user should know about the scales."""
        if self._without_alpha:
            yield f"no alpha stored for {self._without_alpha} of {self._total} modules: alpha / rank taken as 1"
        if self._zero:
            yield f"alpha is 0 in {self._zero} of {self._total} modules: they change nothing"
        if self._rankless:
            yield f"the rank is 0 in {self._rankless} of {self._total} modules: they change nothing"

    def _of_parameter(self, module: str, parameter: str, members: Members) -> Iterator[Update]:
        magnitude = _magnitude_spelling(members)
        self._name_plainly(module, members)
        stands_alone = members.keys() & {"token_rows", "value"}
        if "token_rows" in members:
            yield self._tokens(module, parameter, members.pop("token_rows"))
        if "value" in members:
            value = members.pop("value").tensor
            yield Update(parameter, "set", {"value": value}, as_matrix(self._shape(value)))
        beside = {factor: members.pop(factor) for factor in ("up_bias", *_SPARSE) if factor in members}
        if members.keys() <= set(SCALARS) and (stands_alone or beside):
            yield from self._beside(module, parameter, beside, 1.0)
        else:
            yield from self._factored(module, parameter, members, magnitude, beside)

    def _name_plainly(self, module: str, members: Members) -> None:
        """Give factors that are others in disguise their names, and VeRA the matrices that all modules share."""
        for disguised, (plain, transposed) in _DISGUISED.items():
            if disguised in members:
                # an embedding's factors are looked up by word, so MLX has them the way the embedding is stored
                is_embedding = module.endswith(_EMBEDDINGS)
                members[plain] = Member(members.pop(disguised).tensor, transposed and not is_embedding)
        if "vera_lambda_b" in members:
            members |= self._shared

    def _factored(
        self, module: str, parameter: str, members: Members, magnitude: str | None, beside: Members
    ) -> Iterator[Update]:
        """The update that the factors of a row of ALGORITHMS make, with what lies beside them."""
        grown: tuple[int, ...] = ()
        if "reshape_weight" in members:
            grown = tuple(map(int, read_numbers(self._source.file, members.pop("reshape_weight").tensor)))
        row = self._row(module, members)
        tensors = {factor: member.tensor for factor, member in members.items() if factor in row.factors}
        shapes = self._shapes(tensors)
        assert row.extent is not None
        try:
            extent, rank = row.extent(shapes), row.rank(shapes)
        except ValueError as error:
            raise InputError(f"{self._source.path}: module {module!r}: {error}", module=module) from None
        if row.name == "lora" and self._is_stack(module):
            yield Update(parameter, row.name, tensors, (None, None), stacked=True)
            return
        self._rankless += rank == 0
        scale = self._scale(module, row, members, rank)
        settings = self._settings(module, row, members, scale)
        update = Update(
            parameter,
            row.name,
            tensors,
            extent,
            rank,
            1.0 if "scale" in settings else scale,
            any(member.transposed for member in members.values()),
            block=row.block(shapes),
            magnitude=magnitude,
            settings=settings,
            grown=grown,
        )
        yield from self._with_channels(module, update, shapes)
        yield from self._beside(module, parameter, beside, scale)

    def _row(self, module: str, members: Members) -> Algorithm:
        row = algorithm_of(self._shapes({factor: member.tensor for factor, member in members.items()}))
        if row is None:
            held = ", ".join(sorted(members))
            raise InputError(
                f"{self._source.path}: module {module!r} is incomplete: it has {held} and nothing to go with it",
                module=module,
            )
        if row.extent is None:
            raise Unsupported(
                f"{self._source.path}: {row.name} in module {module!r}: recognised, but bake does not fuse it. "
                f"Merge it with the program that trained it.",
                algorithm=row.name,
                module=module,
            )
        extra = sorted(set(members) - set(row.factors) - set(SCALARS))
        if extra:
            raise Unsupported(
                f"{self._source.path}: module {module!r} combines {row.name} with {', '.join(extra)}, "
                f"which bake does not fuse",
                module=module,
            )
        config, _ = self._config_of(module)
        if row.name == "lora" and config is not None:
            lacks = "lora_E" if config.kind == "ADALORA" else "magnitude" if config.dora else None
            if lacks is not None and lacks not in members:  # a plain LoRA would be a wrong result
                raise InputError(
                    f"{self._source.path}: module {module!r} lacks its {lacks}: by {config.source} it is "
                    f"{'AdaLoRA' if lacks == 'lora_E' else 'DoRA'}",
                    module=module,
                )
        return row

    def _config_of(self, module: str) -> tuple[PeftConfig | None, str]:
        """(the configuration that speaks of `module`, the module as it calls it)."""
        component, _, below = module.partition(".")
        if component in self._by_component:
            return self._by_component[component], below
        while module.startswith(_WRAPPER):
            module = module[len(_WRAPPER) :]
        return self._config, module

    def _is_stack(self, module: str) -> bool:
        """True if the configuration targets parameters of `module` themselves, not layers in it."""
        config, path = self._config_of(module)
        path, _ = split_nesting(path)
        return config is not None and is_stack(path, config.target_parameters)

    def _scale(self, module: str, row: Algorithm, members: Members, rank: int | None) -> float:
        if "scale" in members:
            return self._number(members["scale"].tensor)
        config, path = self._config_of(module)
        if "alpha" in members and rank is not None:
            self._total += 1
            alpha = self._number(members["alpha"].tensor)
            self._zero += alpha == 0
            return alpha / rank if rank else 0.0
        if config is not None and (rank is not None or row.name == "lokr"):
            # PEFT scales a LoKr even where both factors are whole; an alpha in the file would say otherwise
            self._total += 1
            attention = path.removesuffix(_OUT_OF_ATTENTION)
            if attention != path and row.name == "lora":
                # MultiheadAttention of PEFT, in forward and merge: it adds the update and then calls merge(), which
                # adds it again. Rank and alpha are those of the attention itself.
                return 2 * config.scale(attention, rank)
            return config.scale(path, rank)
        if rank is not None:
            self._total += 1
            self._without_alpha += 1
        return 1.0

    def _settings(self, module: str, row: Algorithm, members: Members, scale: float) -> dict[str, float | None]:
        """Constants that the maths of `row` takes beside its factors."""
        config, _ = self._config_of(module)
        if row.name == "glora":
            return {"scale": scale}
        if row.name in ("oft", "boft") and "alpha" in members:
            alpha = self._number(members["alpha"].tensor)
            return {"alpha": alpha, "kohya": module.startswith(_KOHYA_OFT)} if row.name == "oft" else {"alpha": alpha}
        if row.name == "oft-peft" and config is not None:
            limit = {} if config.rotation_limit is None else {"limit": config.rotation_limit}
            return {"neumann_terms": config.neumann_terms, **limit}
        if row.name == "lokr" and config is not None and config.kind == "LOKR" and "kron_w2" in members:
            is_conv1d = len(self._shape(members["kron_w2"].tensor)) == 3
            return {"swapped": True} if is_conv1d else {}
        if row.name == "hra" and config is not None:
            return {"apply_gs": config.gram_schmidt}
        return {}

    def _with_channels(self, module: str, update: Update, shapes: Mapping[str, tuple[int, ...]]) -> Iterator[Update]:
        """The update of an (IA)3 module with the side that its numbers scale, which a value or the configuration tells.

        PEFT scales a layer's output, and with it the bias. Every other update as it is.
        """
        if update.algorithm == "ia3":
            count = math.prod(shapes["ia3_weight"])
            if self._number(update.factors["on_input"]):
                yield replace(update, channels=count)
            else:
                yield replace(update, extent=(count, None))
        elif update.algorithm == "ia3-peft":
            count = math.prod(shapes["ia3_l"])
            feedforward = self._is_feedforward(module, update)
            settings = {"feedforward": feedforward}
            if feedforward:
                yield replace(update, extent=(None, None), channels=count, settings=settings)
            else:
                yield replace(update, extent=(count, None), settings=settings)
                yield replace(update, parameter="bias", extent=(count, 1), settings=settings, optional=True)
        elif update.algorithm == "oft-peft" and update.extent[1] is None:
            numbers = shapes["oft_r"][1]  # b (b - 1) / 2 of one block that stands for all
            yield replace(update, column_block=(1 + math.isqrt(1 + 8 * numbers)) // 2)
        else:
            yield update

    def _is_feedforward(self, module: str, update: Update) -> bool:
        if update.extent != (None, None):
            return update.extent[0] is None
        config, path = self._config_of(module)
        if config is None:
            raise InputError(
                f"{self._source.path}: module {module!r}: whether its (IA)3 numbers scale inputs or outputs is told by "
                f"adapter_config.json (feedforward_modules), which is missing",
                module=module,
            )
        return config.is_feedforward(path)

    def _tokens(self, module: str, parameter: str, member: Member) -> Update:
        """Rows of an embedding, which the configuration numbers."""
        config, path = self._config_of(module)
        shape = self._shape(member.tensor)
        numbers = config.rows_of(path) if config is not None else None
        if numbers is None or len(shape) != 2 or len(numbers) != shape[0]:
            raise InputError(
                f"{self._source.path}: module {module!r} holds {list(shape)} token rows, and adapter_config.json "
                f"{'names no rows for it' if numbers is None else f'names {len(numbers)} rows'}",
                module=module,
            )
        tensors = {"value": member.tensor}
        return Update(parameter, "set", tensors, (shape[0], shape[1]), row_numbers=numbers)

    def _beside(self, module: str, parameter: str, beside: Members, scale: float) -> Iterator[Update]:
        """What a LoRA may carry with it: a bias, and the sparse rest of an extraction."""
        if "up_bias" in beside:
            bias = beside["up_bias"].tensor
            yield Update("bias", "full", {"diff": bias}, (math.prod(self._shape(bias)), 1), scale=scale)
        if beside.keys() & set(_SPARSE):
            yield self._sparse(module, parameter, beside, scale)

    def _sparse(self, module: str, parameter: str, beside: Members, scale: float) -> Update:
        missing = [factor for factor in _SPARSE if factor not in beside]
        if missing:
            raise InputError(f"{self._source.path}: module {module!r} lacks {', '.join(missing)}", module=module)
        tensors = {factor: beside[factor].tensor for factor in _SPARSE}
        try:
            sparse_bias_shape(self._shapes(tensors))
            rows, columns = map(int, read_numbers(self._source.file, tensors["bias_size"]))
        except ValueError as error:
            raise InputError(f"{self._source.path}: module {module!r}: {error}", module=module) from None
        return Update(parameter, "sparse", tensors, (rows, columns), scale=scale)

    def _shapes(self, tensors: Mapping[str, str]) -> dict[str, tuple[int, ...]]:
        return {factor: self._shape(tensor) for factor, tensor in tensors.items()}

    def _shape(self, tensor: str) -> tuple[int, ...]:
        return self._source.file.tensors[tensor].shape

    def _number(self, tensor: str) -> float:
        value = read_number(self._source.file, tensor)
        if not math.isfinite(value):
            raise NonFinite(f"{self._source.path}: {tensor!r} is {value}", tensor=tensor)
        return value


def _magnitude_spelling(members: Members) -> str | None:
    """How the DoRA magnitude is spelled, which says what its shape can mean; None without one."""
    if "magnitude" not in members:
        return None
    tensor = members["magnitude"].tensor
    if _PEFT_MAGNITUDE in tensor:
        return _PEFT_MAGNITUDE
    return "m" if tensor.endswith(".m") else "dora_scale"
