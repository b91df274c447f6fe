"""Imports point downwards through the layers of docs/architecture.md, and the page names every module once."""

from __future__ import annotations

import ast
import re
from collections import Counter
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")


@cache
def modules() -> dict[str, Path]:
    """Every module by its dotted name without the leading `pvdm_fast.`. `kernels/` is installed as part of the
    package."""
    found = {}
    for path in (*ROOT.glob("pvdm_fast/**/*.py"), *ROOT.glob("kernels/*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        parts = parts[1:] if parts[0] == "pvdm_fast" else parts
        found[".".join(part for part in parts if part != "__init__")] = path
    return found


def layers() -> list[list[str]]:
    """The page's block of layers, top first: rooms or modules, several per line."""
    block = re.search(r"^```text\n(commands.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
    assert block, "docs/architecture.md has lost the block that draws the layers"
    return [re.sub(r"\(.*?\)", "", line).split() for line in block[1].splitlines()]


@cache
def heights() -> dict[str, tuple[int, str]]:
    """For each module, its layer (0 is the bottom) and its room: the longest name in the layers that contains it."""
    rooms = {room: height for height, line in enumerate(reversed(layers())) for room in line if room != "commands"}
    result = {}
    for name in modules():
        holding = [room for room in rooms if name == room or name.startswith(f"{room}.")]
        room = max(holding, key=len) if holding else "commands"
        result[name] = (rooms.get(room, len(layers()) - 1), room)
    return result


def imports(name: str) -> set[str]:
    """The package's modules that a module imports anywhere, even for types alone."""
    found = set()
    for node in ast.walk(ast.parse(modules()[name].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            wanted = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            wanted = [f"{node.module}.{alias.name}" for alias in node.names] + [node.module]
        else:
            continue
        short = [full.removeprefix("pvdm_fast.") for full in wanted if full.startswith("pvdm_fast.")]
        # `from a import b` imports module a.b if it exists, otherwise a
        found |= set(short[:-1]) & set(modules()) or set(short[-1:]) & set(modules())
    return found - {name}


@pytest.mark.parametrize("name", [name for name in modules() if name])
def test_imports_point_downwards(name: str) -> None:
    height, room = heights()[name]
    for other in imports(name):
        below, place = heights()[other]
        assert place == room or below < height, f"{name} ({room}) imports {other} ({place}), which isn't below it"


def test_every_folder_is_in_the_layers() -> None:
    """A folder that isn't drawn would count as a command at the top. But commands are single modules."""
    lost = {name for name, (_, room) in heights().items() if room == "commands" and "." in name}
    assert not lost, f"draw the folders of {', '.join(sorted(lost))} in docs/architecture.md"


def first_paragraph(path: Path) -> str:
    return " ".join((ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "").split("\n\n")[0].split())


def test_the_page_names_every_module_once() -> None:
    """With the first line of its docstring, so each module is described in one place."""
    paths = [path for path in modules().values() if path.name != "__init__.py"]
    wanted = Counter(f"| `{path.relative_to(ROOT)}` | {first_paragraph(path)} |" for path in paths)
    named = Counter(re.findall(r"^\| `[\w/]+\.py` \| .*$", PAGE, re.MULTILINE))
    assert named == wanted, f"add {sorted(wanted - named)} and remove {sorted(named - wanted)} in docs/architecture.md"
