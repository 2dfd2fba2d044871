"""Packages inside arpo_trl import each other in one direction only.

docs/architecture.md shows the same layers.
"""

import ast
import functools
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import arpo_trl

PACKAGE = Path(arpo_trl.__file__).parent
DOCS = Path(__file__).parents[1] / "docs" / "architecture.md"

ROOMS = (
    *("visible", "errors", "options", "common", "trl_seam"),
    *("net", "tools", "rollout", "rewards", "data", "config"),
    *("logs", "runs", "command_line", "publishing", "training", "evaluation"),
    *("viewing", "scripts", "quickstart", "commands", "cli", "__main__"),
)
"""From the bottom up: a room imports only from rooms before it."""

TREE = (
    *("text", "tree", "estimates", "rules", "credit", "engines", "protocols"),
    *("batch", "paths", "states", "decisions", "sampler", "build"),
)
"""The same within `rollout`."""


@functools.cache
def modules() -> list[tuple[str, ast.Module]]:
    """Each module's dotted name below the package, and its source."""
    found = []
    for path in sorted(PACKAGE.rglob("*.py")):
        name = ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix("__init__").rstrip(".")
        found.append((name, ast.parse(path.read_text("utf-8"))))
    return found


def imported(tree: ast.Module) -> Iterator[str]:
    """Modules of the package that a module imports, wherever in it, as dotted names below the package."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module is not None and node.level == 0:
            public = node.module == "arpo_trl"
            names = [home_of(alias.name) for alias in node.names] if public else [node.module]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            start = ast.unparse(node.args[0]).removeprefix("f").strip("'\"")  # such as arpo_trl.commands.{module}
            names = [start.partition(".{")[0]]
        else:
            continue
        yield from (name.removeprefix("arpo_trl.") for name in names if name.startswith("arpo_trl."))


def home_of(name: str) -> str:
    """The module that a public name of the package comes from, or the package's own module of that name."""
    value = getattr(arpo_trl, name, None)
    return f"arpo_trl.{name}" if value is None or isinstance(value, ModuleType) else str(value.__module__)


def backward(order: tuple[str, ...], inside: str = "") -> list[str]:
    """Imports that lead to a later room of `order`; a module that is in none counts as well."""
    prefix = f"{inside}." if inside else ""
    found = []
    for module, tree in modules():
        if not module.startswith(prefix) or not module:
            continue
        room = module.removeprefix(prefix).split(".")[0]
        if not room:
            continue
        for target in imported(tree):
            if not target.startswith(prefix):
                continue
            other = target.removeprefix(prefix).split(".")[0]
            if other != room and (room not in order or other not in order or order.index(other) > order.index(room)):
                found.append(f"{module} imports {target}")
    return found


def test_rooms_import_in_one_direction() -> None:
    assert backward(ROOMS) == []
    assert backward(TREE, "rollout") == []


def test_every_module_is_in_a_room() -> None:
    assert {module.split(".")[0] for module, _ in modules() if module} == set(ROOMS)


def test_the_tree_and_its_rules_are_pure() -> None:
    """No torch, no engine, no network: branching can be computed and tested by hand."""
    for module, tree in modules():
        if module.startswith(("rollout.tree", "rollout.estimates", "rollout.rules")):
            names = {
                alias.name.split(".")[0]
                for node in ast.walk(tree)
                if isinstance(node, ast.Import | ast.ImportFrom)
                for alias in ([ast.alias(node.module or "")] if isinstance(node, ast.ImportFrom) else node.names)
            }
            assert names.isdisjoint({"torch", "trl", "transformers", "vllm", "httpx"}), module


def test_each_rule_and_each_credit_is_one_small_file() -> None:
    rooms = [PACKAGE / "rollout" / room for room in ("rules", "credit")]
    files = [path for room in rooms for path in room.glob("*.py") if path.stem not in ("__init__", "base")]
    assert len(files) > 10
    assert [path.name for path in files if len(path.read_text("utf-8").splitlines()) > 60] == []


def test_the_documented_picture_is_the_graph() -> None:
    picture = DOCS.read_text("utf-8").split("## Packages")[1].split("\n## ")[0]
    documented = [line.split("`")[1].rstrip("/") for line in picture.splitlines() if line.startswith("| `")]
    assert documented == list(ROOMS)


def test_modules_log_only_through_the_filter_for_hostile_text() -> None:
    found = [
        f"{module}: {ast.unparse(node)}"
        for module, tree in modules()
        if module != "visible"
        for node in ast.walk(tree)
        if (isinstance(node, ast.Import | ast.ImportFrom) and "accelerate.logging" in ast.unparse(node))
        or (isinstance(node, ast.Call) and ast.unparse(node) in ("logging.getLogger(__name__)", "getLogger(__name__)"))
    ]
    assert found == []


PRINTING = {"visible", "tools.python.cell", "tools.python.worker", "tools.visit.worker"}
"""`say` itself, and programs whose standard output is a result for another process."""


def test_modules_print_only_through_the_filter_for_hostile_text() -> None:
    found = [
        f"{module}: {ast.unparse(node)}"
        for module, tree in modules()
        if module not in PRINTING
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("print", "sys.stdout.write", "sys.stderr.write")
    ]
    assert found == []
