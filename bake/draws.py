"""Random numbers by place: the draw of an element depends on the seed, the tensor's name and its place alone.

SplitMix64 as a counter: the elements 2 i and 2 i + 1 of a tensor get the halves of the i-th number of the
tensor's sequence. Source: Steele, Lea and Flood, Fast splittable pseudorandom number generators, 2014, with
David Stafford's mixing constants.
"""

from __future__ import annotations

import functools
import hashlib

import torch
from torch import Tensor

DRAW_BITS = 24  # of every draw, the upper ones, that count: a share of 2**-24 is exact in float32
_PIECE = 32 * 1024  # numbers made at a time: two such buffers stay in the cache


def _wrapped(number: int) -> int:
    """The lower 64 bits of `number` as an int64."""
    return ((number + (1 << 63)) & ((1 << 64) - 1)) - (1 << 63)


_STEP = _wrapped(0x9E3779B97F4A7C15)
_MIXES = ((30, _wrapped(0xBF58476D1CE4E5B9)), (27, _wrapped(0x94D049BB133111EB)))
_LAST_MIX = 31


def key_of(seed: int, name: str) -> int:
    """Where the sequence of the tensor called `name` starts: 64 bits of a SHA-256, as an int64."""
    return int.from_bytes(hashlib.sha256(f"{seed}\0{name}".encode()).digest()[:8], "little", signed=True)


def draws(key: int, first: int, count: int, device: torch.device) -> Tensor:
    """The draws of the elements [first, first + count) of a tensor: int32 (count,), every bit random.

    first: flat index in the tensor. key: from `key_of`.
    """
    begin, end = first // 2, (first + count + 1) // 2
    numbers = torch.empty(end - begin, dtype=torch.int64, device=device)
    buffer = torch.empty(min(_PIECE, end - begin), dtype=torch.int64, device=device)
    ramp = _ramp(device)
    for offset in range(0, end - begin, _PIECE):
        piece = numbers[offset : offset + _PIECE]
        torch.add(ramp[: len(piece)], _wrapped(key + (begin + offset) * _STEP), out=piece)
        _mix(piece, buffer[: len(piece)])
    return numbers.view(torch.int32)[first - 2 * begin :][:count]


def draws_at(key: int, index: Tensor) -> Tensor:
    """The same for elements one by one: int32 (n,). index: int64 (n,), flat indices in the tensor."""
    numbers = (index >> 1) * _STEP + key
    _mix(numbers, torch.empty_like(numbers))
    return numbers.view(torch.int32).view(-1, 2).gather(1, (index & 1).unsqueeze(1)).squeeze(1)


@functools.lru_cache(maxsize=16)
def _ramp(device: torch.device) -> Tensor:
    return torch.arange(_PIECE, device=device) * _STEP


def _mix(state: Tensor, buffer: Tensor) -> None:
    """Mix the bits of every number of `state` (int64), in place. Shifts are logical: copies of the sign are masked."""
    for shift, factor in _MIXES:
        torch.bitwise_right_shift(state, shift, out=buffer)
        state.bitwise_xor_(buffer.bitwise_and_((1 << (64 - shift)) - 1)).mul_(factor)
    torch.bitwise_right_shift(state, _LAST_MIX, out=buffer)
    state.bitwise_xor_(buffer.bitwise_and_((1 << (64 - _LAST_MIX)) - 1))
