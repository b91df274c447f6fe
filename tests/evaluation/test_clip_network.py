"""The shipped feature network takes any clip, and its distances rank planted damage by its strength."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from evaluation import planted
from tolerances import FLOAT32_PIXELS

from pvdm_fast.errors import UserError
from pvdm_fast.evaluation import distances
from pvdm_fast.evaluation.clip_network import WEIGHTS, WIDTH, ClipFeatures, cut, prepare
from pvdm_fast.evaluation.distances import Distance

CPU = torch.device("cpu")
CLIPS = 128


@pytest.fixture(scope="module")
def features() -> ClipFeatures:
    return ClipFeatures(CPU)


@pytest.fixture(scope="module")
def real(features: ClipFeatures) -> torch.Tensor:
    return features(planted.rendered(planted.scenes(2 * CLIPS, seed=1)))


@pytest.mark.parametrize("name", planted.DAMAGE)
@pytest.mark.parametrize("distance", [distances.frechet, distances.kernel])
def test_more_damage_is_farther(
    distance: Callable[..., Distance],
    name: str,
    features: ClipFeatures,
    real: torch.Tensor,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """From intact clips to the greatest strength, which lies beyond the interval of the intact ones."""
    monkeypatch.setattr(distances, "REPLICATES", 20)
    damage, strengths = planted.DAMAGE[name]
    drawn = planted.scenes(CLIPS, seed=2)
    intact = distance(real, features(planted.rendered(drawn)))
    found = [distance(real, features(damage(drawn, strength))).value for strength in strengths]
    assert [intact.value, *found] == sorted([intact.value, *found])
    assert intact.low <= 0 and found[-1] > intact.high, (intact, found)


def test_any_size_and_length_is_taken(features: ClipFeatures) -> None:
    for shape in ((1, 16, 24), (8, 32, 32), (21, 70, 40)):
        assert features(torch.rand(2, 3, *shape) * 2 - 1).shape == (2, WIDTH)


def test_windows_cover_the_clip_evenly() -> None:
    clip = torch.arange(21.0).view(1, 1, 21, 1, 1)
    assert [window.flatten().tolist() for window in cut(clip)[0]] == [
        list(range(start, start + 8)) for start in (0, 4, 8, 12, 13)
    ]
    assert cut(clip[:, :, :8]).shape[1] == 1
    assert cut(clip[:, :, :3]).flatten().tolist() == [0, 1, 2, 2, 2, 2, 2, 2], "the last frame fills up a short clip"


def test_frames_are_prepared_as_stated() -> None:
    exact = torch.randint(0, 256, (1, 3, 2, 32, 32)) / 127.5 - 1
    assert torch.allclose(prepare(exact), exact, atol=FLOAT32_PIXELS), "8-bit frames of 32 x 32 stay what they are"
    assert torch.allclose(prepare(exact + 0.003), prepare(exact)), "other values are rounded to 8 bits"
    fine = torch.ones(1, 3, 1, 64, 64)
    fine[..., ::2] = -1
    assert prepare(fine)[..., 4:-4].abs().max() < 0.02, "what is finer than a pixel is averaged"


def test_features_do_not_depend_on_the_batch(features: ClipFeatures) -> None:
    video = torch.rand(5, 3, 120, 8, 8) * 2 - 1  # 29 windows a clip: two pieces
    together = features(video)
    assert torch.allclose(together, torch.cat([features(clip[None]) for clip in video]), atol=1e-4)


def test_weights_are_small_and_a_damaged_file_is_refused(tmp_path: Path) -> None:
    assert WEIGHTS.stat().st_size < 2e6
    damaged = tmp_path / "weights.safetensors"
    damaged.write_bytes(WEIGHTS.read_bytes()[:-100])
    with pytest.raises(UserError, match=r"weights.*cannot be read.*install pvdm_fast again"):
        ClipFeatures(CPU, damaged)
