"""Token embeddings that travel inside adapters: which tensors they are, for which word and which text encoder."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from bake.errors import InputError, Unsupported
from bake.io.tensorfile import TensorFile

_BRACKETED = re.compile(r"<[^>]+>")
_BUNDLED = re.compile(r"bundle_emb\..+")
# A token may hold dots, the part after it only in the older spelling.
_BUNDLE = re.compile(r"bundle_emb\.(?P<token>.+?)\.(?P<part>string_to_param\.[^.]*|[^.]+)", re.DOTALL)
_MARK = "<embed>"  # what cloneofsimo's trainer writes as the metadata of each token
_OUTPUT = "_out"  # OneTrainer: added to what the encoder gives, not to what it is given

# Part after the token                text encoder        seen in
_PARTS = {
    "string_to_param.*": None,  #                         AUTOMATIC1111, OneTrainer (SD1, SD2)
    "emp_params": None,  #                                OneTrainer
    "emb_params": None,
    "clip_l": "clip_l",  #                                OneTrainer (SD1, SDXL, SD3, Flux, HunyuanVideo)
    "clip_g": "clip_g",  #                                OneTrainer (SDXL, SD3, Wuerstchen)
    "t5": "t5xxl",  #                                     OneTrainer (SD3, Flux, PixArt, Chroma); ComfyUI: t5xxl
    "t5xxl": "t5xxl",
    "llama": "llama",  #                                  OneTrainer (HunyuanVideo, HiDream)
    "gemma": "gemma",  #                                  OneTrainer (Sana)
    "qwen": "qwen",  #                                    OneTrainer (Qwen-Image, Z-Image)
    "text_encoder": "text_encoder",  #                    OneTrainer (single-encoder models)
}
# Where the name does not say for which text encoder, the width of a vector does.
_WIDTHS = {768: "clip_l", 1024: "clip_h", 1280: "clip_g", 4096: "t5xxl"}


@dataclass(frozen=True, slots=True)
class Vectors:
    """What one text encoder is given for a token: n vectors."""

    tensor: str  # in the adapter
    named: str | None  # the text encoder that its name says
    count: int  # n
    width: int

    @property
    def encoder(self) -> str | None:
        """The text encoder, by name or else by width; None where neither tells."""
        return self.named or _WIDTHS.get(self.width)


@dataclass(frozen=True, slots=True)
class Embedding:
    """The vectors that an adapter carries for one token."""

    token: str
    vectors: tuple[Vectors, ...]  # one for each text encoder
    is_output: bool  # they belong behind the text encoder, which only OneTrainer can do


def is_embedding(key: str, metadata: Mapping[str, str]) -> bool:
    """True if the tensor `key` of an adapter is a token's embedding and no weight update."""
    return bool(_BRACKETED.fullmatch(key) or _BUNDLED.fullmatch(key)) or metadata.get(key) == _MARK


def group_embeddings(file: TensorFile, names: Iterable[str]) -> tuple[Embedding, ...]:
    """The embeddings among the tensors `names` of `file`, by token, in the order of the names.

    Raises Unsupported for text encoders that bake does not know, InputError for what is no list of
    vectors, or twice in the file. Source: AUTOMATIC1111 modules/networks.py load_network;
    OneTrainer's LoRA savers; cloneofsimo/lora lora_diffusion/lora.py.
    """
    found: dict[tuple[str, bool], list[Vectors]] = {}
    for name in sorted(names):
        token, part, is_output = _split(name, file)
        group = found.setdefault((token, is_output), [])
        vectors = _vectors(file, name, _PARTS[part])
        if any(other.encoder == vectors.encoder for other in group):
            raise InputError(
                f"{file.path}: {name!r} is a second embedding of {token!r} for one text encoder", tensor=name
            )
        group.append(vectors)
    return tuple(Embedding(token, tuple(vectors), is_output) for (token, is_output), vectors in found.items())


def _split(name: str, file: TensorFile) -> tuple[str, str, bool]:
    """(token, key of _PARTS, is it an output vector) of an embedding's tensor name."""
    if not name.startswith("bundle_emb."):
        return name, "emb_params", False
    bundle = _BUNDLE.fullmatch(name)
    part = bundle["part"] if bundle is not None else ""
    is_output = part.endswith(_OUTPUT)
    known = "string_to_param.*" if part.startswith("string_to_param.") else part.removesuffix(_OUTPUT)
    if bundle is None or known not in _PARTS:
        raise Unsupported(
            f"{file.path}: {name!r} is an embedding for a text encoder that bake does not know; "
            f"--embeddings drop fuses the adapter without it.",
            tensor=name,
        )
    return bundle["token"], known, is_output


def _vectors(file: TensorFile, name: str, named: str | None) -> Vectors:
    info = file.tensors[name]
    if len(info.shape) not in (1, 2) or 0 in info.shape:
        raise InputError(f"{file.path}: the embedding {name!r} is no list of vectors: it has shape {list(info.shape)}")
    count = info.shape[0] if len(info.shape) == 2 else 1
    return Vectors(name, named, count, info.shape[-1])
