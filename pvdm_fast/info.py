"""`python -m pvdm_fast.info`: what is installed, what was built, and which backend computes each operation here."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from typing import Any

from pvdm_fast.jobs.command import run_command  # first, so that a Ctrl-C during the other imports is one line

# isort: split
from pvdm_fast.analysis.machine import collect
from pvdm_fast.backends import choice, extensions
from pvdm_fast.jobs.arguments import Parser


def _build_lines(build: dict[str, Any]) -> list[str]:
    if not build:
        return [f"  nothing was built: {extensions.REINSTALL}"]
    lines = []
    for name in ("_cpu", "_cuda"):
        facts = build.get(name, {"built": False, "reason": "it was not asked for"})
        if facts["built"]:
            lines.append(f"  {name:<6} built by {facts['compiler']} for {', '.join(facts['targets'])}")
        else:
            lines.append(f"  {name:<6} left out: {facts['reason']}")
    return lines


def _table(operations: dict[str, dict[str, str | None]]) -> list[str]:
    """One row per operation: "*" marks the automatic choice. Other cells are "serves" or the number of a note
    below."""
    notes: list[str] = []
    rows = [f"  {'operation':<18}" + "".join(f"{name:<13}" for name in choice.BACKENDS)]
    for op, facts in operations.items():
        cells = []
        for name in choice.BACKENDS:
            reason = facts[name]
            if reason is None:
                cells.append("serves *" if facts["auto"] == name else "serves")
                continue
            reason = reason.replace(op, "this operation")
            if reason not in notes:
                notes.append(reason)
            cells.append(f"no [{notes.index(reason) + 1}]")
        rows.append(f"  {op:<18}" + "".join(f"{cell:<13}" for cell in cells).rstrip())
    rows.append("  * chosen automatically here")
    return rows + [f"  [{i}] {note}" for i, note in enumerate(notes, start=1)]


def describe_machine(facts: dict[str, Any]) -> list[str]:
    """What `collect()` found, as lines of text, without the table of operations."""
    cpu, gpu, triton = facts["cpu"], facts["gpu"], facts["triton"]
    lines = ["Versions"]
    versions = {name: value for name, value in facts["versions"].items() if name != "torch_cuda"}
    lines += [f"  {name:<14} {value or 'not installed'}" for name, value in versions.items()]
    lines += ["", "CPU", f"  {cpu['name']} ({cpu['architecture']}), {cpu['threads']} threads for PyTorch"]
    lines += [f"  has {', '.join(cpu['flags']) or 'none of the features that kernels know'}"]
    lines += [f"  kernels use {cpu['instruction_set'] or 'nothing: ' + str(facts['backends']['cpu'])}"]
    lines += ["", "GPU"]
    lines += [
        f"  {d['name']}, {d['memory_gib']} GiB, compute capability {d['compute_capability']}" for d in gpu["devices"]
    ] or [f"  none: {gpu.get('reason', 'the driver lists none.')}"]
    if gpu["devices"] and not gpu["usable_by_torch"]:
        lines.append("  PyTorch can't use it: install a CUDA build of PyTorch")
    lines += ["", "Triton", f"  {facts['versions']['triton'] or 'not installed'}"]
    lines += ["  TRITON_INTERPRET is set: kernels run in the interpreter, on the CPU"] if triton["interpreter"] else []
    measured = "" if triton["user_table_present"] else "none, python -m pvdm_fast.tune would write "
    lines += [f"  configurations measured here: {measured}{triton['user_table']}"]
    lines += ["", "Build", *_build_lines(facts["build"]), "", "Backends"]
    return lines + [f"  {name:<10} {reason or 'runs here'}" for name, reason in facts["backends"].items()]


def describe(facts: dict[str, Any]) -> str:
    """`collect()`'s facts as text."""
    return "\n".join([*describe_machine(facts), "", "Operations", *_table(facts["operations"])])


def make_parser() -> Parser:
    parser = Parser(prog="python -m pvdm_fast.info", description=__doc__)
    parser.add_argument("--json", action="store_true", help="print everything as JSON")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""

    def show() -> None:
        options = make_parser().parse_args(arguments)
        facts = collect()
        print(json.dumps(facts, indent=1) if options.json else describe(facts))

    return run_command(show)


if __name__ == "__main__":
    sys.exit(main())
