"""Training of the scene judge: what its frames show, what damage makes of them, and that the command writes weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from benchmarks import train_judge
from benchmarks.pace import pace
from benchmarks.train_judge import doubt, draw_frames, main
from pvdm_fast.data.draws import generator
from pvdm_fast.data.shapes import BACKDROPS, COLOURS, KINDS, PALETTE, Scene
from pvdm_fast.evaluation.scene_judge import SceneJudge


def only(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Draw only such shapes, with colours and outlines as they are."""
    monkeypatch.setattr(train_judge, "DRAWN", {name: 1.0})
    monkeypatch.setattr(train_judge, "EXACT", 0.0)

    def unharmed(rng: Any, canvas: np.ndarray, paint: np.ndarray, spared: Any) -> tuple[Any, Any, Any]:
        return torch.from_numpy(canvas), paint, np.ones((len(canvas), 6), np.float32)

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


def test_exact_frames_are_spared(monkeypatch: pytest.MonkeyPatch) -> None:
    """One or two whole objects, every pixel that one covers in its palette's colour, all kinds known."""
    monkeypatch.setattr(train_judge, "EXACT", 1.0)
    frames, truth = draw_frames(generator(5), 60, 32, 48)
    shown = (truth.visible > 0).sum(1)
    assert truth.kinds[..., :-1].sum(-1).eq(truth.shape.sum(-1)).all() and set(shown.tolist()) == {1, 2}
    frame, colour, row, column = (truth.paint == 1).nonzero(as_tuple=True)
    painted = (frames[frame, :, row, column] + 1) * 127.5
    assert len(frame) > 1000
    assert torch.allclose(painted, (torch.from_numpy(PALETTE).float()[colour] * 255).round(), atol=1e-3)


def test_the_learning_rate_rises_stays_and_falls() -> None:
    rates = [pace(step, 3000) for step in range(3000)]
    assert rates[:1999] == sorted(rates[:1999]) and rates[200:2000] == [1.0] * 1800
    assert rates[2000:] == sorted(rates[2000:], reverse=True) and 0 < rates[-1] < 1e-5


def test_of_what_is_hidden_the_best_is_believed() -> None:
    """A shape that is no kind counts the less, the less of it is seen. A whole kind always counts."""
    odd, visible = torch.tensor([True, True, True, False, False]), torch.tensor([1.0, 0.7, 0.4, 1.0, 0.4])
    assert doubt(odd, visible).tolist() == pytest.approx([1, 0.5, 0, 1, 1])


def test_an_object_is_torn_where_its_pixels_are_shifted_apart() -> None:
    """By what can be seen of it: a sliver of a pixel is hardly torn, and the same shift of all isn't seen at all."""
    layers = torch.zeros(200, 9, 32, 32)
    layers[:, 3, 8:22, 8:22] = layers[:, 4, 8:11, 8:11] = 1
    shifted, torn = train_judge._wobbled(generator(6), layers, torch.full((200,), 2.0))
    assert shifted.shape == layers.shape and torn.shape == (200, 6) and torn[:, 2:].abs().max() == 0
    assert 0.5 < torn[:, 0].mean() < 2 and torn[:, 1].mean() < torn[:, 0].mean() / 2
    assert train_judge._wobbled(generator(6), layers, torch.zeros(200))[1].max() < 1e-3


def test_damage_makes_kinds_unsure_and_keeps_the_range(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train_judge, "EXACT", 0.0)
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
    for steps in (10, 250):
        paint = train_judge.train(steps, 24, seed=0).paint(frames).sigmoid()
        errors.append(float((paint - truth.paint).abs().mean().detach()))
    assert errors[1] < errors[0] / 2
