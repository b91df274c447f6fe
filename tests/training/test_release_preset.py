"""``--preset release`` takes the steps of the authors' release: each stage against its training loop, written out.

The loops below follow `tools/trainer.py`, `losses/perceptual.py` and `losses/ddpm.py` of sihyun-yu/PVDM in plain
PyTorch, with PyTorch's own AdamW. They share networks, data and random draws with the trainer, and nothing else.

Denoiser and discriminators are in float64. Some of their gradients are 0 in exact arithmetic (biases before a norm, of
keys), and AdamW moves a weight by the learning rate for the rounding errors that float32 leaves there.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from data import films
from lpips_weights import random_backbone, random_heads
from torch import Tensor, nn
from torch.nn import functional as F

from pvdm_fast import evaluate, train
from pvdm_fast.data import write_video
from pvdm_fast.data.transforms import to_float
from pvdm_fast.losses.lpips import LPIPS
from pvdm_fast.losses.patchgan import Discriminators
from pvdm_fast.training.adversarial import SecondPhaseStage
from pvdm_fast.training.building import make_accelerator, make_autoencoder, make_denoiser
from pvdm_fast.training.config import OPTIONS, TrainConfig, get, make_config
from pvdm_fast.training.options import flag
from pvdm_fast.training.stages import DiffusionStage, Stage
from pvdm_fast.training.trainer import Trainer, step_generator

T, CLIPS, RATE = 4, 3, 1e-4
SIZES: dict[str, Any] = {
    "video.frames": T,
    "video.height": 16,
    "video.width": 16,
    "autoencoder.channels": 16,
    "autoencoder.depth": 1,
    "autoencoder.num_heads": 1,
    "autoencoder.head_dim": 8,
    "autoencoder.projection_depth": 1,
    "autoencoder.projection_hidden": 16,
    "adversarial.channels": 2,
    "diffusion.model_channels": 32,
    "diffusion.channel_mult": [1],
    "diffusion.num_res_blocks": 1,
    "diffusion.attention_resolutions": [1],
    "diffusion.num_heads": 2,
    "diffusion.batch_size": CLIPS,
    "device": "cpu",
}


def release_config(**changes: Any) -> TrainConfig:
    return make_config({"preset": "release", **SIZES, **changes})


def make_trainer(stage: Stage, config: TrainConfig, accelerator: Accelerator | None = None) -> Trainer:
    nothing: Any = None
    trainer = Trainer(stage, config, nothing, accelerator or make_accelerator(config), nothing)
    trainer.feed = SimpleNamespace(read_ahead=lambda: None)  # type: ignore[assignment]
    stage.model.train()
    return trainer


def pixels(step: int, index: int, frames: int) -> Tensor:
    """Clips uint8 (3, 3, frames, 16, 16). Every other batch has one with a black first half."""
    generator = torch.Generator().manual_seed(100 * step + index)
    video = torch.randint(256, (CLIPS, 3, frames, 16, 16), generator=generator, dtype=torch.uint8)
    if step % 2:
        video[1, :, : frames // 2] = 0
    return video


def take_step(trainer: Trainer, frames: int) -> dict[str, Any]:
    step, names = trainer.progress.step, ["clip"] * CLIPS
    return trainer.train_step(
        [
            {"video": pixels(step, index, frames), "names": names, "labels": [None] * CLIPS, "skipped": []}
            for index in range(trainer.options.accumulate)
        ]
    )


def copied(module: nn.Module) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in module.parameters()]


def put(module: nn.Module, tensors: Iterable[Tensor]) -> None:
    with torch.no_grad():
        for parameter, tensor in zip(module.parameters(), tensors, strict=True):
            parameter.copy_(tensor)


def assert_moved_alike(begin: list[Tensor], found: list[Tensor], expected: list[Tensor], steps: int) -> None:
    """Each weight went where it should, to a thousandth of the learning rate a step. A step moves it by about the
    rate."""
    moved = torch.cat([(a - b).flatten() for a, b in zip(expected, begin, strict=True)])
    wrong = torch.cat([(a - b).flatten() for a, b in zip(found, expected, strict=True)])
    assert moved.abs().max() > 0.5 * RATE
    assert wrong.abs().max() < 1e-3 * RATE * steps


def in_float64(nets: Discriminators) -> Discriminators:
    for net in (nets.image, nets.clip):
        net.double().register_forward_pre_hook(lambda module, arguments: (arguments[0].double(),))
    return nets


def frame_of(video: Tensor, numbers: Tensor) -> Tensor:
    index = numbers.reshape(-1, 1, 1, 1, 1).expand(-1, video.shape[1], 1, *video.shape[3:])
    return video.gather(2, index).squeeze(2)


class ReleaseFirstStage:
    """`first_stage_train`: three batches to the autoencoder's optimizer, then, with the GAN, three to the other's."""

    def __init__(self, model: nn.Module, lpips: LPIPS, image: nn.Module, clip: nn.Module, disc_start: int) -> None:
        self.model, self.lpips, self.image, self.clip, self.disc_start = model, lpips, image, clip, disc_start
        self.opt = torch.optim.AdamW(model.parameters(), lr=RATE, betas=(0.5, 0.9))
        judges = [*image.parameters(), *clip.parameters()]
        self.d_opt = torch.optim.AdamW(judges, lr=RATE, betas=(0.5, 0.9))
        self.disc_opt = False

    def iteration(self, it: int, video: Tensor, frames: Tensor) -> None:
        x = video.float() / 127.5 - 1
        if self.disc_opt:
            self.discriminators(it, x, frames)
        else:
            if it % 3 == 0:
                self.model.zero_grad()
            (self.generator_loss(it, x, frames) / 3).backward()
            if it % 3 == 2:
                self.opt.step()
        if it % 3 == 2 and it // 3 >= self.disc_start:
            self.disc_opt = not self.disc_opt

    def generator_loss(self, it: int, x: Tensor, frames: Tensor) -> Tensor:
        x_tilde = self.model(x).sample
        real, fake = frame_of(x, frames), frame_of(x_tilde, frames)
        loss = 4.0 * F.l1_loss(x, x_tilde) + 4.0 * self.lpips(fake, real).mean()
        factor = 0.0 if it < self.disc_start else 1.0
        of_real, of_fake = (self.image(real), self.clip(x)), (self.image(fake), self.clip(x_tilde))
        judged = -(of_fake[0][-1].mean() + of_fake[1][-1].mean())
        matching = sum(
            F.l1_loss(f, r.detach())
            for fakes, reals in zip(of_fake, of_real, strict=True)
            for f, r in zip(fakes[:-1], reals[:-1], strict=True)
        )
        return loss + factor * (judged + 4.0 * matching)

    def discriminators(self, it: int, x: Tensor, frames: Tensor) -> None:
        if it % 3 == 0:
            self.image.zero_grad()
            self.clip.zero_grad()
        with torch.no_grad():
            x_tilde = self.model(x).sample
        pairs = [(self.image, frame_of(x, frames), frame_of(x_tilde, frames)), (self.clip, x, x_tilde)]
        loss = sum(
            0.5 * (F.relu(1 - net(real)[-1]).mean() + F.relu(1 + net(fake)[-1]).mean()) for net, real, fake in pairs
        )
        (loss / 3).backward()
        if it % 3 == 2:
            nn.utils.clip_grad_norm_(self.image.parameters(), 1.0)
            nn.utils.clip_grad_norm_(self.clip.parameters(), 1.0)
            self.d_opt.step()


class ReleaseDiffusion:
    """`latentDDPM` with `DDPM.p_losses` and latent-diffusion's `LitEma`."""

    def __init__(self, model: nn.Module, extract: Any) -> None:
        self.model, self.extract = model, extract
        betas = torch.linspace(0.0015**0.5, 0.0195**0.5, 1000, dtype=torch.float64) ** 2
        self.alphas_cumprod = torch.cumprod(1 - betas, 0)
        self.opt = torch.optim.AdamW(model.parameters(), lr=RATE)
        self.shadow, self.num_updates = copied(model), 0

    def iteration(self, it: int, video: Tensor, p: float, prefix: int, noise: Tensor, t: Tensor) -> None:
        x = video.float() / 127.5 - 1
        self.model.zero_grad()
        c, x_tmp = torch.chunk(x, 2, dim=2)
        seen = ((c + 1).flatten(1) ** 2).sum(1) > 0
        with torch.no_grad():
            if p < 0.3:
                z, cond = self.extract(x_tmp), self.extract(c) * seen.view(-1, 1, 1)
            else:
                mask = seen.float().view(-1, 1, 1, 1, 1)
                z = self.extract(x[:, :, prefix : prefix + T] * mask + x_tmp * (1 - mask))
                cond = torch.zeros_like(z)
        level = self.alphas_cumprod.float()[t].view(-1, 1, 1)
        noisy = level.sqrt() * z + (1 - level).sqrt() * noise
        loss = F.mse_loss(self.model(noisy, t, condition=cond).sample, noise, reduction="none").mean(dim=[1, 2]).mean()
        loss.backward()
        self.opt.step()
        if it % 25 == 0 and it > 0:
            self.num_updates += 1
            keep = min(0.9999, (1 + self.num_updates) / (10 + self.num_updates))
            for average, parameter in zip(self.shadow, self.model.parameters(), strict=True):
                average.sub_((1 - keep) * (average - parameter.detach()))


@pytest.fixture
def lpips_file(tmp_path: Path) -> Path:
    path = tmp_path / "vgg16.pth"
    torch.save({**random_backbone(), **random_heads()}, path)
    return path


def frames_drawn(step: int, batches: int) -> Iterator[Tensor]:
    for index in range(batches):
        yield torch.randint(T, (CLIPS,), generator=step_generator(0, "autoencoder", step, index))


@pytest.mark.parametrize("start", [None, 0])
def test_steps_of_the_autoencoder(start: int | None, lpips_file: Path) -> None:
    """Without discriminators, and with them: autoencoder, discriminators, autoencoder, discriminators."""
    config = release_config(**{"lpips_weights": str(lpips_file), "adversarial.start": start})
    stage = SecondPhaseStage(config, make_autoencoder(config))
    trainer = make_trainer(stage, config)
    nets = in_float64(Discriminators(2))
    if stage.adversary is not None:
        put(nets, copied(in_float64(stage.adversary.nets)))
    begin, begin_nets, steps = copied(stage.model), copied(nets), 4
    outcomes = [take_step(trainer, T) for _ in range(steps)]
    found = copied(stage.model), copied(stage.adversary.nets) if stage.adversary is not None else begin_nets

    put(stage.model, begin)
    assert stage.lpips is not None
    disc_start = 100_000_000 if start is None else -1  # configs/autoencoder/base.yaml, base_gan.yaml
    release = ReleaseFirstStage(stage.model, stage.lpips, nets.image, nets.clip, disc_start)
    for step in range(steps):
        for index, frames in enumerate(frames_drawn(step, 3)):
            release.iteration(3 * step + index, pixels(step, index, T), frames)
    assert_moved_alike(begin, found[0], copied(stage.model), steps)
    if start is not None:
        assert_moved_alike(begin_nets, found[1], copied(nets), steps)
        assert ["gradient_norm" in outcome for outcome in outcomes] == [True, False] * 2
        assert ["d_loss" in outcome for outcome in outcomes] == [False, True] * 2


@pytest.mark.slow
def test_steps_of_the_denoiser(monkeypatch: pytest.MonkeyPatch) -> None:
    """27 of them: the averaged weights are 9 parts of those after the 26th, and 2 of the first ones."""
    config = release_config(**{"seed": 5})
    autoencoder = make_autoencoder(config)
    denoiser = make_denoiser(config, autoencoder).double()
    for parameter in denoiser.parameters():  # its last layers would be zero
        nn.init.normal_(parameter, std=0.1)
    nn.init.normal_(denoiser.out["2"].weight, std=1.0)  # large errors, for gradients that are longer than 1
    stage = DiffusionStage(config, autoencoder, denoiser)
    monkeypatch.setattr(stage, "_encode", lambda video: autoencoder.encode(to_float(video)).latent.double())
    trainer = make_trainer(stage, config)
    begin, steps = copied(stage.model), 27
    norms = [take_step(trainer, 2 * T)["gradient_norm"] for _ in range(steps)]
    assert max(norms) > 2, "so that cutting them to 1 would show"
    found, averaged = copied(stage.model), [average.clone() for average in stage.ema.shadow_params]

    put(stage.model, begin)
    release = ReleaseDiffusion(stage.model, lambda video: autoencoder.encode(video).latent.double())
    kinds = set()
    for step in range(steps):
        generator = step_generator(5, "diffusion", step, 0)
        p = torch.rand(1, generator=generator).item()
        prefix = int(torch.randint(T + 1, (1,), generator=generator))
        noise = torch.randn(CLIPS, 4, autoencoder.layout.num_tokens, generator=generator)
        t = torch.randint(1000, (CLIPS,), generator=generator)
        kinds.add((p < 0.3, step % 2))
        release.iteration(step, pixels(step, 0, 2 * T), p, prefix, noise, t)
    assert len(kinds) == 4, "with and without a condition, with and without padding"
    assert_moved_alike(begin, found, copied(stage.model), steps)
    assert_moved_alike(begin, averaged, release.shadow, steps)


@pytest.mark.parametrize("float32", [False, True])
def test_clips_are_encoded_in_16_bits_and_the_denoiser_computes_in_float32(float32: bool) -> None:
    """Also inside the model, where accelerate puts an autocast of its own."""
    config = release_config(**{"diffusion.float32": float32})
    autoencoder = make_autoencoder(config)
    stage = DiffusionStage(config, autoencoder, make_denoiser(config, autoencoder))
    trainer = make_trainer(stage, config, Accelerator(cpu=True, mixed_precision="bf16"))
    seen: dict[str, set[bool]] = {"autoencoder": set(), "denoiser": set()}
    for name, model in (("autoencoder", autoencoder), ("denoiser", stage.model)):
        for module in list(model.modules())[1:]:
            module.register_forward_pre_hook(lambda *_, name=name: seen[name].add(torch.is_autocast_enabled("cpu")))
    outcome = take_step(trainer, 2 * T)
    assert seen == {"autoencoder": {True}, "denoiser": {not float32}}
    assert outcome["loss"] > 0


def test_the_page_names_every_option_of_the_preset() -> None:
    """In its table, with the value: docs/reproducing_the_paper.md."""
    page = (Path(__file__).resolve().parents[2] / "docs" / "reproducing_the_paper.md").read_text(encoding="utf-8")
    rows = [line for line in page.splitlines() if line.startswith("| ") and "`--" in line]
    named = set(re.findall(r"`(--[^`]+)`", " ".join(row.rsplit("|", 2)[1] for row in rows)))
    base, release = (make_config({"preset": name, "data": "UCF-101"}) for name in ("base", "release"))
    expected = set()
    for key, option in OPTIONS.items():
        value = get(release, key)
        if value == get(base, key) or key == "preset":
            continue
        word = flag(option)
        if option.kind is bool:
            expected.add(word if value else word.replace("--", "--no-", 1))
        else:
            expected.add(f"{word} {value:g}" if isinstance(value, float) else f"{word} {value}")
    assert named == expected


@pytest.mark.slow
def test_the_page_s_commands_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lpips_file: Path) -> None:
    """With small models, few steps, and clips named as in UCF-101, one of them too short for the denoiser."""
    monkeypatch.chdir(tmp_path)
    Path("UCF-101").mkdir()
    lpips_file.rename("vgg16-397923af.pth")
    names = [f"v_Archery_g0{number}_c01.avi" for number in range(1, 5)]
    for number, name in enumerate(names):
        write_video(Path("UCF-101") / f"{Path(name).stem}.mp4", films.frames(6 if number else 12, 24, 32), 8)
    Path("UCF-101/trainlist01.txt").write_text("".join(f"Archery/{name} 1\n" for name in names[1:]))
    Path("UCF-101/testlist01.txt").write_text(f"Archery/{names[0]}\n")
    page = (Path(__file__).resolve().parents[2] / "docs" / "reproducing_the_paper.md").read_text(encoding="utf-8")
    lines = [shlex.split(line)[2:] for line in re.findall(r"^python -m .*$", page, re.MULTILINE)]
    small = [word for key, value in SIZES.items() for word in command_line(key, value)]
    few = {"--adversarial-start": "1", "--autoencoder-steps": "3"}
    for module, *words in lines:
        words = [few.get(before, word) for before, word in zip(["", *words], words, strict=False)]
        if module == "pvdm_fast.evaluate":
            assert evaluate.main([*words[:-1], "1", "--samples", "0", "--device", "cpu"]) == 0
            continue
        quick = ["--workers", "0", "--held-out-clips", "1", "--diffusion-sampling-steps", "1", "--diffusion-steps", "2"]
        first = [*small, *quick, "--autoencoder-steps", "1"] if "--preset" in words else []
        assert train.main([*words, *first]) == 0
    records = [json.loads(line) for line in Path("runs/paper/metrics.jsonl").read_text().splitlines()]
    taken = [record for record in records if "learning_rate" in record]
    assert ["d_loss" in record for record in taken] == [False, False, True, False, False]
    assert {record["learning_rate"] for record in taken} == {RATE}


def command_line(key: str, value: Any) -> list[str]:
    return [flag(OPTIONS[key]), *map(str, value if isinstance(value, list) else [value])]
