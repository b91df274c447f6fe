"""`python -m benchmarks.judge_accuracy`: what the shipped scene judge says of renderings that it was not trained on."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from benchmarks.report import write_section
from pvdm_fast.data.draws import generator
from pvdm_fast.data.shapes import COLOURS, KINDS, Scene, draw_scene
from pvdm_fast.evaluation.scene_judge import SIDE, SceneJudge, Seen, load_judge, see
from pvdm_fast.evaluation.scenes import CLEAR, PRESENT, SURE, judge_clips
from pvdm_fast.jobs import numbers
from pvdm_fast.jobs.arguments import Parser
from pvdm_fast.jobs.command import run_command

DOCUMENT = Path(__file__).resolve().parents[1] / "docs" / "evaluation.md"
CLIP = 16  # frames of a model's clip: the scenes are rendered for two
NOISE = (4, 12)  # standard deviations, of 255 levels
ENOUGH = f"{CLEAR * 100:.0f} %"
LEFT = {"all": (0.99, 1.01), f"{ENOUGH} to 99 %": (CLEAR, 0.99), f"20 % to {ENOUGH}": (0.2, CLEAR)}


def render(scenes: Sequence[Scene]) -> Tensor:
    """uint8 (N, 3, 32, 32, 32)."""
    clips = np.stack([scene.render(2 * CLIP, SIDE, SIDE) for scene in scenes])
    return torch.from_numpy(clips).permute(0, 4, 1, 2, 3)


def known(scenes: Sequence[Scene]) -> tuple[Tensor, Tensor, Tensor]:
    """Of each colour in each frame: visible share (N, T, 6), kind (N, T, 6) and place (N, T, 6, 2)."""
    visible = torch.zeros(len(scenes), 2 * CLIP, len(COLOURS))
    kind, place = torch.zeros(visible.shape, dtype=torch.long), torch.zeros(*visible.shape, 2)
    for number, scene in enumerate(scenes):
        colours = torch.from_numpy(scene.colour)
        visible[number, :, colours] = torch.from_numpy(scene.visible(2 * CLIP, SIDE, SIDE)).float()
        kind[number, :, colours] = torch.from_numpy(scene.kind)
        place[number, :, colours] = torch.from_numpy(scene.positions(np.arange(2 * CLIP))).float()
    return visible, kind, place


def objects_table(seen: Seen, visible: Tensor, kind: Tensor, place: Tensor) -> list[str]:
    """By how much the border and other objects leave of an object, and of what can be seen clearly by kind."""
    rows = {f"{name} of it visible": (visible >= low) & (visible < high) for name, (low, high) in LEFT.items()}
    clear = visible >= CLEAR
    rows |= {f"{ENOUGH} at least, {name}s": clear & (kind == number) for number, name in enumerate(KINDS)}
    lines = ["| objects | in frames | named right | sure of it | median error of the place |", "|" + " --- |" * 5]
    right = (seen.present >= PRESENT) & (seen.kind == kind)
    away = (seen.place - place).norm(dim=-1) * SIDE
    for name, chosen in rows.items():
        shares = (_share(right[chosen]), _share((right & (seen.confidence >= SURE))[chosen]))
        lines.append(f"| {name} | {int(chosen.sum()):,} | {' | '.join(shares)} | {away[chosen].median():.2f} pixels |")
    return lines


def clips_table(judge: SceneJudge, clips: Tensor) -> list[str]:
    """The scores of real clips, which would all be 100 % by a judge without errors."""
    lines = ["| clips | named and kept | unbroken paths | the same of two clips |", "|" + " --- |" * 4]
    draws = torch.Generator().manual_seed(0)
    rows = {"as rendered": clips.float()}
    for strength in NOISE:
        noise = strength * torch.randn(clips.shape, generator=draws)
        rows[f"with noise of {strength} of 255 levels"] = (clips + noise).round().clamp(0, 255)
    for name, made in rows.items():
        scores = judge_clips(made.to(torch.uint8), length=CLIP, judge=judge)
        first, two = (f"{scores[f'{prefix}named']:.1%} | {scores[f'{prefix}path']:.1%}" for prefix in ("", "second_"))
        lines.append(f"| {name} | {first} | {two.replace(' | ', ' and ')} |")
    return lines


def _share(right: Tensor) -> str:
    return f"{right.float().mean():.2%}"


def measure(count: int) -> str:
    """Markdown for docs/evaluation.md."""
    scenes = [draw_scene(generator("scenes of the judge's table", number)) for number in range(count)]
    judge, clips = load_judge(), render(scenes)
    lines = [*objects_table(see(judge, clips), *known(scenes)), "", *clips_table(judge, clips)]
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = Parser(prog="python -m benchmarks.judge_accuracy", description=str(__doc__).splitlines()[0])
    parser.add_argument("--clips", type=numbers.VIDEOS, default=200, help="default: %(default)s")
    parser.add_argument("--write-docs", action="store_true", help=f"write the tables into {DOCUMENT.name}")
    given: argparse.Namespace = parser.parse_args(arguments)

    def run() -> None:
        torch.set_num_threads(1)
        tables = measure(given.clips)
        print(tables)
        if given.write_docs:
            write_section(DOCUMENT, "judge", tables)

    return run_command(run, "take fewer --clips")


if __name__ == "__main__":
    sys.exit(main())
