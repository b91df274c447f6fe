"""The last part: the quickest configuration of every Triton kernel on this card, as far as time allows."""

from __future__ import annotations

import os
from collections.abc import Iterator

import torch

from benchmarks.first_contact.context import Context, LeftOut, Wrong, importable
from pvdm_fast.analysis import tuning, workload
from pvdm_fast.analysis.tuning import Task
from pvdm_fast.backends import choice

BEFORE_AN_ENTRY = 4.0  # seconds that must be left


def tune(context: Context) -> None:
    """Written to DIR/tuned, not to the user's own table: copy it there if you want it."""
    if not importable("triton"):
        raise LeftOut("Triton is not installed: pip install triton.")
    from pvdm_fast.kernels import configs

    os.environ["XDG_CONFIG_HOME"] = str(context.out / "tuned")
    calls = workload.calls(context.size, torch.bfloat16)
    calls = [call for call in calls if call.op in choice.SERVED["triton"]]
    on_card = context.device == "cuda"
    device = torch.device("cuda")
    architecture = configs.architecture(device) if on_card else tuning.ASSUMED
    tasks = tuning.plan(calls, architecture)
    # Where the time goes first: the classes of shapes with the largest tensors.
    tasks.sort(key=lambda task: -sum(map(tuning.size_of, task.calls)))
    context.keep(architecture=architecture, planned=len(tasks), configurations=sum(map(_configurations, tasks)))
    if not on_card:
        raise LeftOut(f"kernels are timed on a card; there {len(tasks)} entries of the tables would be: run on one.")
    failed = 0
    with configs.assume(architecture):
        for found in tuning.best_of_each(_in_time(context, tasks), device, tuning.gpu_timer, print):
            row = {"entry": str(found.task), "config": str(found.config or ""), "problem": found.problem}
            context.add("entries", row)
            failed += bool(found.problem)
            if not found.problem:
                tuning.write_user_table([(found.task, found.config)], configs.user_table())
    if failed:
        raise Wrong(f"{failed} of {len(context.found['entries'])} entries can't be timed on this card.")


def _configurations(task: Task) -> int:
    return 1 + len(task.candidates)


def _in_time(context: Context, tasks: list[Task]) -> Iterator[Task]:
    yield from context.while_time(tasks, least=BEFORE_AN_ENTRY)
