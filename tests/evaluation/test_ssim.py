"""SSIM is scikit-image's."""

from __future__ import annotations

import pytest
import torch

from pvdm_fast.evaluation.ssim import ssim


@pytest.mark.parametrize(("height", "width"), [(11, 11), (16, 24), (45, 33)])
def test_it_is_scikit_image_s(height: int, width: int) -> None:
    metrics = pytest.importorskip("skimage.metrics", reason="scikit-image is not installed: pip install scikit-image")
    smooth = torch.rand(2, 3, 4, height // 4 + 1, width // 4 + 1)
    clean = torch.nn.functional.interpolate(smooth.flatten(1, 2), (height, width)).view(2, 3, 4, height, width) * 2 - 1
    noisy = (clean + 0.3 * torch.randn_like(clean)).clamp(-1, 1)
    noisy[1] = 0  # flat, without any variance
    ours = ssim(noisy, clean)
    for clip in range(2):
        values = [
            metrics.structural_similarity(
                clean[clip, colour, time].double().numpy(),
                noisy[clip, colour, time].double().numpy(),
                data_range=2,
                gaussian_weights=True,
                sigma=1.5,
                use_sample_covariance=False,
            )
            for colour in range(3)
            for time in range(4)
        ]
        assert float(ours[clip]) == pytest.approx(sum(values) / len(values), abs=1e-12)
    assert 0 < ours[1] < ours[0] < 1


def test_equal_videos_have_one() -> None:
    video = torch.rand(2, 3, 2, 12, 15)
    assert torch.allclose(ssim(video, video), torch.ones(2, dtype=torch.float64))


def test_small_frames_and_other_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match="11 x 11 at least"):
        ssim(torch.zeros(1, 3, 1, 10, 20), torch.zeros(1, 3, 1, 10, 20))
    with pytest.raises(ValueError, match="one shape"):
        ssim(torch.zeros(1, 3, 1, 12, 12), torch.zeros(1, 3, 2, 12, 12))
