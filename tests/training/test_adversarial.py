"""The autoencoder's second phase: its gradients, nothing changes before it starts, resuming, precision, mistakes."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import tolerances
import torch
from accelerate import Accelerator
from comparison import assert_close
from lpips_weights import random_backbone, random_heads
from training.small import SMALL, losses, pictures, same_weights, steps, weights

from pvdm_fast.errors import UserError
from pvdm_fast.jobs.share import Share
from pvdm_fast.losses.patchgan import frames_of
from pvdm_fast.train import main
from pvdm_fast.training import checkpoint, trainer
from pvdm_fast.training.adversarial import SecondPhaseStage
from pvdm_fast.training.building import make_autoencoder
from pvdm_fast.training.config import make_config
from pvdm_fast.training.trainer import step_generator

GAN = ["--stage", "autoencoder", "--adversarial-channels", "2", "--adversarial-start"]


def train(run: Path, *arguments: str) -> int:
    return main([*SMALL, *arguments, "--run", str(run)])


def records(run: Path) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in record.items() if name != "seconds"} for record in found]


@pytest.fixture(scope="module")
def lpips_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("lpips") / "vgg16.pth"
    torch.save({**random_backbone(), **random_heads()}, path)
    return path


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("gan") / "run"
    with pictures(drawn=True):
        assert train(run, *steps(8), *GAN, "3") == 0
    return run


def make_stage(lpips: Path | None = None, **adversarial: Any) -> SecondPhaseStage:
    options = {"start": 0, "channels": 2, "norm": "none", **adversarial}
    config = make_config(
        {
            "video.frames": 4,
            "video.height": 16,
            "video.width": 24,
            "autoencoder.patch_size": 8,
            "autoencoder.channels": 16,
            "autoencoder.depth": 1,
            "autoencoder.latent_channels": 4,
            "autoencoder.latent_noise": 0.2,
            "lpips_weights": str(lpips) if lpips else None,
            **{f"adversarial.{name}": value for name, value in options.items()},
        }
    )
    torch.manual_seed(0)
    stage = SecondPhaseStage(config, make_autoencoder(config))
    stage.prepare(Accelerator(cpu=True))
    stage.before_step(0)
    return stage


@pytest.mark.parametrize("adaptive", [True, False])
def test_gradients_are_those_of_the_written_out_loss(adaptive: bool, lpips_file: Path) -> None:
    """L2 x 16 + LPIPS x 4 + weight x ratio x (hinge + matching x 4), differentiated at once."""
    stage = make_stage(lpips_file, adaptive=adaptive, weight=0.7)
    assert stage.adversary is not None and stage.lpips is not None
    model, video = stage.model, torch.rand(2, 3, 4, 16, 24) * 2 - 1
    loss = stage.loss(model, video, step_generator(0))
    loss.backward()
    actual = {
        name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None
    }
    model.zero_grad()

    generator = step_generator(0)
    noise = stage.options.latent_noise * torch.randn(
        2, model.config.latent_channels, model.layout.num_tokens, generator=generator
    )
    frames = torch.randint(4, (2,), generator=generator)
    sample = model(video, noise).sample
    others = 16 * (sample - video).square().mean()
    others = others + 4 * stage.lpips(frames_of(sample, frames), frames_of(video, frames)).mean()
    terms = stage.adversary.nets.generator_terms(sample, video, frames)
    judged = terms.hinge + 4 * terms.feature_matching
    last = model.to_pixel["1"].weight
    norms = [torch.autograd.grad(value, last, retain_graph=True)[0].norm() for value in (others, judged)]
    ratio = (norms[0] / norms[1]).item() if adaptive else 1.0
    expected = others + 0.7 * ratio * judged
    expected.backward()
    assert_close(loss, expected, tolerances.FLOAT32_ERROR, "loss")
    assert stage.measured()["adversarial_weight"].item() == pytest.approx(0.7 * ratio, rel=1e-4)
    assert len(actual) == len(list(model.parameters()))
    for name, parameter in model.named_parameters():
        assert_close(actual[name], parameter.grad, tolerances.SECOND_PHASE_GRADIENT, name)


def test_discriminators_learn_from_every_batch_and_are_clipped_to_1() -> None:
    """Two half batches give their mean. A gradient longer than 1 is shortened, for each network separately."""
    stage = make_stage()
    adversary = stage.adversary
    assert adversary is not None
    stage.options.accumulate = 2
    videos = [torch.rand(2, 3, 4, 16, 24) * 2 - 1 for _ in range(2)]
    for number, video in enumerate(videos):
        stage.loss(stage.model, video, step_generator(number)).backward()
        stage.after_backward()
    parameters = list(adversary.nets.parameters())
    found = [parameter.grad.clone() for parameter in parameters]
    adversary.nets.zero_grad()
    total = torch.zeros(())
    for number, video in enumerate(videos):
        generator = step_generator(number)
        fake = stage.model(video, *stage.latent_noise(2, generator, Share())).sample.detach()
        total = total + adversary.nets(video, fake, torch.randint(4, (2,), generator=generator)).loss / 2
    total.backward()
    for gradient, parameter in zip(found, parameters, strict=True):
        assert_close(gradient, parameter.grad, tolerances.SECOND_PHASE_GRADIENT)
        parameter.grad.mul_(1e6)
    before = [parameter.detach().clone() for parameter in parameters]
    adversary.step(adversary.clip(1.0, adversary.nets.image, adversary.nets.clip).item())
    for net in (adversary.nets.image, adversary.nets.clip):
        norm = torch.stack([parameter.grad.norm() for parameter in net.parameters()]).norm()
        assert norm.item() == pytest.approx(1, rel=1e-4)
    assert all(not torch.equal(old, new) for old, new in zip(before, parameters, strict=True))


@pytest.mark.slow
def test_until_it_starts_nothing_is_different(finished: Path, uninterrupted: Path) -> None:
    """Losses and weights are bit-identical to those of a run without this phase."""
    assert losses(uninterrupted, "autoencoder")[:3] == losses(finished, "autoencoder")[:3]
    assert losses(uninterrupted, "autoencoder")[3:] != losses(finished, "autoencoder")[3:]
    for record in records(uninterrupted)[:8]:
        assert ("d_loss" in record) == (record["step"] > 3)
        assert all(math.isfinite(value) for name, value in record.items() if name != "stage")
    assert (uninterrupted / "loss.png").stat().st_size > 0


@pytest.mark.slow
@pytest.mark.parametrize("stop", [2, 5])
def test_resuming_is_going_on(stop: int, uninterrupted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed before or after the start, discriminators and their optimizer continue exactly."""
    run = tmp_path / "run"
    original = trainer.Trainer.train_step

    def killed(self: trainer.Trainer, batches: list) -> dict:
        if self.progress.step == stop + 1:
            raise KeyboardInterrupt
        return original(self, batches)

    with monkeypatch.context() as patch:
        patch.setattr(trainer.Trainer, "train_step", killed)
        assert train(run, *steps(8), *GAN, "3", "--save-every", str(stop)) == 130
    torch.manual_seed(1234)
    assert main(["--resume", str(run), "--save-every", "100"]) == 0
    assert records(run) == records(uninterrupted)
    assert same_weights(run, uninterrupted, "autoencoder")
    states = []
    for folder in (run, uninterrupted):
        newest, _ = checkpoint.newest_good(folder / "checkpoints")
        assert newest is not None
        states.append(checkpoint.load(newest)["stage"]["adversary"])
    torch.testing.assert_close(states[0], states[1], rtol=0, atol=0)


@pytest.mark.slow
def test_it_can_be_switched_on_on_resuming(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = tmp_path / "run"
    original = trainer.Trainer.train_step

    def killed(self: trainer.Trainer, batches: list) -> dict:
        if self.progress.step == 3:
            raise KeyboardInterrupt
        return original(self, batches)

    with monkeypatch.context() as patch:
        patch.setattr(trainer.Trainer, "train_step", killed)
        options = ["--stage", "autoencoder", "--adversarial-channels", "2", "--save-every", "2"]
        assert train(run, *steps(5), *options) == 130
    assert main(["--resume", str(run), "--adversarial-start", "3"]) == 0
    assert [("d_loss" in record) for record in records(run) if "loss" in record] == [False] * 3 + [True] * 2


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.slow
def test_16_bits_with_everything(precision: str, lpips_file: Path, tmp_path: Path) -> None:
    """LPIPS, both discriminators, the penalty, and accumulated batches."""
    run = tmp_path / "run"
    options = ["--lpips-weights", str(lpips_file), "--adversarial-norm", "spectral", "--adversarial-r1", "0.1"]
    precise = ["--mixed-precision", precision, "--autoencoder-accumulate", "2"]
    assert train(run, *steps(4), *GAN, "1", *options, *precise) == 0
    found = records(run)
    for record in found[1:4]:
        assert all(isinstance(value, float) and math.isfinite(value) for value in list(record.values())[2:]), record
        assert record["lpips"] > 0 and record["r1"] > 0 and 0 < record["d_gradient_norm"] < 1e4
    assert found[-1]["lpips"] > 0 and found[-1]["psnr"] > 3
    assert all(tensor.dtype == torch.float32 for tensor in weights(run, "autoencoder").values())


def test_other_lpips_weights_are_refused_on_resuming(lpips_file: Path) -> None:
    stage = make_stage(lpips_file, start=None)
    state = stage.state()
    stage.restore(state)
    stage.lpips.features[0].bias.add_(1)  # type: ignore[union-attr, index, operator]
    with pytest.raises(UserError, match="other weights than the run began with"):
        stage.restore(state)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--adversarial-start", "4"], "--adversarial-start 4 is never reached in 4 steps: raise --autoencoder-steps"),
        (["--adversarial-start", "1", "--adversarial-r1", "1"], "--adversarial-r1 needs --adversarial-norm spectral"),
        (["--adversarial-start", "1", "--fsdp"], "choose --no-adversarial-adaptive"),
        (["--adversarial-norm", "group"], "--adversarial-norm must be one of batch, spectral, none, not 'group'"),
        (["--lpips-weights", "/no/vgg.pth"], "there is no file /no/vgg.pth for --lpips-weights"),
        (
            ["--lpips-weights", "x", "--autoencoder-patch-size", "4", "--width", "12"],
            "at least 16 x 16 pixels, not 16x12",
        ),
    ],
)
def test_mistakes_are_one_sentence(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    assert train(run, *steps(4), *arguments) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not run.exists()
