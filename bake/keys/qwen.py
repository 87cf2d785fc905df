"""Qwen-Image: one set of names in all layouts."""

from __future__ import annotations

from bake.keys.tables import Table, same

QWEN_IMAGE = Table(same("transformer_blocks.#.attn.to_out.0"))  # also without the index
