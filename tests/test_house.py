"""The import rule of the package, read from the imports themselves."""

from __future__ import annotations

import ast
from functools import cache
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "lightning_inversion"
RULE = """
__main__, api -> cli, sweep, replication, ladder -> callbacks -> module, inversion, schedules
-> data, results, attribution, state, strategy -> recovery -> proposers
-> verification, objectives, inputs, decoding -> transformer
-> errors, cache, files, progress, untrusted, metrics, __init__
"""
"""Rooms, from the top down. A module imports from its own line and from those after an arrow."""
LEVELS = [level.split(", ") for level in " ".join(RULE.split()).split(" -> ")]
REPORT_READS = {"report", "errors", "files", "untrusted", "results", "__init__"}
"""``report`` reads files, and imports nothing that runs a model."""
MAY_IMPORT = {
    "lightning": ("cli.", "callbacks.", "module", "data.prompts", "strategy", "ladder.train"),
    "transformers": ("transformer.", "attribution.model"),
}


def module_name(path: Path) -> str:
    """``data.prompts`` for ``lightning_inversion/data/prompts.py``."""
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts)


def room(module: str) -> str:
    return module.split(".")[0]


@cache
def imports() -> dict[str, set[str]]:
    """The imports of each module, those inside functions and for type checkers among them."""
    return {module_name(path): imported(path) for path in sorted(PACKAGE.rglob("*.py"))}


def imported(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            # `from package import module` names the module, too.
            names.update(f"{node.module}.{alias.name}" for alias in node.names)
    return names


def target(name: str) -> str | None:
    """The module of this package that an import names; None for another package's."""
    if name.split(".")[0] != "lightning_inversion":
        return None
    parts = name.split(".")[1:]
    while parts:
        for candidate in (".".join(parts), ".".join([*parts, "__init__"])):
            if candidate in imports():
                return candidate
        parts.pop()
    return "__init__"


@cache
def edges() -> dict[str, set[str]]:
    """Which modules of this package each module imports."""
    return {
        module: {found for name in names if (found := target(name)) and found != module}
        for module, names in imports().items()
    }


def test_imports_follow_the_rule() -> None:
    level = {name: number for number, names in enumerate(LEVELS) for name in names}
    wrong = []
    for module, targets in edges().items():
        if module == "__init__":  # the public names, imported when they are first asked for
            continue
        for other in targets:
            if room(module) == "report":
                allowed = room(other) in REPORT_READS
            else:
                allowed = room(other) == "report" or level[room(other)] >= level[room(module)]
            if room(other) == "report":
                callers = {"report", "sweep", "replication", "ladder", "api", "__main__"}
                allowed = room(module) in callers
            if room(other) in {"replication", "ladder"}:
                allowed = room(module) in {room(other), "ladder"}
            if not allowed:
                wrong.append(f"{module} -> {other}")
    assert not wrong


def test_no_module_imports_itself_through_others() -> None:
    below: dict[str, set[str]] = {}

    def reach(module: str, path: tuple[str, ...]) -> set[str]:
        assert module not in path, " -> ".join([*path[path.index(module) :], module])
        if module not in below:
            targets = edges()[module] - {"__init__"}
            below[module] = targets.union(*(reach(other, (*path, module)) for other in targets))
        return below[module]

    for module in edges():
        reach(module, ())


def test_lightning_and_transformers_are_imported_where_the_rule_says() -> None:
    wrong = [
        f"{module} imports {package}"
        for package, places in MAY_IMPORT.items()
        for module, names in imports().items()
        if any(name.split(".")[0] == package for name in names)
        and not any(module == place or module.startswith(place) for place in places)
        and not only_for_types(module, package)
    ]
    assert not wrong


def only_for_types(module: str, package: str) -> bool:
    """Whether a module imports a package for type checkers alone."""
    tree = ast.parse((PACKAGE / f"{module.replace('.', '/')}.py").read_text("utf-8"))
    typed = {
        id(node)
        for block in ast.walk(tree)
        if isinstance(block, ast.If) and "TYPE_CHECKING" in ast.dump(block.test)
        for node in ast.walk(block)
    }
    return all(
        id(node) in typed
        for node in ast.walk(tree)
        if isinstance(node, ast.Import | ast.ImportFrom)
        and any(name.split(".")[0] == package for name in names_in(node))
    )


def names_in(node: ast.Import | ast.ImportFrom) -> list[str]:
    if isinstance(node, ast.ImportFrom):
        return [node.module or ""]
    return [alias.name for alias in node.names]
