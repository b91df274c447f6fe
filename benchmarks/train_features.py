"""``python -m benchmarks.train_features``: trains the feature network that `pvdm_fast.evaluate` ships with.

It learns to name what was rendered into a window and what was done to it (`benchmarks.feature_windows`). The heads that
answer are thrown away; the features under them are what distances are computed from.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.feature_windows import CUTS, DAMAGE, ORDERS, Windows, draw_windows
from benchmarks.pace import pace
from benchmarks.report import write_section
from pvdm_fast.backends.precision import cpu_multiplies_bfloat16
from pvdm_fast.data.shapes import COLOURS, KINDS
from pvdm_fast.evaluation.clip_network import SIDE, WEIGHTS, WIDTH, ClipNetwork
from pvdm_fast.jobs.command import run_command
from pvdm_fast.jobs.files import share_as_usual, whole_file

DOCUMENT = Path(__file__).resolve().parents[1] / "docs" / "evaluation.md"
STEPS, BATCH, LEARNING_RATE = 2100, 64, 3e-3
HELD_OUT, HELD_OUT_SEED = 1024, 10_000
SLOTS = 2 * len(COLOURS)  # by first and last frame


class Heads(nn.Module):
    """The questions: contents through a hidden layer, damage linearly, so that it moves the mean of the features."""

    def __init__(self) -> None:
        super().__init__()
        self.contents = nn.Sequential(nn.Linear(WIDTH, 192), nn.ReLU(), nn.Linear(192, SLOTS * (1 + len(KINDS) + 2)))
        self.done = nn.Linear(WIDTH, len(CUTS) + len(ORDERS) + 2 + len(DAMAGE) + 6)

    def forward(self, features: Tensor) -> dict[str, Tensor]:
        slots = self.contents(features).view(-1, 2, len(COLOURS), 1 + len(KINDS) + 2)
        present, kind, place = slots.split([1, len(KINDS), 2], dim=-1)
        cut, order, disorder, damage, shift = self.done(features).split(
            [len(CUTS), len(ORDERS), 2, len(DAMAGE), 6], dim=-1
        )
        return {
            "present": present.squeeze(-1), "kind": kind, "place": place, "cut": cut, "order": order,
            "disorder": disorder, "damage": damage, "shift": shift,
        }  # fmt: skip


def loss_of(answers: dict[str, Tensor], windows: Windows) -> Tensor:
    """The sum of the questions' losses, each of the order of 1 before training."""
    seen = windows.present.bool()
    return (
        2 * F.binary_cross_entropy_with_logits(answers["present"], windows.present)
        + F.cross_entropy(answers["kind"].flatten(0, 2), windows.kind.flatten())
        + 20 * F.mse_loss(answers["place"][seen], windows.place[seen])
        + F.cross_entropy(answers["cut"], windows.cut)
        + F.cross_entropy(answers["order"], windows.order)
        + 10 * F.mse_loss(answers["disorder"], windows.disorder)
        + 20 * F.mse_loss(answers["damage"], windows.damage)
        + 20 * F.mse_loss(answers["shift"], windows.shift)
    )


def train(steps: int, seed: int = 0) -> tuple[ClipNetwork, Heads]:
    """Train on windows that are rendered as they are needed; none is seen twice. Products are in bfloat16 on CPUs that
    multiply it."""
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    network, heads = ClipNetwork(), Heads()
    parameters = [*network.parameters(), *heads.parameters()]
    optimizer = torch.optim.AdamW(parameters, LEARNING_RATE, weight_decay=0.01, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: pace(step, steps))
    started, smooth = time.perf_counter(), 0.0
    for step in range(1, steps + 1):
        windows = draw_windows(rng, BATCH)
        with torch.autocast("cpu", torch.bfloat16, enabled=cpu_multiplies_bfloat16()):
            loss = loss_of(heads(network(windows.video)), windows)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        smooth += (float(loss.detach()) - smooth) * max(0.02, 1 / step)
        if step % 50 == 0 or step == steps:
            spent = f"{time.perf_counter() - started:.0f} s, {time.process_time():.0f} s of them computing"
            print(f"step {step}/{steps}  loss {smooth:.3f}  {spent}", flush=True)
    return network.eval(), heads.eval()


@torch.no_grad()
def accuracy(network: ClipNetwork, heads: Heads) -> list[tuple[str, str, str]]:
    """What it knows about plain and damaged windows that it was not trained on, as (question, plain, damaged) rows."""
    rng = np.random.default_rng(HELD_OUT_SEED)
    columns = []
    for damaged in (False, True):
        windows = draw_windows(rng, HELD_OUT, damaged)
        answers = heads(network(windows.video))
        seen = windows.present.bool()
        error = (answers["place"] - windows.place)[seen].norm(dim=-1).median()
        found = {
            "colours that are there": _share((answers["present"] > 0) == seen),
            "their kinds": _share(answers["kind"][seen].argmax(-1) == windows.kind[seen]),
            "their places, median error": f"{error * SIDE:.1f} of {SIDE} pixels",
            f"the cut, one of {len(CUTS)}": _share(answers["cut"].argmax(-1) == windows.cut),
            f"the order, one of {len(ORDERS)}": _share(answers["order"].argmax(-1) == windows.order),
        }
        if damaged:
            for number, name in enumerate(DAMAGE):
                found[f"how much {name}"] = _correlation(answers["damage"][:, number], windows.damage[:, number])
            found["shift and gain of colours"] = _correlation(answers["shift"].flatten(), windows.shift.flatten())
        columns.append(found)
    return [(question, columns[0].get(question, ""), answer) for question, answer in columns[1].items()]


def table(rows: Sequence[tuple[str, str, str]]) -> str:
    """Markdown for docs/evaluation.md."""
    head = ["| question | plain renderings | damaged |", "| --- | --- | --- |"]
    return "\n".join([*head, *(f"| {' | '.join(row)} |" for row in rows)])


def _share(right: Tensor) -> str:
    return f"{100 * right.float().mean():.1f} % right"


def _correlation(answers: Tensor, labels: Tensor) -> str:
    return f"correlation {torch.corrcoef(torch.stack([answers, labels]))[0, 1]:.2f}"


def save(network: ClipNetwork, path: Path) -> None:
    """Write the weights in float16."""
    state = {name: value.half() for name, value in network.state_dict().items() if "num_batches" not in name}
    with whole_file(path) as temporary:
        save_file({name: value.contiguous() for name, value in state.items()}, temporary)
        share_as_usual(temporary)


def run(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.train_features", description=__doc__)
    add = parser.add_argument
    add("--out", type=Path, default=WEIGHTS, help="file of the weights (default: the shipped one)")
    add("--steps", type=int, default=STEPS, help=f"steps of {BATCH} windows each (default: {STEPS})")
    add("--write-docs", action="store_true", help=f"write the table of accuracies into {DOCUMENT.name}")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    network, heads = train(options.steps)
    save(network, options.out)
    answers = table(accuracy(network, heads))
    print(answers)
    if options.write_docs:
        write_section(DOCUMENT, "accuracy", answers)


def main(arguments: Sequence[str] | None = None) -> int:
    return run_command(lambda: run(arguments), "take fewer --steps")


if __name__ == "__main__":
    sys.exit(main())
