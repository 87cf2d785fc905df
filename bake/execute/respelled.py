"""The factors of an adapter's modules under new names: copied, cut into the rows of several, or joined into one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bake.errors import Unsupported
from bake.identify.updates import Update
from bake.io.payload import read_tensor, torch_dtype
from bake.io.tensorfile import TensorFile
from bake.keys.spoken import Names
from bake.keys.written import SUFFIXES
from bake.plan.respelling import NewModule, Share

_ALGORITHMS = ("lora", "loha", "lokr", "full")
_UP_BIAS = ("lora_B.bias", "lora_up.bias", "lora_bias")
_EMBEDDING = "lora_embedding_"
_INSTEAD = "Fuse it into its base with 'bake fuse' and take the result out again with 'bake extract'."


@dataclass(frozen=True)
class Factored:
    """One update of a module, in memory."""

    module: NewModule
    parameter: str
    algorithm: str
    tensors: Mapping[str, Tensor]  # factor -> as it is stored, (out, in) way round
    rank: int | None
    scale: float  # alpha / rank
    embedding: bool = False  # PEFT's factors of an embedding, which has its vectors as rows
    spelling: str = ""  # what the input calls a stored difference or a magnitude

    @property
    def shape(self) -> tuple[int, int]:
        """(rows, columns) of a LoRA as a matrix."""
        return self.tensors["up"].shape[0], self._right().shape[1]

    @property
    def kernel(self) -> tuple[int, ...]:
        """Of a convolution; () of a Linear layer."""
        wide = self.tensors.get("mid", self.tensors["down"])
        return tuple(wide.shape[2:])

    @property
    def columns(self) -> tuple[int, ...]:
        """The shape of the weight without its rows: (in, kernel...)."""
        return (self.tensors["down"].shape[1], *self.kernel)

    def pair(self) -> tuple[Tensor, Tensor]:
        """(left, right) in float64, of which the product is the update at scale 1."""
        return self.tensors["up"].flatten(1).to(torch.float64), self._right()

    def wide_down(self) -> Tensor:
        """`down` with the kernel, where a Tucker core has it, in the dtype of `down`."""
        down = self.tensors["down"]
        return self._right().reshape(down.shape[0], *self.columns).to(down.dtype)

    def _right(self) -> Tensor:
        down = self.tensors["down"].to(torch.float64)
        if "mid" not in self.tensors:
            return down.flatten(1)
        mid = self.tensors["mid"].to(torch.float64)
        return torch.einsum("abk,bi->aik", mid.flatten(2), down.flatten(1)).flatten(1)


def factored(module: NewModule, file: TensorFile, source: str) -> list[Factored]:
    """Everything that one module does, read from `file`.

    Raises Unsupported for algorithms that another dialect has no names for, and where a projection cannot be cut
    or joined. source: the adapter's name, for messages.
    """
    if len(module.shares) == 1 and module.shares[0].rows is None:
        return [_read(module, update, file, source) for update in module.shares[0].module.updates]
    parts = []
    for share in module.shares:
        updates = share.module.updates
        if [(update.algorithm, update.parameter) for update in updates] != [("lora", "weight")] or (
            updates[0].factors.keys() != {"up", "down"}
        ):
            raise Unsupported(
                f"{source}: {share.module.name!r} is one part of a projection in one dialect and the whole in the "
                f"other, and {updates[0].title} cannot be cut or joined there. {_INSTEAD}",
                module=share.module.name,
            )
        parts.append(_cut(_read(module, updates[0], file, source), share))
    return [parts[0] if len(parts) == 1 else _joined(parts)]


def _read(module: NewModule, update: Update, file: TensorFile, source: str) -> Factored:
    if update.algorithm not in _ALGORITHMS or update.stacked or (update.transposed and "magnitude" in update.factors):
        raise Unsupported(
            f"{source}: {update.title} in {module.shares[0].module.name!r} has no place in another dialect or in a "
            f"combination. {_INSTEAD}",
            algorithm=update.algorithm,
            module=module.shares[0].module.name,
        )
    tensors = {factor: _load(file, name) for factor, name in update.factors.items()}
    embedding = any(_EMBEDDING in name for name in update.factors.values())
    if update.transposed and not embedding:
        tensors = {"up": tensors["down"].T.contiguous(), "down": tensors["up"].T.contiguous()}
    spelling = update.magnitude or ""
    if update.algorithm == "full":
        spelling = next(
            (end for end in ("w_norm", "b_norm", *_UP_BIAS) if update.factors["diff"].endswith(end)), "diff"
        )
    return Factored(module, update.parameter, update.algorithm, tensors, update.rank, update.scale, embedding, spelling)


def _load(file: TensorFile, name: str) -> Tensor:
    info = file.tensors[name]
    return read_tensor(file, info.begin, info.dtype, info.shape, torch_dtype(info.dtype))


def _cut(whole: Factored, share: Share) -> Factored:
    if share.rows is None:
        return whole
    tensors = {"up": whole.tensors["up"][slice(*share.rows)].contiguous(), "down": whole.tensors["down"]}
    return Factored(whole.module, whole.parameter, whole.algorithm, tensors, whole.rank, whole.scale)


def _joined(parts: Sequence[Factored]) -> Factored:
    """One LoRA for the parts of a projection: of the same rank where all have one `down`, else block by block."""
    first = parts[0]
    downs = [part.tensors["down"] for part in parts]
    ups = [part.tensors["up"] for part in parts]
    scales = {part.scale for part in parts}
    if len(scales) == 1 and all(down.shape == downs[0].shape and torch.equal(down, downs[0]) for down in downs):
        tensors = {"up": torch.cat(ups), "down": downs[0]}
        return Factored(first.module, first.parameter, first.algorithm, tensors, first.rank, first.scale)
    height, rank = sum(up.shape[0] for up in ups), sum(up.shape[1] for up in ups)
    dtype = ups[0].dtype
    wide = torch.zeros((height, rank, *ups[0].shape[2:]), dtype=dtype)
    row = column = 0
    for part, up in zip(parts, ups, strict=True):
        ratio = part.scale / first.scale if first.scale else 1.0
        wide[row : row + up.shape[0], column : column + up.shape[1]] = (up.to(torch.float64) * ratio).to(dtype)
        row, column = row + up.shape[0], column + up.shape[1]
    tensors = {"up": wide, "down": torch.cat([down.to(dtype) for down in downs])}
    return Factored(first.module, first.parameter, first.algorithm, tensors, rank, first.scale)


def said(each: Factored, names: Names, source: str) -> dict[str, Tensor]:
    """The factors by what the dialect calls them in bake.keys.written; raises Unsupported if it has no name for one."""
    tensors = dict(each.tensors)
    if each.algorithm == "full" and names == "kohya":
        values = tensors.pop("diff")
        factor = {"w_norm": "norm", "b_norm": "norm_bias"}.get(each.spelling, "diff")
        factor = "bias" if factor == "diff" and each.parameter == "bias" else factor
        # what PEFT adds to a bias counts alpha / rank times, a stored difference does not
        tensors[factor] = values if each.scale == 1 else (values.to(torch.float64) * each.scale).to(values.dtype)
    elif each.algorithm == "full" and each.spelling in _UP_BIAS:
        tensors["up_bias"] = tensors.pop("diff")
    elif names != "kohya" and "mid" in tensors:
        tensors |= {"down": each.wide_down()}
        del tensors["mid"]
    if "magnitude" in tensors:
        tensors["magnitude"] = _turned(tensors["magnitude"], each, names, source)
    lost = [factor for factor in tensors if factor not in SUFFIXES[names]]
    if lost or (each.embedding and names != "peft"):
        what = "a LoRA of an embedding" if each.embedding else f"{each.algorithm} ({', '.join(lost)})"
        raise Unsupported(
            f"{source}: {names} has no names for {what}, as in {each.module.name!r}. {_INSTEAD}",
            module=each.module.name,
        )
    return tensors


def _turned(magnitude: Tensor, each: Factored, names: Names, source: str) -> Tensor:
    """A DoRA magnitude in the shape that the dialect has for it; raises Unsupported for those of input channels."""
    rows = each.tensors["up"].shape[0]
    ones = tuple(1 for _ in each.kernel)
    if magnitude.numel() != rows or (magnitude.dim() > 1 and magnitude.shape[0] == 1 and each.spelling == "dora_scale"):
        if names == "kohya":
            return magnitude
        raise Unsupported(
            f"{source}: the DoRA magnitudes of {each.module.name!r} are of its inputs, which only kohya's names say",
            module=each.module.name,
        )
    if names == "kohya":
        return magnitude.reshape(rows, 1, *ones)
    return magnitude.reshape(1, rows, *ones) if ones else magnitude.reshape(rows)


def suffix(factor: str, each: Factored, names: Names) -> str:
    """What follows the module's name."""
    embedding = {"up": "lora_embedding_B", "down": "lora_embedding_A"}
    return embedding[factor] if each.embedding and factor in embedding else SUFFIXES[names][factor]


def alpha_of(scale: float, rank: int, dtype: torch.dtype) -> Tensor:
    """alpha = scale * rank, in the dtype of the factors where that holds it, else in float32."""
    exact = scale * rank
    narrow = torch.tensor(exact, dtype=dtype)
    return narrow if float(narrow) == exact else torch.tensor(exact)
