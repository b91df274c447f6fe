"""The estimate of a training step, compared with what real steps on the CPU keep, use and save."""

from __future__ import annotations

import json
from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks import cost, floors
from pvdm_fast.analysis.flops import FlopCount
from pvdm_fast.analysis.memory import LiveMemory, saved_bytes
from pvdm_fast.backends import precision
from pvdm_fast.errors import UserError
from pvdm_fast.estimate import Estimate, computed, estimate, main
from pvdm_fast.jobs.cards import CARDS, UTILISATION
from pvdm_fast.models import Denoiser
from pvdm_fast.training import checkpoint
from pvdm_fast.training.building import make_autoencoder, make_denoiser
from pvdm_fast.training.config import TrainConfig, make_config
from pvdm_fast.training.distilling import DistillationStage
from pvdm_fast.training.matching import MatchingStage
from pvdm_fast.training.optimizer import make_optimizer
from pvdm_fast.training.stages import AutoencoderStage, DiffusionStage

NEAR = 0.15


def config(**changes: Any) -> TrainConfig:
    sizes = {"video.frames": 4, "autoencoder.batch_size": 2, "diffusion.batch_size": 2}
    return make_config(sizes | {key.replace("__", "."): value for key, value in changes.items()})


def real_step(config: TrainConfig, name: str) -> tuple[Any, Any, int, int]:
    """The trained stage, its optimizer after a step, bytes saved for backward, and bytes alive at once."""
    autoencoder: Any = make_autoencoder(config)
    stage: Any = AutoencoderStage(config, autoencoder)
    if name == "diffusion":
        stage = DiffusionStage(config, autoencoder, make_denoiser(config, autoencoder))
        stage.prepare(SimpleNamespace(mixed_precision=config.mixed_precision, device=torch.device("cpu")))
    if stage.options.checkpointing:
        stage.model.enable_gradient_checkpointing()
    parameters = list(stage.model.parameters())
    optimizer = make_optimizer(config.optimizer, stage.model, stage.options)
    video = torch.rand(stage.options.batch_size, 3, stage.clip_frames, stage.height, stage.width)
    generator = torch.Generator().manual_seed(0)
    with torch.autocast("cpu", torch.bfloat16, enabled=config.mixed_precision == "bf16" and not stage.in_float32):
        saved = saved_bytes(lambda: [stage.loss(stage.model, video, generator)], parameters)
        with LiveMemory() as live:
            gradients = torch.autograd.grad(stage.loss(stage.model, video, generator), parameters)
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient
    optimizer.step()
    return stage, optimizer, saved, live.peak


@pytest.mark.parametrize("stage", ["autoencoder", "diffusion"])
@pytest.mark.parametrize("precision", ["no", "bf16"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_estimate_is_what_a_step_takes(stage: str, precision: str, checkpointing: bool, tmp_path: Path) -> None:
    sure = {"diffusion__conditional_probability": 1.0}  # else the step may draw fewer conditions than are estimated
    changes = config(mixed_precision=precision, **{f"{stage}__checkpointing": checkpointing}, **sure)
    found = estimate(changes, stage)
    trained, optimizer, saved, alive = real_step(changes, stage)
    assert found.saved == pytest.approx(saved, rel=NEAR)
    assert found.at_work == pytest.approx(alive, rel=NEAR)
    state = {"model": trained.model.state_dict(), "optimizer": optimizer.state_dict(), "stage": trained.state()}
    path = checkpoint.save(tmp_path, stage, 1, state)
    assert found.checkpoint == pytest.approx((path / checkpoint.STATE).stat().st_size, rel=NEAR)


@pytest.mark.parametrize("method", ["distribution", "path"])
def test_a_distillation_keeps_a_teacher_and_perhaps_a_critic(method: str, tmp_path: Path) -> None:
    plain = {"diffusion__class_conditional": False}
    distils = config(**plain, distillation__steps=4, distillation__method=method)
    found, without = estimate(distils, "diffusion"), estimate(config(**plain), "diffusion")
    autoencoder = make_autoencoder(distils)
    student, teacher = make_denoiser(distils, autoencoder), make_denoiser(config(**plain), autoencoder)
    stage = {"distribution": MatchingStage, "path": DistillationStage}[method](distils, autoencoder, student, teacher)
    weights = sum(tensor.nbytes for tensor in teacher.parameters())
    critic = 0
    if isinstance(stage, MatchingStage):
        stage.critic.prepare(Accelerator(cpu=True))
        for parameter in stage.critic.nets.parameters():
            parameter.grad = torch.zeros_like(parameter)
        stage.critic.step(0.0)
        state = stage.critic.state()
        path = checkpoint.save(tmp_path, "diffusion", 1, {name: state[name] for name in ("nets", "optimizer")})
        critic = (path / checkpoint.STATE).stat().st_size
        assert found.checkpoint - without.checkpoint == pytest.approx(critic, rel=NEAR)
    assert found.teaching == pytest.approx(weights + critic, rel=NEAR)
    assert found.peak - without.peak == found.teaching
    assert "teacher and critic" in found.table()


def test_the_release_s_denoiser_computes_in_float32() -> None:
    changes = {
        "mixed_precision": "bf16",
        "diffusion__condition_per": "batch",
        "diffusion__conditional_probability": 1.0,
    }
    release = config(**changes, diffusion__float32=True)
    found = estimate(release, "diffusion")
    _, _, saved, alive = real_step(release, "diffusion")
    assert found.saved == pytest.approx(saved, rel=NEAR)
    assert found.at_work == pytest.approx(alive, rel=NEAR)
    assert estimate(config(**changes), "diffusion").at_work > 1.2 * found.at_work, "16-bit copies of the weights"


def test_a_condition_drawn_per_batch_is_estimated_with_it() -> None:
    sizes = {"diffusion__conditional_probability": 0.3, "diffusion__batch_size": 4}
    clip, batch = (estimate(config(**sizes, diffusion__condition_per=per), "diffusion") for per in ("clip", "batch"))
    assert batch.frozen_flops / clip.frozen_flops == pytest.approx(8 / 6)


def test_auto_is_what_training_would_choose(monkeypatch: pytest.MonkeyPatch) -> None:
    found = estimate(config(mixed_precision="auto"), "autoencoder")
    assert torch.cuda.is_available() or found == estimate(config(mixed_precision="no"), "autoencoder")
    on_a_gpu = precision.Precision(torch.bfloat16, "of this GPU")
    monkeypatch.setattr(precision, "choose_precision", lambda asked, device: on_a_gpu)
    assert estimate(config(mixed_precision="auto"), "autoencoder") == estimate(
        config(mixed_precision="bf16"), "autoencoder"
    )


def test_products_are_counted_as_the_formulas_have_them() -> None:
    sizes = dict(time=4, height=8, width=8, model_channels=64, channel_mult=[1, 2], num_heads=4, num_res_blocks=1)
    with FakeTensorMode(), torch.no_grad(), FlopCount() as count:
        model = Denoiser(**sizes, attention_resolutions=[2])
        latent = torch.empty(2, 4, model.layout.num_tokens)
        model(latent, torch.zeros(2, dtype=torch.long), latent)
    assert count.total == pytest.approx(2 * floors.denoiser(dict(model.config)), rel=0.02)


def test_a_step_multiplies_three_times_as_much_as_a_pass() -> None:
    """And four times as much if the forward pass is recomputed."""
    plain, again = (estimate(config(diffusion__checkpointing=value), "diffusion") for value in (False, True))
    assert plain.frozen_flops == again.frozen_flops > 0
    ratio = (again.flops - again.frozen_flops) / (plain.flops - plain.frozen_flops)
    assert 1.2 < ratio < 1.4


def test_eight_bits(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is an extra: pip install -e '.[8bit]'")
    changes = config(optimizer="adamw8bit")
    found = estimate(changes, "autoencoder")
    assert found.optimizer < 0.5 * estimate(config(), "autoencoder").optimizer
    stage, optimizer, _, _ = real_step(changes, "autoencoder")
    path = checkpoint.save(tmp_path, "autoencoder", 1, {"optimizer": optimizer.state_dict()})
    assert found.optimizer == pytest.approx((path / checkpoint.STATE).stat().st_size, rel=NEAR)
    newest, _ = checkpoint.newest_good(tmp_path)
    assert newest is not None
    again = make_optimizer("adamw8bit", stage.model, stage.options)
    again.load_state_dict(checkpoint.load(newest)["optimizer"])


def test_eight_bits_without_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", None)
    with pytest.raises(UserError, match=r"needs bitsandbytes.*pip install 'pvdm-fast\[8bit\]'"):
        make_optimizer("adamw8bit", torch.nn.Linear(1, 2), config().autoencoder)


def test_command(capsys: pytest.CaptureFixture[str]) -> None:
    small = ["--frames", "2", "--height", "8", "--width", "8", "--batch-size", "1", "--measure", "0"]
    assert main([*small, "--stage", "diffusion", "--json"]) == 0
    (found,) = json.loads(capsys.readouterr().out)
    more = {key: found.pop(key) for key in ("peak", "steps", "seconds_a_step")}
    assert Estimate(**found).peak == more["peak"]
    assert more["steps"] == 6000 and more["seconds_a_step"] is None
    assert main([*small, "--checkpointing"]) == 0
    table = capsys.readouterr().out
    assert "autoencoder, " in table and "diffusion, " in table and "saved for backward" in table
    wrongs = (["--preset", "huge"], ["--batch-size", "0"], ["--mixed-precision", "fp16"], ["--height", "9"], ["--bach"])
    for wrong in wrongs:
        assert main(wrong) == 2
        assert capsys.readouterr().err.startswith("error: ")


def test_the_time_on_a_named_card(capsys: pytest.CaptureFixture[str]) -> None:
    """FLOPs over a share of its peak; and where a step doesn't fit, or isn't in bf16, that instead."""
    small = ["--frames", "2", "--height", "8", "--width", "8", "--batch-size", "1", "--gpu", "H100"]
    assert main([*small, "--json"]) == 0
    for row in json.loads(capsys.readouterr().out):
        assert row["seconds_a_step"] == pytest.approx(row["flops"] / (0.35 * 989e12))
    assert main(small) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith("autoencoder: ") and "on one H100" in line and "computed: 35%" in line for line in lines)
    assert lines[-1].startswith("both stages: ") and "on one H100" in lines[-1]
    for wrong in (
        ["--gpu", "H1000"],
        ["--gpu", "H100", "--measure", "5"],
        ["--gpu", "H100", "--mixed-precision", "no"],
    ):
        assert main(wrong) == 2
        assert capsys.readouterr().err.startswith("error: --")
    config = make_config({"diffusion.float32": True})
    numbers = dict.fromkeys((field.name for field in fields(Estimate)), 1)
    found = Estimate(**{**numbers, "stage": "diffusion"})  # type: ignore[arg-type]
    assert computed(found, config, "H100") == (
        None,
        "diffusion: it computes in float32, and only the time of bf16 is computed",
    )
    large = replace(found, stage="autoencoder", at_work=30 << 30)
    assert computed(large, config, "RTX4090")[1] == "autoencoder: a step needs 30.0 GiB, and one RTX4090 has 24 GiB"


def test_cost_of_a_run() -> None:
    """Hours computed by hand from the estimate's figures."""
    changes = config()
    found = estimate(cost.one_clip(changes), "diffusion")
    clips = cost.Dataset("clips", 1000, 5e5)
    videos, latents = (cost.cost(changes, found, clips, cached) for cached in (False, True))
    assert videos.steps == max(changes.diffusion.steps, 10 * 1000 // 2)
    flops = 2 * (found.flops - found.frozen_flops)
    seconds = flops / (UTILISATION * CARDS["A100"].peak)
    assert latents.gpu_hours["A100"] == pytest.approx(videos.steps * seconds / 3600)
    assert latents.bytes_a_second["A100"] == pytest.approx(2 * cost.LATENT_BYTES / seconds)
    encoding = 2 * 1.4 * found.frozen_flops / 2
    assert videos.gpu_hours["A100"] / latents.gpu_hours["A100"] == pytest.approx((flops + encoding) / flops)
