"""The scores of rendered scenes: full marks for exact renderings, and planted damage costs what it should."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch
from evaluation.scene_clips import blurred, held_out, joined, make_scene, rendered, truth
from torch import Tensor

from pvdm_fast.data.draws import generator
from pvdm_fast.data.shapes import KINDS, Scene, draw_scene
from pvdm_fast.evaluation.scene_judge import SceneJudge, load_judge, see
from pvdm_fast.evaluation.scenes import CLIP_FEATURES, clip_features, clip_scores, judge_clips, kinds_right, of_class

FRAMES = 16
# one above the other, so that nothing is hidden: how sure the judge is of hidden objects is tested on real clips
DISC = ("disc", "red", (0.26, 0.3), (0.0, 0.03), True)
BESIDE = ("square", "blue", (0.76, 0.4), (0.0, 0.025), True)


@pytest.fixture(scope="module")
def judge() -> SceneJudge:
    return load_judge()


def changed(scene: Scene, **values: object) -> Scene:
    return dataclasses.replace(scene, **{name: np.array(value) for name, value in values.items()})  # type: ignore[arg-type]


PAIR, ALONE = make_scene(DISC, BESIDE), make_scene(DISC)
FROM_BORDER = make_scene(("ring", "green", (0.5, 0.9), (0.0, 0.06), False))  # leaves on the right, returns on the left
BEHIND = make_scene(
    ("diamond", "white", (0.5, 0.25), (0.0, 0.05), True), ("disc", "pink", (0.5, 0.6), (0.0, -0.02), True)
)
THREE = make_scene(DISC, BESIDE, ("ring", "green", (0.3, 0.75), (0.02, -0.02), True))
OUTSIDE = make_scene(("disc", "red", (-0.22, -0.22), (0.0, 0.0), False))
# Damage: the first half of one scene, the second of another. Then whether all is named, and all paths are unbroken.
DAMAGE: dict[str, tuple[Scene, Scene, bool, bool]] = {
    "none": (PAIR, PAIR, True, True),
    "at the border": (FROM_BORDER, FROM_BORDER, True, True),
    "one behind the other": (BEHIND, BEHIND, True, True),
    "another kind": (PAIR, changed(PAIR, kind=[2, 1]), False, True),
    "another colour": (ALONE, changed(ALONE, colour=[3]), False, False),
    "a jump": (ALONE, changed(ALONE, start=[[0.3, 0.55]]), True, False),
    "gone": (make_scene(BESIDE, DISC), make_scene(BESIDE), False, False),
    "appears": (make_scene(BESIDE), make_scene(BESIDE, DISC), False, False),
    "one too many": (THREE, THREE, False, True),
    "nothing": (OUTSIDE, OUTSIDE, False, False),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_planted_damage_costs_what_it_should(damage: str, judge: SceneJudge) -> None:
    first, then, named, path = DAMAGE[damage]
    clips = joined(rendered([first], FRAMES), rendered([then], FRAMES))
    assert judge_clips(clips, judge=judge) == {"named": named, "path": path}


def test_damage_of_the_second_clip_is_the_second_clip_s(judge: SceneJudge) -> None:
    """Two clips, and the second of another scene: each is good for itself, but nothing holds across their border."""
    two = joined(
        rendered([PAIR, PAIR], 32), rendered([PAIR, make_scene(("ring", "pink", (0.5, 0.5), (0.03, 0.03), True))], 32)
    )
    assert judge_clips(two, length=16, judge=judge) == {
        "named": 1.0, "path": 1.0, "second_named": 0.5, "second_path": 0.5,
    }  # fmt: skip


def frozen(clips: Tensor) -> Tensor:
    return clips[:, :, :1].expand_as(clips)


def stopped(clips: Tensor) -> Tensor:
    half = clips.shape[2] // 2
    return torch.cat([clips[:, :, :half], frozen(clips[:, :, half:])], dim=2)


@pytest.mark.parametrize("still", [frozen, stopped])
def test_what_rests_is_named_but_on_no_path(still: object, judge: SceneJudge) -> None:
    clips = still(rendered([PAIR], FRAMES))  # type: ignore[operator]
    assert judge_clips(clips, judge=judge) == {"named": 1.0, "path": 0.0}


def test_what_is_blurred_beyond_recognition_has_no_name(judge: SceneJudge) -> None:
    clips = rendered(held_out(40), FRAMES)
    assert judge_clips(blurred(clips), judge=judge)["named"] < 0.1


@pytest.mark.parametrize("stride", [1, 2])
def test_no_motion_of_the_scenes_is_taken_for_damage(stride: int) -> None:
    """By a judge without errors: whatever the scenes do at borders and behind each other, at any stride."""
    scores = clip_scores(truth(held_out(150), 32, stride), FRAMES, stride)
    assert {name: float(values.min()) for name, values in scores.items()} == {
        "named": 1.0, "path": 1.0, "second_named": 1.0, "second_path": 1.0,
    }  # fmt: skip


def test_real_clips_have_nearly_full_marks_and_none_where_halves_are_swapped(judge: SceneJudge) -> None:
    clips = rendered(held_out(100), 32)
    real = judge_clips(clips, length=FRAMES, judge=judge)
    assert real["path"] >= 0.96 and real["second_path"] >= 0.93
    assert real["named"] >= 0.9 and real["second_named"] >= 0.86, "docs/evaluation.md says what was wanted"
    swapped = judge_clips(joined(clips, clips.roll(1, 0)), length=FRAMES, judge=judge)
    assert swapped["named"] == real["named"] and max(swapped["second_named"], swapped["second_path"]) <= 0.05


def test_other_sizes_and_forms_get_the_same_marks(judge: SceneJudge) -> None:
    clips = rendered([PAIR, FROM_BORDER], FRAMES, side=64)
    full = {"named": 1.0, "path": 1.0}
    assert judge_clips(clips, judge=judge) == full
    assert judge_clips(clips.float() / 127.5 - 1, judge=judge) == full
    assert judge_clips(rendered([PAIR], FRAMES, stride=2), stride=2, judge=judge) == full
    wide = changed(PAIR, extent=[1.0, 1.5]).render(FRAMES, 32, 48)
    assert judge_clips(torch.from_numpy(wide).permute(3, 0, 1, 2)[None], judge=judge) == full


def test_objects_of_the_class_asked_for(judge: SceneJudge) -> None:
    scenes = [draw_scene(generator("class", number)) for number in range(12)]
    clips = torch.from_numpy(np.stack([scene.render(4, 32, 32) for scene in scenes])).permute(0, 4, 1, 2, 3)
    seen, classes = see(judge, clips), [scene.label for scene in scenes]
    right, objects = of_class(seen, classes).sum(0).tolist()
    assert objects >= 40 and right / objects > 0.97
    others = [KINDS[KINDS.index(name) - 1] for name in classes]
    assert of_class(seen, others).sum(0)[0] <= 0.03 * objects
    assert torch.equal(of_class(seen, others)[:, 1], kinds_right(seen, seen)[:, 1]), "the same objects count"


def test_kinds_right_counts_objects(judge: SceneJudge) -> None:
    original = rendered([PAIR, PAIR], FRAMES)
    assert judge_clips(original, originals=original, judge=judge)["kinds_right"] == 1
    half = rendered([PAIR, changed(PAIR, kind=[2, 1])], FRAMES)  # one of two objects in one of two clips
    assert judge_clips(half, originals=original, judge=judge)["kinds_right"] == 0.75
    counts = kinds_right(see(judge, original), see(judge, half))
    assert counts.tolist() == [[32, 32], [16, 32]]
    empty = rendered([OUTSIDE], FRAMES)
    assert math.isnan(judge_clips(empty, originals=empty, judge=judge)["kinds_right"])


@pytest.mark.slow
def test_the_distance_notices_kinds_colours_and_motion(judge: SceneJudge) -> None:
    scenes = held_out(240)
    clips = rendered(scenes, FRAMES)
    real, other = clips[:120], clips[120:]

    def distance(made: Tensor) -> float:
        return judge_clips(made, real=real, judge=judge)["frechet_distance"]

    level = distance(other)
    of_two_kinds = rendered([changed(scene, kind=scene.kind % 2) for scene in scenes[120:]], FRAMES)
    of_two_colours = rendered([changed(scene, colour=np.arange(len(scene.kind))) for scene in scenes[120:]], FRAMES)
    shuffled = other[:, :, torch.randperm(FRAMES, generator=torch.Generator().manual_seed(0))]
    assert distance(real) == pytest.approx(0, abs=1e-6)
    for made in (of_two_kinds, of_two_colours, frozen(other), shuffled, blurred(other)):
        assert distance(made) > 2 * level
    assert clip_features(see(judge, real[:2])).shape == (2, CLIP_FEATURES)


def test_other_forms_are_refused(judge: SceneJudge) -> None:
    clips = rendered([PAIR], 4)
    for wrong in (clips[0], clips.transpose(1, 2), clips.int()):
        with pytest.raises(ValueError, match=r"clips must be \(N, 3, T, H, W\)"):
            judge_clips(wrong, judge=judge)
    with pytest.raises(ValueError, match="from 1 to the clips' 4 frames, not 5"):
        judge_clips(clips, length=5, judge=judge)
