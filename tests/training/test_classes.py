"""Classes, from file names to samples that follow them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from comparison import assert_close
from filling import randomised
from tolerances import FLOAT32_ERROR
from torch import Tensor

from pvdm_fast.data import find_classes
from pvdm_fast.data.errors import DataError
from pvdm_fast.data.layouts import find_videos
from pvdm_fast.diffusion.sampling import NoiseSource, sample_latents
from pvdm_fast.diffusion.schedulers import make_scheduler
from pvdm_fast.errors import UserError
from pvdm_fast.models import Autoencoder, Denoiser
from pvdm_fast.models.release import CheckpointError, to_release
from pvdm_fast.training.config import make_config
from pvdm_fast.training.stages import DiffusionStage

SIZES: dict[str, Any] = dict(
    time=2, height=2, width=2, model_channels=32, channel_mult=[1], num_res_blocks=1, num_heads=2
)
AUTOENCODER = dict(frames=2, height=8, width=8, patch_size=4, channels=16, depth=1, num_heads=1, head_dim=8)
NAMES = ["dark", "bright"]


def make_stage(dropout: float = 0.1) -> DiffusionStage:
    denoiser = Denoiser(**SIZES, prediction="v", num_classes=2, class_names=NAMES)
    return DiffusionStage(make_config({"diffusion.class_dropout": dropout}), Autoencoder(**AUTOENCODER), denoiser)


def brightness(video: Tensor) -> Tensor:
    """A stand-in encoder: every value of a latent (b, 4, 12) is the mean of its clip."""
    return video.flatten(1).mean(1)[:, None, None].expand(-1, 4, 12)


@pytest.mark.slow
def test_samples_follow_the_class_they_were_trained_with(monkeypatch: pytest.MonkeyPatch) -> None:
    """Clips of one class are dark, those of the other bright. After training, so are each class's samples.

    Without a class, both kinds appear.
    """
    stage = make_stage()
    monkeypatch.setattr(stage, "_encode", brightness)
    optimizer = torch.optim.AdamW(stage.model.parameters(), lr=3e-3)
    generator = torch.Generator().manual_seed(0)
    names = NAMES * 8
    video = torch.tensor([-0.7, 0.7] * 8)[:, None, None, None, None].expand(-1, 3, 4, 8, 8)
    for _ in range(200):
        loss = stage.loss(stage.model, video, generator, classes=names)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    stage.model.eval()

    def means(label: int) -> Tensor:
        latents = sample_latents(
            stage.model,
            make_scheduler("ddim"),
            (16, 4, 12),
            steps=10,
            noise=NoiseSource(0),
            labels=torch.full((16,), label),
        )
        return latents.mean(dim=(1, 2))

    assert (means(0) < -0.4).all() and (means(1) > 0.4).all()
    without = means(2)
    assert (without < -0.4).any() and (without > 0.4).any()


def test_a_share_of_the_labels_is_dropped_in_training_only() -> None:
    stage = make_stage(dropout=0.25)
    generator = torch.Generator().manual_seed(0)
    names: list[str | None] = ["bright"] * 3000 + [None] * 1000
    labels = stage._labels(names, 4000, generator)
    assert labels is not None
    assert (labels[3000:] == 2).all(), "clips without a class have that of none"
    assert set(labels[:3000].tolist()) == {1, 2}
    assert 0.22 < (labels[:3000] == 2).float().mean() < 0.28
    stage.model.eval()
    labels = stage._labels(names, 4000, generator)
    assert labels is not None and (labels[:3000] == 1).all()
    held_out = stage._labels(["dim", "bright"], 2, generator)
    assert held_out is not None and held_out.tolist() == [2, 1], "an unknown class ends no run at its first score"
    stage.model.train()
    with pytest.raises(UserError, match="classes that the denoiser doesn't know: dim"):
        stage._labels(["dim"], 1, generator)


def test_held_out_clips_are_scored_with_their_classes() -> None:
    stage = make_stage()
    randomised(stage.model).eval()  # its last layer is zero at first, and no class would tell
    video = torch.rand(2, 3, 4, 8, 8)
    with torch.no_grad():
        scores = [stage.score([(video, names)])["held_out_loss"] for names in (NAMES, NAMES[::-1], None)]
        expected = stage.loss(stage.model, video, torch.Generator().manual_seed(0), classes=NAMES).item()
    assert scores[0] == pytest.approx(expected, abs=1e-6)
    assert len(set(scores)) == 3


def test_without_classes_nothing_is_drawn_or_passed() -> None:
    """A default model's loss is the same with and without names, because labels draw no random numbers."""
    stage = DiffusionStage(make_config({}), Autoencoder(**AUTOENCODER), Denoiser(**SIZES))
    video = torch.rand(2, 3, 4, 8, 8)
    losses = [
        stage.loss(stage.model, video, torch.Generator().manual_seed(1), classes=names) for names in (None, NAMES)
    ]
    assert torch.equal(*losses)
    assert not any("class" in name for name in stage.model.state_dict())


def test_the_embedding_of_none_is_the_default() -> None:
    model = randomised(Denoiser(**SIZES, num_classes=2))
    latent, times = torch.randn(2, 4, 12), torch.tensor([10, 500])
    assert torch.equal(model(latent, times).sample, model(latent, times, class_labels=torch.tensor([2, 2])).sample)
    mixed = model(latent, times, class_labels=torch.tensor([0, 2])).sample
    assert torch.equal(mixed[1], model(latent, times).sample[1])
    assert not torch.allclose(mixed[0], model(latent, times).sample[0], atol=1e-4)


def test_what_does_not_fit() -> None:
    latent = torch.zeros(2, 4, 12)
    with pytest.raises(ValueError, match="no classes, but class_labels were given"):
        Denoiser(**SIZES)(latent, 5, class_labels=torch.zeros(2, dtype=torch.long))
    with pytest.raises(ValueError, match=r"class_labels must be \(2,\)"):
        Denoiser(**SIZES, num_classes=2)(latent, 5, class_labels=torch.zeros(3, dtype=torch.long))
    with pytest.raises(ValueError, match="2 class names for 3 classes"):
        Denoiser(**SIZES, num_classes=3, class_names=NAMES)
    with pytest.raises(CheckpointError, match="or classes"):
        to_release(Denoiser(**SIZES, num_classes=2))


@pytest.mark.slow
def test_it_compiles_to_one_graph_and_samples_the_same() -> None:
    """With classes, positions and prediction v, by the pass that sampling takes."""
    torch._dynamo.reset()
    model = Denoiser(**SIZES, positions=True, prediction="v", num_classes=2).eval()
    torch.nn.init.normal_(model.out["2"].weight, std=0.1)
    options: dict[str, Any] = dict(steps=3, condition=torch.rand(2, 4, 12), labels=torch.tensor([0, 1]), guidance=1.0)

    def sample() -> Tensor:
        return sample_latents(model, make_scheduler("dpm++"), (2, 4, 12), noise=NoiseSource(0), **options)

    expected = sample()
    model.compile(fullgraph=True, backend="aot_eager")
    assert_close(sample(), expected, FLOAT32_ERROR)


def test_classes_are_numbered_as_ucf_101_does(tmp_path: Path) -> None:
    """Hammering before HammerThrow: alphabetical, ignoring case."""
    for label in ("YoYo", "HammerThrow", "Hammering", "Archery"):
        (tmp_path / label).mkdir()
        for group in (1, 2):
            (tmp_path / label / f"v_{label}_g{group:02}_c01.avi").write_bytes(b"")
    assert find_classes(tmp_path) == ["Archery", "Hammering", "HammerThrow", "YoYo"]
    assert {video.label for video in find_videos(tmp_path, "train").videos} <= set(find_classes(tmp_path))
    (tmp_path / "other.mp4").write_bytes(b"")
    with pytest.raises(DataError, match="no classes in"):
        find_classes(tmp_path)
