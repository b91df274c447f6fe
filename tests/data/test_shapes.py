"""The rendered scenes: moving objects, reproducible, and alike at every size."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from pvdm_fast.data import DataError, find_classes, open_dataset
from pvdm_fast.data.draws import generator
from pvdm_fast.data.shapes import BACKDROPS, COLOURS, KINDS, MAX_OBJECTS, PALETTE, RECIPE, draw_scene

SIZE = {"frames": 8, "height": 32, "width": 32}


def test_length_and_description() -> None:
    assert len(open_dataset("synthetic:shapes", **SIZE)) == 4096
    test = open_dataset("synthetic:shapes", **SIZE, split="test")
    assert len(test) == 256
    assert "synthetic:shapes" in test.description


def test_scenes_change_only_with_their_recipe() -> None:
    """If this fails because you draw other scenes, raise RECIPE, which results and cached latents are kept by."""
    drawn = [draw_scene(generator("pinned", number)) for number in range(4)]
    assert RECIPE == 3
    assert [scene.kind.tolist() for scene in drawn] == [[0, 0], [2], [1], [1, 1]]
    assert [scene.colour.tolist() for scene in drawn] == [[0, 1], [3], [4], [0, 5]]
    assert [scene.bounces.tolist() for scene in drawn] == [[False, True], [False], [False], [True, True]]
    np.testing.assert_allclose([scene.radius[0] for scene in drawn], [0.238, 0.223, 0.254, 0.237], atol=6e-4)
    np.testing.assert_allclose(drawn[1].start, [[0.351, 0.253]], atol=6e-4)
    brightness = [scene.render(4, 32, 32).mean() for scene in drawn]
    np.testing.assert_allclose(brightness, [70.31, 29.19, 63.45, 67.43], atol=0.02)
    for split in ("train", "test"):
        assert "recipe 3" in open_dataset("synthetic:shapes", **SIZE, split=split).description


@pytest.mark.parametrize(
    ("frames", "height", "width"), [(1, 32, 32), (8, 16, 16), (5, 33, 47), (32, 64, 40), (3, 8, 90)]
)
def test_any_size(frames: int, height: int, width: int) -> None:
    item = open_dataset("synthetic:shapes", frames=frames, height=height, width=width)[3]
    assert item["video"].shape == (3, frames, height, width)
    assert item["video"].dtype == torch.float32
    assert item["video"].abs().max() <= 1


def test_a_draw_is_the_same_again_and_all_draws_differ() -> None:
    left, right = (open_dataset("synthetic:shapes", **SIZE, flip=True) for _ in range(2))
    clips = [left[draw]["video"] for draw in range(30)] + [left[4096 + draw]["video"] for draw in range(30)]
    assert torch.equal(clips[7], right[7]["video"])
    assert len({clip.numpy().tobytes() for clip in clips}) == 60


def test_seeds_and_splits_differ_and_the_test_split_repeats() -> None:
    test = open_dataset("synthetic:shapes", **SIZE, split="test", flip=True)
    assert torch.equal(test[5]["video"], test[256 + 5]["video"])
    others = [open_dataset("synthetic:shapes", **SIZE, seed=1), open_dataset("synthetic:shapes", **SIZE)]
    assert all(not torch.equal(test[5]["video"], other[5]["video"]) for other in others)


def test_flip_mirrors_some_training_clips() -> None:
    plain, flipped = (open_dataset("synthetic:shapes", **SIZE, flip=flip) for flip in (False, True))
    same = [torch.equal(plain[draw]["video"], flipped[draw]["video"]) for draw in range(40)]
    mirrored = [torch.equal(plain[draw]["video"].flip(-1), flipped[draw]["video"]) for draw in range(40)]
    assert all(a != b for a, b in zip(same, mirrored, strict=True))
    assert 10 < sum(mirrored) < 30


def test_a_longer_clip_continues_the_shorter_one() -> None:
    short = open_dataset("synthetic:shapes", **SIZE)[9]["video"]
    long = open_dataset("synthetic:shapes", **{**SIZE, "frames": 16})[9]["video"]
    strided = open_dataset("synthetic:shapes", **SIZE, stride=2)[9]["video"]
    assert torch.equal(long[:, :8], short)
    assert torch.equal(long[:, ::2], strided)


@pytest.mark.parametrize("aspect", [1.0, 2.0, 0.4])
def test_motion_is_steady_and_each_object_has_its_own(aspect: float) -> None:
    for seed in range(40):
        scene = draw_scene(generator(seed), aspect)
        assert 1 <= len(scene.kind) <= MAX_OBJECTS
        assert len(np.unique(scene.velocity.round(6), axis=0)) == len(scene.kind)
        places = scene.positions(np.arange(400))
        steps = np.abs(np.diff(places, axis=0))
        speed = np.abs(scene.velocity)
        inside = (places >= scene.radius[:, None] - 1e-9) & (places <= scene.extent - scene.radius[:, None] + 1e-9)
        assert inside[:, scene.bounces].all()
        assert (steps <= speed + 1e-9)[:, scene.bounces].all()  # slower only in the step that turns at a wall
        away = (places < -scene.radius[:, None] + speed) | (places > scene.extent + scene.radius[:, None] - speed)
        jumps = steps > speed + 1e-9
        assert (away[:-1] | ~jumps).all()  # objects that cross the frame jump only while out of sight
        assert (np.abs(steps - speed) < 1e-9).mean() > 0.8


def test_nearer_objects_hide_farther_ones() -> None:
    scene = next(scene for scene in map(draw_scene, map(generator, range(20))) if len(scene.kind) == 2)
    together = dataclasses.replace(
        scene, kind=np.zeros(2, int), start=np.full((2, 2), 0.5), radius=np.array([0.3, 0.1]), bounces=np.full(2, True)
    )
    frame = together.render(1, 64, 64)[0] / 255
    assert np.abs(frame[32, 32] - PALETTE[scene.colour[1]]).max() < 0.01
    assert np.abs(frame[32, 46] - PALETTE[scene.colour[0]]).max() < 0.01
    assert np.abs(frame[0, 0] - scene.backdrop).max() < 0.01


def test_every_kind_colour_and_backdrop_is_drawn_and_two_objects_never_share_a_colour() -> None:
    scenes = [draw_scene(generator(seed)) for seed in range(200)]
    assert {int(kind) for scene in scenes for kind in scene.kind} == set(range(len(KINDS)))
    assert {int(colour) for scene in scenes for colour in scene.colour} == set(range(len(COLOURS)))
    assert len({tuple(scene.backdrop) for scene in scenes}) == len(BACKDROPS)
    assert all(len(set(scene.colour)) == len(scene.kind) for scene in scenes)
    assert 45 < sum(len(scene.kind) == 2 for scene in scenes) < 95


def test_all_objects_of_a_scene_are_of_its_class() -> None:
    scenes = [draw_scene(generator(seed)) for seed in range(100)]
    assert all({KINDS[int(kind)] for kind in scene.kind} == {scene.label} for scene in scenes)
    clip = open_dataset("synthetic:shapes", frames=4, height=8, width=8)[3]
    assert clip["label"] == draw_scene(generator("synthetic:shapes", "train", 0, 3)).label
    assert find_classes(Path("synthetic:shapes")) == sorted(KINDS)


@pytest.mark.parametrize("kind", range(len(KINDS)), ids=KINDS)
def test_shapes_look_alike_at_every_size_and_have_smooth_edges(kind: int) -> None:
    scene = draw_scene(generator(1))
    one = dataclasses.replace(
        scene,
        kind=np.array([kind]),
        radius=np.array([0.3]),
        start=np.array([[0.5, 0.5]]),
        velocity=np.zeros((1, 2)),
        bounces=np.array([True]),
        colour=np.array([COLOURS.index("white")]),
        backdrop=np.zeros(3),
    )
    small, large = (one.render(1, side, side)[0, ..., 0].astype(float) for side in (32, 128))
    averaged = large.reshape(32, 4, 32, 4).mean((1, 3))
    assert np.abs(averaged - small).mean() < 3
    assert np.abs(averaged - small).max() < 80
    assert ((small > 20) & (small < 235)).sum() >= 8
    assert abs((small > 127).mean() - (large > 127).mean()) < 0.02


def test_frames_change_and_the_backdrop_is_plain() -> None:
    dataset = open_dataset("synthetic:shapes", **SIZE)
    for draw in range(20):
        video = dataset[draw]["video"]
        assert (video.diff(dim=1).abs().amax((0, 2, 3)) > 0.1).all()
        assert video.diff(dim=-1).abs().median() == 0


def test_unknown_synthetic_data_is_refused() -> None:
    with pytest.raises(DataError, match='there is "synthetic:shapes"'):
        open_dataset("synthetic:worms", **SIZE)


def test_rendering_is_quick() -> None:
    dataset = open_dataset("synthetic:shapes", frames=16, height=32, width=32)
    rates = []
    for attempt in range(3):
        start = time.process_time()
        for draw in range(30):
            dataset[30 * attempt + draw]
        rates.append(30 / (time.process_time() - start))
    assert max(rates) > 150  # about 2,000 per second of CPU time


def test_visible_shares_are_what_the_border_and_nearer_objects_leave() -> None:
    scene = next(scene for scene in map(draw_scene, map(generator, range(20))) if len(scene.kind) == 2)
    two = dataclasses.replace(
        scene,
        kind=np.full(2, KINDS.index("square")),
        radius=np.full(2, 0.2),
        start=np.array([[0.5, 0.3], [0.5, 0.9]]),
        velocity=np.array([[0.0, 0.15], [0.0, 0.1]]),
        bounces=np.full(2, False),
    )
    shares = two.visible(2, 64, 64)  # squares of side 0.3: the nearer one sticks out by 0.05, then by 0.15
    assert np.abs(shares - [[1, 5 / 6], [1, 0.5]]).max() < 0.02
    hidden = dataclasses.replace(two, start=np.array([[0.5, 0.5], [0.5, 0.6]])).visible(1, 64, 64)
    assert np.abs(hidden - [[1 / 3, 1]]).max() < 0.02
    gone = dataclasses.replace(two, start=np.array([[0.5, -0.2], [0.5, 0.5]])).visible(1, 64, 64)
    assert np.abs(gone - [[0, 1]]).max() < 0.02
