"""The shipped scene judge: right about held-out renderings, and unsure about shapes that are none of the five kinds."""

from __future__ import annotations

import time

import pytest
import torch
from evaluation.scene_clips import SIDE, blurred, held_out, rendered, truth
from torch import Tensor

from pvdm_fast.data.shapes import KINDS
from pvdm_fast.evaluation.scene_judge import WEIGHTS, SceneJudge, Seen, load_judge, see

FRAMES, CLEAR = 8, 0.6


@pytest.fixture(scope="module")
def judge() -> SceneJudge:
    return load_judge()


@pytest.fixture(scope="module")
def clips() -> Tensor:
    return rendered(held_out(150), FRAMES, stride=3)


@pytest.fixture(scope="module")
def seen(judge: SceneJudge, clips: Tensor) -> Seen:
    return see(judge, clips)


@pytest.fixture(scope="module")
def known() -> Seen:
    return truth(held_out(150), FRAMES, stride=3)


def test_it_names_and_places_what_is_clearly_visible(seen: Seen, known: Seen) -> None:
    clear = known.visible >= CLEAR
    assert int(clear.sum()) > 1000 and all(int((known.kind[clear] == kind).sum()) > 100 for kind in range(len(KINDS)))
    right = clear & (seen.present >= 0.5) & (seen.kind == known.kind)
    for kind in range(len(KINDS)):
        of_kind = clear & (known.kind == kind)
        assert right[of_kind].float().mean() >= 0.97, KINDS[kind]
    assert (seen.confidence >= 0.9)[clear].float().mean() >= 0.97
    error = (seen.place - known.place).norm(dim=-1)[clear]
    assert error.mean() < 0.02 and error.quantile(0.99) < 0.05, "of the short side"
    assert (seen.visible - known.visible)[known.visible > 0.1].abs().mean() < 0.05


def test_it_sees_nothing_where_nothing_is(judge: SceneJudge, seen: Seen, known: Seen) -> None:
    assert (seen.present >= 0.5)[known.visible < 0.01].float().mean() < 0.002
    empty = see(judge, torch.full((1, 3, 2, SIDE, SIDE), 20, dtype=torch.uint8))
    assert float(empty.present.max()) == 0 and float(empty.confidence.max()) == 0 and (empty.kind == len(KINDS)).all()
    assert float(empty.features.abs().max()) == 0


def test_it_is_unsure_of_blurred_and_mixed_shapes(judge: SceneJudge, clips: Tensor, seen: Seen, known: Seen) -> None:
    clear = known.visible >= CLEAR

    def sure(found: Seen) -> float:
        return float((found.confidence >= 0.9)[clear].float().mean())

    assert sure(see(judge, blurred(clips))) < 0.05
    others = held_out(150)
    for scene in others:
        scene.kind[:] = (scene.kind + 1) % len(KINDS)
    mixed = (clips.float() + rendered(others, FRAMES, stride=3).float()) / 2
    assert sure(see(judge, mixed.round().to(torch.uint8))) < 0.1
    slightly = clips.float() + 4 * torch.randn(clips.shape, generator=torch.Generator().manual_seed(0))
    assert sure(see(judge, slightly.round().clamp(0, 255).to(torch.uint8))) >= 0.95, "noise that hides no shape"


def test_what_it_sees_is_a_probability_and_the_same_again(judge: SceneJudge, clips: Tensor, seen: Seen) -> None:
    assert torch.allclose(seen.kinds.sum(-1), torch.ones(seen.present.shape), atol=1e-5)
    assert ((seen.kinds >= 0) & (seen.kinds <= 1)).all() and ((seen.present >= 0) & (seen.present <= 1)).all()
    again = see(judge, clips)
    assert torch.equal(again.kinds, seen.kinds) and torch.equal(again.features, seen.features)
    one = see(judge, clips[3:4])
    assert torch.allclose(one.kinds, seen.kinds[3:4], atol=1e-5), "a clip's neighbours don't matter"


def test_its_weights_are_small_and_it_is_quick(judge: SceneJudge) -> None:
    assert WEIGHTS.stat().st_size <= 2_000_000
    clips = rendered(held_out(16), 16)
    seconds = []
    for _ in range(3):
        start = time.process_time()
        see(judge, clips)
        seconds.append(time.process_time() - start)
    assert min(seconds) / 16 * 256 < 10  # of CPU time for 256 clips
