"""One measurement from set-up to row, for the report and for pytest."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from benchmarks import rows
from benchmarks.measure import Prepared, Timings, check_agreement, record_backends
from benchmarks.memory import Weight, available, weigh
from benchmarks.registry import Case, Setting

DTYPES = (torch.float32, torch.bfloat16)


def devices() -> list[str]:
    """The CPU, and a GPU if there is one."""
    return ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]


@dataclass
class Ready:
    """A prepared case in agreement, with its memory."""

    case: Case
    setting: Setting
    prepared: Prepared
    errors: dict[str, dict[str, float]]
    served: dict[str, str]
    weights: dict[str, dict[str, Weight]]
    left_out: list[str]

    def row(self, direction: str, timings: Timings) -> rows.Row:
        return rows.make_row(
            self.case,
            self.setting,
            self.prepared,
            direction,
            timings,
            errors=self.errors,
            served=self.served,
            weights=self.weights.get(direction, {}),
            left_out=self.left_out,
        )


class DoesNotFit(RuntimeError):
    """Our own computation of a case needs more memory than there is."""


def get_ready(case: Case, setting: Setting) -> Ready:
    """Prepare a case and check that ours agrees with the baseline.

    Runners that would not fit in memory are left out, by an estimate before anything is allocated. If the baseline
    itself is among them, ours is checked against the next best, SDPA.

    Raises:
        Disagreement: ours computes something else. DoesNotFit: nothing to compare fits in memory.
    """
    weights = {direction: weigh(case, setting, direction) for direction in case.directions}
    memory = available(setting.device)
    left_out = []
    fitting = set()
    for name in weights[case.directions[0]]:
        peak = max(found[name].peak for found in weights.values())
        if peak <= memory:
            fitting.add(name)
        else:
            text = f"{name} needs {rows.mebibytes(peak)}, of which {rows.mebibytes(memory)} may be used"
            left_out.append(text)
    if "ours" not in fitting:
        raise DoesNotFit(f"{case.name} at size {setting.size}: {'; '.join(left_out)}.")
    prepared = case.prepare(setting)
    prepared.runners = {name: r for name, r in prepared.runners.items() if name in fitting or name == "compiled"}
    if prepared.truth not in prepared.runners:
        rest = [name for name in ("sdpa", "eager") if name in prepared.runners]
        if not rest:
            raise DoesNotFit(f"{case.name} at size {setting.size}: {'; '.join(left_out)}.")
        prepared.truth = rest[0]
    with record_backends() as served:
        errors = check_agreement(prepared, case.kind, differentiate=case.directions != ("forward",))
    return Ready(case, setting, prepared, errors, served, weights, left_out)
