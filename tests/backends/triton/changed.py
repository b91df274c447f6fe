"""Which operations' Triton kernels a change touches. Compiling all of them for every GPU takes half an hour."""

from __future__ import annotations

import ast
import subprocess
from pathlib import Path

from pvdm_fast.backends.choice import SERVED

PACKAGE = "pvdm_fast.kernels"
ROOT = Path(__file__).resolve().parents[3]
COMPILING = ("benchmarks/ahead_of_time.py", "benchmarks/kernel_resources.py")


def changed_files(root: Path = ROOT) -> list[str] | None:
    """Files that differ from the main branch, or on it from the commit before, as in .ci/run. None: git can't tell."""

    def git(*words: str) -> str | None:
        result = subprocess.run(["git", *words], cwd=root, capture_output=True, text=True, check=False)
        return None if result.returncode else result.stdout.strip()

    head = git("rev-parse", "-q", "--verify", "HEAD")
    base = git("merge-base", "HEAD", "origin/main") or head
    if base == head:
        base = git("rev-parse", "-q", "--verify", "HEAD^")
    files = git("diff", "--name-only", base) if base else None
    return None if files is None else files.splitlines()


def imported(path: Path) -> list[str]:
    """The modules of kernels/ that a file imports, or imports something from."""
    lines = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ImportFrom)]
    of_modules = [str(line.module).rpartition(".")[2] for line in lines if str(line.module).startswith(f"{PACKAGE}.")]
    return of_modules + [alias.name for line in lines if line.module == PACKAGE for alias in line.names]


def sources(op: str) -> set[str]:
    """The files of an operation's kernels: its module in kernels/, and what that imports from there."""
    found: set[str] = set()
    waiting = [op]
    while waiting:
        path = ROOT / "kernels" / f"{waiting.pop()}.py"
        name = str(path.relative_to(ROOT))
        if name not in found and path.exists():
            found.add(name)
            waiting += imported(path)
    return found


def changed_operations(files: list[str] | None) -> list[str]:
    """Those with a changed source; all of them if git can't tell, or if what compiles them changed."""
    if files is None or set(files) & {*COMPILING, "kernels/__init__.py"}:
        return list(SERVED["triton"])
    return [op for op in SERVED["triton"] if sources(op) & set(files)]
