"""Training of the scene judge: what its frames show, what damage makes of them, and that the command writes weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from benchmarks import train_judge
from benchmarks.train_judge import draw_frames, main
from pvdm_fast.data.draws import generator
from pvdm_fast.data.shapes import BACKDROPS, COLOURS, KINDS, Scene
from pvdm_fast.evaluation.scene_judge import SceneJudge


def only(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Draw only such shapes, with colours and outlines as they are."""
    monkeypatch.setattr(train_judge, "DRAWN", {name: 1.0})

    def unharmed(rng: np.random.Generator, canvas: np.ndarray, paint: np.ndarray) -> tuple[Any, Any, Any]:
        return torch.from_numpy(canvas), paint, np.ones(len(canvas), np.float32)

    monkeypatch.setattr(train_judge, "damage", unharmed)
    monkeypatch.setattr(train_judge, "_opacity", lambda rng, drawn: np.ones((len(drawn), 1, 1), np.float32))


def test_whole_shapes_are_those_that_scenes_render(monkeypatch: pytest.MonkeyPatch) -> None:
    only("whole", monkeypatch)
    frames, truth = draw_frames(generator(1), 60, 32, 48)
    clear = 0
    for frame in range(60):
        (colours,) = np.nonzero(truth.visible[frame].numpy() > 0.999)
        if len(colours) != 1 or np.count_nonzero(truth.visible[frame]) != 1:
            continue
        (colour,) = colours
        paint = truth.paint[frame, colour].numpy()
        kind = int(truth.kinds[frame, colour].argmax())
        place = truth.place[frame, colour].numpy()
        matches = []
        for radius in np.linspace(0.18, 0.3, 61):
            white = [np.array([COLOURS.index("white")]), np.zeros(3)]
            still = [place[None], np.zeros((1, 2)), np.array([False])]
            scene = Scene(np.array([1, 1.5]), np.array([kind]), np.array([radius]), *still, *white)
            cover = next(scene._covers(1, 32, 48, 1))[0]
            matches.append(float(np.abs(cover - paint).max()))
        assert min(matches) < 0.05
        clear += 1
    assert clear > 10
    assert frames.shape == (60, 3, 32, 48) and truth.kinds.sum(-1).eq(1).all()
    assert (truth.kinds[..., :-1].sum(-1) == (truth.visible > 0))[truth.visible > 0.02].all()


@pytest.mark.parametrize("name", [name for name in train_judge.DRAWN if name != "whole"])
def test_other_shapes_are_none_of_the_kinds(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    only(name, monkeypatch)
    frames, truth = draw_frames(generator(2), 40, 32, 32)
    assert truth.kinds[..., -1].eq(1).all()
    assert (truth.paint.sum(1) <= 1.0001).all() and float(truth.paint.max()) > 0.4
    assert truth.present.isnan().any(-1).float().mean() > 0.5 if name == "mixed" else (truth.present == 1).any()
    background = truth.paint.sum(1) == 0
    near = (frames.permute(0, 2, 3, 1)[background][:, None] - torch.from_numpy(BACKDROPS)).abs().amax(-1).amin(1)
    assert float(near.max()) < 1e-6


def test_damage_makes_kinds_unsure_and_keeps_the_range() -> None:
    frames, truth = draw_frames(generator(3), 200, 32, 32)
    assert float(frames.abs().max()) <= 1 and frames.isfinite().all()
    known = truth.kinds[..., : len(KINDS)].amax(-1)[truth.visible > 0.5]
    assert 0.3 < known.eq(1).float().mean() < 0.8 and ((known > 0.1) & (known < 0.9)).any() and (known == 0).any()
    assert ((truth.paint >= 0) & (truth.paint <= 1)).all()


def test_the_command_writes_the_same_weights_again(tmp_path: Path) -> None:
    arguments = ["--steps", "10", "--batch-size", "4", "--out"]
    threads = torch.get_num_threads()
    try:
        assert main([*arguments, str(tmp_path / "a.safetensors")]) == 0
        assert main([*arguments, str(tmp_path / "b.safetensors")]) == 0
    finally:
        torch.set_num_threads(threads)
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()
    SceneJudge().load_state_dict(load_file(tmp_path / "a.safetensors"))


@pytest.mark.slow
def test_it_learns() -> None:
    """Which pixels belong to which colour is learned first."""
    frames, truth = draw_frames(generator(4), 100, 32, 32)
    errors = []
    for steps in (10, 80):
        paint = train_judge.train(steps, 24, seed=0).paint(frames).sigmoid()
        errors.append(float((paint - truth.paint).abs().mean().detach()))
    assert errors[1] < errors[0] / 2
