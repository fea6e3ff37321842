"""The house's one-way rule, held by walking the imports."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "lightning_inversion"
# A part may import parts of its own level's room, and of lower levels.
LEVELS = {
    "__main__": 6,
    "sweep": 6,
    "cli": 5,
    "parser": 5,
    "experiments": 5,
    "protocol": 5,
    "bandwidth": 5,
    "module": 4,
    "prompts": 4,
    "strategy": 4,
    "resuming": 4,
    "callbacks": 4,
    "recovery": 3,
    "attribution": 3,
    "captured": 3,
    "prompt_batch": 3,
    "manifest": 3,
    "capture": 3,
    "decoding": 3,
    "metrics": 3,
    "inputs": 2,
    "objectives": 2,
    "stand_ins": 2,
    "progress": 2,
    "window": 2,
    "scale": 2,
    "transformer": 1,
    "report": 1,
    "batching": 0,
    "claims": 0,
    "output_places": 0,
    "durations": 0,
    "prompt_files": 0,
    "result_files": 0,
    "errors": 0,
    "visible_text": 0,
    "__init__": 0,
}
KNOWS_LIGHTNING = {"cli", "parser", "module", "prompts", "strategy", "resuming", "callbacks"}
FILES = sorted(PACKAGE.rglob("*.py"))


def part_of(path: Path) -> str:
    relative = path.relative_to(PACKAGE)
    return relative.parts[0].removesuffix(".py")


def imported(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
    return names


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_point_one_way(path: Path) -> None:
    part = part_of(path)
    for name in imported(path):
        top, *rest = name.split(".")
        if top in {"lightning", "pytorch_lightning"}:
            assert part in KNOWS_LIGHTNING, f"{part} must not know Lightning"
        if top == "lightning_inversion" and rest:
            if part == "report":
                allowed = {"report", "errors", "output_places", "visible_text"}
                assert rest[0] in allowed, "report reads files, never live objects"
            else:
                assert LEVELS[rest[0]] <= LEVELS[part], f"{part} must not import {rest[0]}"
