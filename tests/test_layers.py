"""Imports point one way, and planning needs no torch."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from support import FIXTURES, KOHYA_LORA, ROOT, SD1_BASE

PACKAGE = ROOT / "bake"

# layer -> layers it may import. Single modules at the top of the package count as layers.
ALLOWED = {
    "errors": set(),
    "progress": set(),
    "sizes": set(),
    "dtypes": set(),
    "draws": set(),
    "garbage": set(),
    "interrupts": set(),
    "io": {"errors", "dtypes", "interrupts", "sizes"},
    "keys": {"errors"},
    "adapters": {"errors"},
    "factoring": {"errors", "draws"},
    "merges": {"errors", "draws"},
    "identify": {"errors", "io", "keys"},
    "plan": {"errors", "dtypes", "garbage", "sizes", "io", "keys", "identify", "merges"},
    "recipes": {"errors", "dtypes", "sizes", "io", "keys", "merges", "plan"},
    "execute": {
        "errors",
        "dtypes",
        "draws",
        "garbage",
        "interrupts",
        "sizes",
        "io",
        "keys",
        "identify",
        "plan",
        "adapters",
        "factoring",
        "merges",
        "progress",
    },
    "verify": {"errors", "dtypes", "draws", "io", "keys", "plan", "adapters", "merges", "progress"},
    "api": {"errors", "interrupts", "io", "plan", "execute", "verify", "progress"},
    "merging": {"api", "plan", "execute", "progress"},
    "undoing": {"errors", "api", "execute", "io", "progress"},
    "running": {"errors", "interrupts", "sizes", "io", "keys", "plan", "recipes", "api", "progress"},
    "converting": {"errors", "adapter_api", "api", "io", "plan", "execute", "progress"},
    "adapter_api": {"errors", "io", "keys", "identify", "plan", "execute", "progress"},
    "adapter_documents": {"adapter_api", "documents", "plan"},
    "doctor": {"errors", "io", "keys", "identify", "plan"},
    "norms": {"errors", "io", "keys", "identify", "adapters"},
    "inspection": {"errors", "io", "keys", "identify", "plan", "doctor", "norms"},
    "bugreport": {"errors", "io", "keys", "inspection"},
    "documents": {"errors", "api", "plan", "undoing", "verify", "merges", "recipes", "running"},
    "cli": {
        *("errors", "dtypes", "interrupts", "sizes", "progress", "keys", "identify", "plan", "verify", "merges"),
        *("api", "documents", "adapter_api", "adapter_documents", "inspection", "bugreport", "merging", "converting"),
        *("undoing", "recipes", "running"),
    },
}
STANDARD_LIBRARY_ONLY = ("errors", "dtypes", "garbage", "interrupts", "sizes", "progress", "keys", "plan")
# The table, what says how methods are run, the methods whose arithmetic is operators alone, and those that are
# coefficients alone: bake.merges.combination uses them on tensors.
PLAIN_MERGES = (
    *("add_difference", "linear", "passthrough", "sum_twice", "task_arithmetic", "triple_sum", "weighted_subtraction"),
    "weighted_sum",
)
MERGES_WITHOUT_TORCH = ("__init__", "merge", "method", "rules", "slerp", "multislerp", "karcher", *PLAIN_MERGES)
WITH_TORCH = {
    PACKAGE / "draws.py",
    PACKAGE / "io" / "payload.py",
    PACKAGE / "io" / "pickled.py",
    PACKAGE / "execute" / "adapter_file.py",
    PACKAGE / "execute" / "appended.py",
    PACKAGE / "execute" / "combine.py",
    PACKAGE / "execute" / "compute.py",
    *(PACKAGE / "execute" / "merging" / f"{name}.py" for name in ("pipeline", "reader", "work")),
    PACKAGE / "execute" / "convert.py",
    PACKAGE / "execute" / "device.py",
    PACKAGE / "execute" / "extract.py",
    PACKAGE / "execute" / "narrow.py",
    PACKAGE / "execute" / "pipeline.py",
    PACKAGE / "execute" / "resize.py",
    PACKAGE / "execute" / "respelled.py",
    PACKAGE / "execute" / "rounding.py",
    PACKAGE / "execute" / "scaled.py",
    PACKAGE / "execute" / "stochastic.py",
    PACKAGE / "execute" / "sums.py",
    PACKAGE / "execute" / "worker.py",
    PACKAGE / "verify" / "chains.py",
    PACKAGE / "verify" / "merges.py",
    PACKAGE / "verify" / "rounding.py",
    PACKAGE / "cli" / "env.py",
    PACKAGE / "norms.py",
    *(PACKAGE / "adapters").glob("*.py"),
    *(path for path in (PACKAGE / "merges").glob("*.py") if path.stem not in MERGES_WITHOUT_TORCH),
    *(path for path in (PACKAGE / "factoring").glob("*.py") if path.name != "__init__.py"),
}


def modules() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def layer_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports_of(path: Path, when_run: bool = False) -> set[str]:
    """Dotted names that a module imports anywhere, also inside functions. when_run: not for its annotations alone."""
    found: set[str] = set()
    tree = ast.parse(path.read_text())
    for node in nodes_when_run(tree) if when_run else ast.walk(tree):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            assert node.level == 0, f"{path}: relative import"
            if node.module == "bake":
                found.update(f"bake.{alias.name}" for alias in node.names)
            found.add(node.module)
    return found


def nodes_when_run(tree: ast.AST) -> Iterator[ast.AST]:
    for node in ast.iter_child_nodes(tree):
        if not (isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"):
            yield node
            yield from nodes_when_run(node)


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_module_imports_only_layers_below_its_own(path: Path) -> None:
    layer = layer_of(path)
    if layer in ("__init__", "__main__"):
        return
    inside = {name.split(".")[1] for name in imports_of(path) if name.startswith("bake.")}
    assert inside - {layer, "__version__"} <= ALLOWED[layer]


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_torch_is_imported_where_payload_is_touched_and_nowhere_else(path: Path) -> None:
    outside = {name.split(".")[0] for name in imports_of(path, when_run=True)}
    assert ("torch" in outside) == (path in WITH_TORCH)
    if layer_of(path) in STANDARD_LIBRARY_ONLY:
        assert not outside - {"bake"} - set(sys.stdlib_module_names)


@pytest.mark.parametrize(
    "words",
    [
        ["--help"],
        ["fuse", "--help"],
        ["merge", "--list"],
        ["merge", "weighted_sum", str(SD1_BASE), str(SD1_BASE), "--dry-run"],
        ["extract", "--help"],
        ["extract", str(SD1_BASE), str(SD1_BASE), "--dry-run", "-o", str(ROOT / "never.safetensors")],
        ["plan", str(SD1_BASE), "-l", str(KOHYA_LORA)],
        ["run", str(FIXTURES / "recipes" / "styles.yaml"), "--dry-run"],
        ["schema"],
        ["inspect", str(KOHYA_LORA), "--against", str(SD1_BASE)],
        ["inspect", str(SD1_BASE), "--json"],
    ],
    ids=" ".join,
)
def test_these_commands_start_without_torch_and_numpy(words: list[str]) -> None:
    program = (
        "import sys\n"
        "from bake.cli import main\n"
        "try:\n"
        f"    main({words!r})\n"
        "except SystemExit as end:\n"
        "    heavy = {'torch', 'numpy', 'safetensors', 'tqdm'} & set(sys.modules)\n"
        "    sys.exit(f'loaded {heavy}' if heavy else end.code)\n"
    )
    finished = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, check=False)
    assert finished.returncode == 0, finished.stderr


def test_importing_bake_loads_nothing_heavy() -> None:
    program = "import bake, sys; bake.build_plan; bake.fuse; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=False).returncode == 0
