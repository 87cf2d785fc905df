"""Rows of a product of factors, without the rest of it."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def part(tensor: Tensor, rows: range) -> Tensor:
    """The rows `rows` of a tensor's first dimension, as a view."""
    return tensor[rows.start : rows.stop : rows.step]


def product(a: Tensor, b: Tensor, t: Tensor | None = None, *, rows: Tensor) -> Tensor:
    """Return the rows `rows` of `a @ b`, or of its Tucker form, as (len(rows), in * kernel).

    Plain: a (out, rank[, 1, 1]), b (rank, in) or (rank, in, kh, kw). Tucker: a (rank, out), b (rank, in),
    t (rank, rank, kh, kw), the rows of sum_ij t[i, j] a[i, :] b[j, :]. rows: indices. In the dtype of the factors.
    Source: LyCORIS functional/general.py, rebuild_tucker.
    """
    if t is None:
        return a.flatten(1)[rows] @ b.flatten(1)
    # The rows first: nothing here is larger than the rows that were asked for.
    left = (a.flatten(1)[:, rows].T @ t.flatten(1)).reshape(len(rows), t.shape[1], math.prod(t.shape[2:]))
    return torch.einsum("njk,jc->nck", left, b.flatten(1)).flatten(1)


def indices(rows: range, like: Tensor) -> Tensor:
    """`rows` as indices on the device of `like`."""
    return torch.arange(rows.start, rows.stop, rows.step, device=like.device)
