"""bake completion"""

from __future__ import annotations

import click
from click.shell_completion import get_completion_class

from bake.errors import UsageError


@click.command("completion")
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish", "powershell"]))
def command(shell: str) -> None:
    """Print the completion script of SHELL.

    Source it in your shell's start-up file.

    \b
    bake completion bash >> ~/.bashrc
    """
    from bake.cli import cli

    found = get_completion_class(shell)
    if found is None:
        raise UsageError(f"the installed click {click.__version__} has no completion for {shell}")
    click.echo(found(cli, {}, "bake", "_BAKE_COMPLETE").source())
