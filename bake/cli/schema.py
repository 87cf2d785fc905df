"""bake schema"""

from __future__ import annotations

import json

import click

from bake.recipes.schema import recipe_schema


@click.command("schema")
def command() -> None:
    """Print the JSON Schema of recipe files.

    Editors check and complete recipes with it; docs/recipes.md says how.

    \b
    bake schema > recipe.schema.json
    """
    click.echo(json.dumps(recipe_schema(), indent=2))
