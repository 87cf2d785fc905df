"""The JSON Schema of recipes, from the table that the reader uses, for editors and other programs."""

from __future__ import annotations

from typing import Any

from bake.recipes.format import DEFINITIONS, FORMAT, RECIPE


def recipe_schema() -> dict[str, Any]:
    """A JSON Schema (draft 2020-12) that every recipe fits which `bake run` reads; plain data."""
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": f"Recipe of bake, format {FORMAT}",
        "description": "What `bake run` does: one bake, or several that share what stands at the top.",
        **RECIPE.schema(),
        "$defs": {name: kind.schema() for name, kind in DEFINITIONS.items()},
    }
