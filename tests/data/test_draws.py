"""Windows, crops, orders and splits are pure arithmetic, the same in every process."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from pvdm_fast.data.draws import View, crop_box, draw_window, epoch_order, generator, is_held_out, stable_hash
from pvdm_fast.data.errors import UnreadableVideo

sides = st.integers(1, 5000)
fractions = st.floats(0, 1, exclude_max=True)


@settings(deadline=None)
@given(total=st.integers(1, 400), frames=st.integers(1, 40), stride=st.integers(1, 9), seed=st.integers(0, 99))
def test_a_window_fits_the_video_and_keeps_the_stride_where_it_can(
    total: int, frames: int, stride: int, seed: int
) -> None:
    assume(total >= frames)
    window = draw_window(total, frames, stride, generator(seed))
    assert len(window.indices) == frames
    assert window.indices[0] >= 0
    assert window.indices[-1] < total
    assert window.stride <= stride
    if frames > 1:
        next_wider = (frames - 1) * (window.stride + 1) + 1
        assert window.stride == stride or next_wider > total


def test_every_window_is_drawn() -> None:
    starts = {draw_window(12, 4, 3, generator(seed)).start for seed in range(60)}
    assert starts == {0, 1, 2}


@pytest.mark.parametrize("total", [0, 1, 7])
def test_too_short_for_stride_one_is_refused(total: int) -> None:
    with pytest.raises(UnreadableVideo, match=f"{total} frame.*needs 8"):
        draw_window(total, 8, 2, generator(0))


@settings(deadline=None)
@given(source=st.tuples(sides, sides), target=st.tuples(sides, sides), down=fractions, right=fractions)
def test_a_crop_lies_inside_and_has_the_aspect_of_the_target(
    source: tuple[int, int], target: tuple[int, int], down: float, right: float
) -> None:
    top, left, height, width = crop_box(source, target, down, right)
    assert 0 <= top <= top + height <= source[0]
    assert 0 <= left <= left + width <= source[1]
    assert height == source[0] or width == source[1]
    scale = min(source[0] / target[0], source[1] / target[1])
    assert abs(height - max(target[0] * scale, 1)) <= 0.5 + 1e-6
    assert abs(width - max(target[1] * scale, 1)) <= 0.5 + 1e-6


@settings(deadline=None)
@given(source=st.tuples(sides, sides), target=st.tuples(sides, sides))
def test_the_middle_crop_is_central(source: tuple[int, int], target: tuple[int, int]) -> None:
    top, left, height, width = crop_box(source, target, 0.5, 0.5)
    assert abs(top - (source[0] - height - top)) <= 1
    assert abs(left - (source[1] - width - left)) <= 1


def test_crops_reach_both_edges() -> None:
    lefts = {crop_box((10, 13), (5, 5), 0.5, View.draw(generator(seed), flip=False).right)[1] for seed in range(60)}
    assert lefts == {0, 1, 2, 3}


def test_mirroring_happens_only_when_asked_and_half_of_the_time() -> None:
    assert not any(View.draw(generator(seed), flip=False).mirrored for seed in range(50))
    share = np.mean([View.draw(generator(seed), flip=True).mirrored for seed in range(400)])
    assert 0.4 < share < 0.6


@settings(deadline=None)
@given(count=st.integers(1, 300), seed=st.integers(0, 5), epoch=st.integers(0, 5))
def test_an_epoch_visits_every_video_once(count: int, seed: int, epoch: int) -> None:
    assert sorted(epoch_order(count, seed, epoch)) == list(range(count))


def test_epochs_and_seeds_differ() -> None:
    orders = {tuple(epoch_order(50, seed, epoch)) for seed in range(3) for epoch in range(3)}
    assert len(orders) == 9


@settings(deadline=None)
@given(keys=st.lists(st.text(max_size=8), min_size=2, max_size=60))
def test_the_hash_split_leaves_none_empty_and_keeps_equal_keys_together(keys: list[str]) -> None:
    held_out = is_held_out(keys)
    by_key: dict[str, set[bool]] = {}
    for key, test in zip(keys, held_out, strict=True):
        by_key.setdefault(key, set()).add(test)
    assert all(len(sides) == 1 for sides in by_key.values())
    if len(by_key) > 1:
        assert any(held_out)
        assert not all(held_out)


def test_the_hash_split_holds_out_about_a_tenth() -> None:
    assert 0.08 < np.mean(is_held_out([f"clip{number}.mp4" for number in range(3000)])) < 0.12


def test_unusable_videos_are_not_all_that_is_held_out() -> None:
    keys = [f"clip{number}.mp4" for number in range(6)]
    first = is_held_out(keys).index(True)
    asked: list[int] = []

    def usable(number: int) -> bool:
        asked.append(number)
        return number != first

    held_out = is_held_out(keys, usable)
    assert held_out[first]
    assert sum(held_out) == 2
    assert len(asked) == 2
    assert not all(is_held_out(keys, lambda number: False))


def test_a_video_stays_on_its_side_when_others_are_added() -> None:
    few = [f"clip{number}.mp4" for number in range(100)]
    assert is_held_out(few + [f"more{number}.mp4" for number in range(900)])[:100] == is_held_out(few)


def test_hashes_do_not_depend_on_the_process() -> None:
    code = "from pvdm_fast.data.draws import *; print(stable_hash('clip', 3, None), generator(1, 'x').integers(10**9))"
    here = f"{stable_hash('clip', 3, None)} {generator(1, 'x').integers(10**9)}"
    environment = {**os.environ, "PYTHONHASHSEED": "1" if os.environ.get("PYTHONHASHSEED") != "1" else "2"}
    other = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert other.stdout.strip() == here
