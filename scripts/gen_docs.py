"""Write the generated parts of the documentation, or check that they are up to date.

    python scripts/gen_docs.py [--check]

docs/cli.md is generated whole, from the commands themselves. In README.md, docs/formats.md, docs/blocks.md,
docs/merging.md and docs/recipes.md the blocks between `<!-- generated: NAME -->` and `<!-- end -->` are, from the
tables in bake/keys, bake/plan, bake/merges and bake/recipes.
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import click

from bake import errors
from bake.cli import COMMANDS
from bake.identify.families import FAMILIES, Family
from bake.keys.blocks import EXTENDED, FULL, LISTS, SCHEMES, scheme_for, split_number
from bake.keys.dialects import PREFIXES, Prefix
from bake.keys.factors import ALGORITHMS, SCALARS, SUFFIXES, Algorithm, split_key
from bake.merges import METHODS, Parameter
from bake.plan.presets import ALIASES, PRESETS
from bake.plan.recipe import is_text_encoder
from bake.recipes.format import LORA, MERGE, RECIPE
from bake.recipes.kinds import Record

ROOT = Path(__file__).resolve().parent.parent
_BLOCK = re.compile(r"(<!-- generated: ([\w-]+) -->\n).*?(<!-- end -->)", re.DOTALL)


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |\n" for line in lines)


def algorithms() -> str:
    """Which algorithms are fused, which are only recognised."""
    spelled: dict[str, list[str]] = {}
    for suffix, meaning in SUFFIXES.items():
        spelled.setdefault(meaning.factor, []).append(f"`{suffix}`")
    rows = []
    for name in dict.fromkeys(row.name for row in ALGORITHMS):
        forms = [row for row in ALGORITHMS if row.name == name]
        factors = dict.fromkeys(factor for row in forms for factor in row.factors if factor not in SCALARS)
        state = "fused" if is_fused(forms[0]) else "refused by name (exit 6)"
        rows.append((name, state, ", ".join(spelling for factor in factors for spelling in spelled.get(factor, []))))
    return table(("algorithm", "this version", "key suffixes"), rows)


def prefixes() -> str:
    """How module names are addressed."""
    style = {"dotted": "dotted path", "flat": "path with `_` for `.`", "number": "number"}
    rows = [(f"`{row.text}`", row.dialect, ", ".join(row.components) or "any", style[row.style]) for row in PREFIXES]
    rows += [
        ("(none)", "attention processors, plain names", "any", "dotted path, or the base's own tensor names"),
        ("`unet:`, `text_encoder:`, `.pt` lists", "cloneofsimo", "unet, te1", "number"),
    ]
    return table(("names begin with", "dialect", "component", "written as"), rows)


def families() -> str:
    """Which families a base may belong to."""
    rows = [
        (row.title, f"`{row.name}`", "single file in the original layout, diffusers folder, bare model file")
        for row in FAMILIES.values()
        if row.image
    ]
    rows += [
        ("language models", "their `model_type`", "Hugging Face folder, single or sharded; single file"),
        ("anything else", "`unknown`", "a safetensors file whose tensor names are the adapter's module names"),
    ]
    return table(("family", "name", "packagings"), rows)


PLAIN_NAMES = Prefix("", (), "dotted", "plain names")  # the reading that every name has, see dialects.addresses


def is_fused(row: Algorithm) -> bool:
    """True for algorithms with maths; the others are only recognised."""
    return row.extent is not None


def prefixes_of(family: Family) -> list[Prefix]:
    """The prefixes with which adapters address a base of `family`: language models have no components."""
    return [row for row in (*PREFIXES, PLAIN_NAMES) if family.image or not row.components]


def forms_for(prefix: Prefix) -> list[Algorithm]:
    """The fused rows whose factors can all be spelled behind `prefix`: some factors go with certain names only."""
    keys = (f"{prefix.text}block_0_layer.{suffix}" for suffix in (*SUFFIXES, "weight"))
    spelled = {split[1].factor for split in map(split_key, keys) if split is not None}
    return [row for row in ALGORITHMS if is_fused(row) and spelled.issuperset(row.required)]


def support() -> str:
    """Algorithm x dialect x family. tests/test_support.py fuses every algorithm in every cell."""
    fused = list(dict.fromkeys(row.name for row in ALGORITHMS if is_fused(row)))
    dialects = list(dict.fromkeys(row.dialect for row in (*PREFIXES, PLAIN_NAMES)))
    rows = []
    for family in FAMILIES.values():
        spoken = {dialect: [row for row in prefixes_of(family) if row.dialect == dialect] for dialect in dialects}
        rows.append((family.title, *(_cell(prefixes, fused) for prefixes in spoken.values())))
    return f"\nAll algorithms: {', '.join(fused)}.\n\n" + table(("base", *dialects), rows)


def _cell(prefixes: list[Prefix], fused: list[str]) -> str:
    """Which of the `fused` algorithms one dialect has for a base, and for what of it."""
    if not prefixes:
        return "-"
    spelled = {row.name for prefix in prefixes for row in forms_for(prefix)}
    missing = [name for name in fused if name not in spelled]
    only_text = all(prefix.components and all(map(is_text_encoder, prefix.components)) for prefix in prefixes)
    without = f" but {', '.join(missing)}" if missing else ""
    return f"all{without}{', text encoders only' if only_text else ''}"


def exit_codes() -> str:
    """Exit codes with the errors behind them."""
    kinds: list[type[errors.BakeError]] = [errors.BakeError]
    for kind in kinds:
        kinds += kind.__subclasses__()
    rows = []
    for code in sorted({kind.exit_code for kind in kinds}):
        mine = [kind for kind in kinds if kind.exit_code == code]
        rows.append((str(code), (inspect.getdoc(mine[0]) or "").split("\n")[0], ", ".join(f"`{k.code}`" for k in mine)))
    return table(("exit code", "meaning", "`error.code` in `--json`"), rows)


def block_lists() -> str:
    """How many values a list may have, and for which blocks."""
    fitting: dict[tuple[str, ...], list[str]] = {}
    for family, lists in LISTS.items():
        for names in lists.values():
            fitting.setdefault(names, []).append(FAMILIES[family].title)
    rows = [
        (str(len(names)), ", ".join(families), _in_short(names))
        for names, families in sorted(fitting.items(), key=lambda item: len(item[0]))
    ]
    return table(("values", "base", "blocks in order"), rows)


def _in_short(names: Sequence[str]) -> str:
    """Names of blocks, with "..." for those between the first and last of a run."""
    if len(names) == EXTENDED:
        return f"`{' '.join(names[:5])}` ... `{' '.join(names[-4:])}`, supermerger's names"
    runs: list[list[str]] = []
    for name in names:
        stack, number = split_number(name)
        if runs and number is not None and split_number(runs[-1][-1]) == (stack, number - 1):
            runs[-1].append(name)
        else:
            runs.append([name])
    return " ".join(f"`{run[0]}`...`{run[-1]}`" if len(run) > 2 else f"`{' '.join(run)}`" for run in runs)


def block_presets() -> str:
    """The presets by their lengths."""
    lengths = dict.fromkeys(len(values) for values in PRESETS.values())
    rows = []
    for length in sorted(lengths):
        names = [name for name, values in PRESETS.items() if len(values) == length]
        also = [name for name, meant in ALIASES.items() if meant in names]
        rows.append((str(length), " ".join(f"`{name}`" for name in names), " ".join(f"`{name}`" for name in also)))
    return table(("values", "presets", "also written"), rows)


def block_schemes() -> str:
    """What becomes of tensors outside the blocks, by whose reading."""
    rows = []
    for name in SCHEMES:
        for family in ("sd1", "sdxl"):
            scheme = scheme_for(name, family)
            homes = [scheme.homes.get(block, block) for block in ("TIME", "LABEL", "OUT", "VAE", "OTHER")]
            shown = ["ratio 1" if home == FULL else f"`{home}`" for home in homes]
            further = "; `IN00`: ratio 1" if scheme.homes.get("IN00") == FULL else ""
            rows.append((f"`{name}`", FAMILIES[family].title, *shown, f"{scheme.unnamed:g}{further}"))
    return table(
        ("`blocks=`", "base", "`TIME`", "`LABEL`", "`OUT`", "`VAE`", "`OTHER`", "blocks without a value"), rows
    )


def merge_methods() -> str:
    """What each merge method is."""
    rows = [
        (f"`{row.name}`", row.meaning, f"`{row.formula}`", row.models, row.reach, row.peers) for row in METHODS.values()
    ]
    return table(("method", "what it makes", "formula", "models", "reach", "elsewhere"), rows)


def merge_parameters() -> str:
    """The parameters of each merge method; methods with the same ones share a line."""
    owners: dict[Parameter, list[str]] = {}
    for method in METHODS.values():
        for parameter in method.parameters:
            owners.setdefault(parameter, []).append(f"`{method.name}`")
    rows = []
    for parameter, names in owners.items():
        default = "to be given" if parameter.default is None else str(parameter.default).lower()
        each = "; for each model" if parameter.per_model else ""
        rows.append((f"`{parameter.name}`", ", ".join(names), parameter.meaning + each, parameter.span, default))
    return table(("parameter", "of", "meaning", "range", "default"), sorted(rows))


def recipe_keys(record: Record) -> str:
    """The keys of a mapping in a recipe."""
    return table(("key", "meaning"), [(f"`{each.key}`", each.meaning) for each in record.fields])


BLOCKS: dict[str, Callable[[], str]] = {
    "algorithms": algorithms,
    "prefixes": prefixes,
    "families": families,
    "support": support,
    "exit-codes": exit_codes,
    "block-lists": block_lists,
    "block-presets": block_presets,
    "block-schemes": block_schemes,
    "merge-methods": merge_methods,
    "merge-parameters": merge_parameters,
    "recipe-keys": lambda: recipe_keys(RECIPE),
    "recipe-lora-keys": lambda: recipe_keys(LORA),
    "recipe-merge-keys": lambda: recipe_keys(MERGE),
}


def command_page() -> str:
    """docs/cli.md."""
    parts = [
        "# Command line\n\nGenerated by `scripts/gen_docs.py` from the commands themselves.\n",
        "Results go to stdout (`--json`: one document), progress and warnings to stderr. Every option can be set by "
        "an environment variable, `BAKE_<COMMAND>_<OPTION>`.\n",
        "## Exit codes\n\n0 means done.\n\n" + exit_codes(),
    ]
    for name in COMMANDS:
        command: click.Command = importlib.import_module(COMMANDS[name]).command
        context = click.Context(command, info_name=f"bake {name}", parent=None)
        usage = command.get_usage(context).removeprefix("Usage: ")
        parts.append(
            f"## bake {name}\n\n```\n{usage}\n```\n\n{_prose(command.help or '')}\n\n{_options(command, context)}"
        )
    return "\n".join(parts)


def _prose(text: str) -> str:
    """A command's help as Markdown: blocks that click keeps as they are become code."""
    paragraphs = []
    for paragraph in inspect.cleandoc(text).split("\n\n"):
        if paragraph.startswith("\b\n"):
            code = paragraph.removeprefix("\b\n")
            paragraphs.append(f"```\n{code}\n```")
        else:
            paragraphs.append(" ".join(paragraph.split()))
    return "\n\n".join(paragraphs)


def _options(command: click.Command, context: click.Context) -> str:
    rows = []
    for parameter in command.get_params(context):
        record = parameter.get_help_record(context) if isinstance(parameter, click.Option) else None
        if record is not None:
            rows.append((f"`{record[0]}`", " ".join(record[1].split())))
    return table(("option", "meaning"), rows)


def fill(text: str) -> str:
    """`text` with every generated block renewed."""
    return _BLOCK.sub(lambda found: found[1] + BLOCKS[found[2]]() + found[3], text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--check", action="store_true", help="only compare; exit 1 if a page is stale")
    check = parser.parse_args().check
    pages = {ROOT / "docs" / "cli.md": command_page()}
    for page in ("README.md", "docs/formats.md", "docs/blocks.md", "docs/merging.md", "docs/recipes.md"):
        path = ROOT / page
        pages[path] = fill(path.read_text(encoding="utf-8"))
    for path, content in pages.items():
        if check and (not path.is_file() or path.read_text(encoding="utf-8") != content):
            sys.exit(f"{path.relative_to(ROOT)} is stale: run python scripts/gen_docs.py")
        if not check:
            path.parent.mkdir(exist_ok=True)
            path.write_text(content, encoding="utf-8")


if __name__ == "__main__":
    main()
