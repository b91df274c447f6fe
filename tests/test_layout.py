"""Layouts: offsets, resampling, splitting, and their errors."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pvdm_fast import TriplaneLayout
from pvdm_fast.layout import PlaneLayout

sizes = st.integers(1, 9)


@given(sizes, sizes, sizes)
def test_planes_fill_the_packed_axis(time: int, height: int, width: int) -> None:
    layout = TriplaneLayout(time, height, width)
    assert layout.num_tokens == height * width + time * width + time * height
    assert layout.num_lattice_tokens == time * height * width
    assert layout.planes == ((height, width), (time, width), (time, height))
    packed = torch.arange(layout.num_tokens)[None, :, None]
    assert torch.equal(torch.cat([p.flatten() for p in layout.split(packed)]), packed.flatten())
    assert layout.upsample(2).downsample(2) == layout
    assert layout.upsample(2).num_tokens == 4 * layout.num_tokens


@given(st.lists(st.tuples(sizes, sizes), min_size=1, max_size=4))
def test_free_planes(planes: list[tuple[int, int]]) -> None:
    layout = PlaneLayout(tuple(planes))
    assert PlaneLayout.from_sizes(layout.sizes) == layout
    assert layout.offsets[-1] == layout.num_tokens == sum(rows * columns for rows, columns in planes)


def test_release_layout() -> None:
    layout = TriplaneLayout(16, 32, 32)
    assert layout.offsets == (0, 1024, 1536, 2048)
    assert repr(layout) == "TriplaneLayout(time=16, height=32, width=32)"


@pytest.mark.parametrize("bad", [0, -1, 2.0, True, "3"])
def test_sizes_must_be_positive_whole_numbers(bad: object) -> None:
    with pytest.raises(ValueError, match=r"height is .* must be a whole number of at least 1"):
        TriplaneLayout(1, bad, 1)  # type: ignore[arg-type]


def test_odd_sizes_are_not_halved() -> None:
    with pytest.raises(ValueError, match=r"5 is not divisible by 2"):
        TriplaneLayout(4, 5, 6).downsample(2)


def test_wrong_number_of_tokens() -> None:
    with pytest.raises(ValueError, match=r"Got 10 tokens .* has 11"):
        TriplaneLayout(1, 2, 3).split(torch.zeros(1, 10, 4))


def test_no_planes() -> None:
    with pytest.raises(ValueError, match=r"needs planes"):
        PlaneLayout(())
