"""--init-from: what is copied, interpolated and refused, and whole runs that start from trained weights."""

from __future__ import annotations

import json
from pathlib import Path
from shutil import copytree
from typing import Any

import numpy as np
import pytest
import torch
from comparison import assert_close
from filling import randomised
from tolerances import FLOAT32_ERROR
from training.small import SMALL, losses, steps, weights

from pvdm_fast.data import write_video
from pvdm_fast.models import Autoencoder, Denoiser
from pvdm_fast.models.release import to_release
from pvdm_fast.sample import main as sample
from pvdm_fast.train import main
from pvdm_fast.training.initialisation import differences, initialise, interpolated
from pvdm_fast.training.run_folder import RunFolder

SIZES: dict[str, Any] = dict(
    time=2, height=2, width=3, model_channels=32, channel_mult=[1], num_res_blocks=1, num_heads=2
)
VIDEO = dict(frames=4, height=16, width=24, patch_size=8, channels=16, depth=1, num_heads=1, head_dim=8)
# What isn't a size: sizes come from the trained models.
QUICK = ["--held-out-clips", "2", "--workers", "0", "--device", "cpu", "--diffusion-sampling-steps", "2"]
QUICK += ["--no-diffusion-class-conditional"]
QUICK += ["--autoencoder-batch-size", "2", "--diffusion-batch-size", "2", "--mixed-precision", "auto"]
QUICK += ["--optimizer", "adamw", "--diffusion-cached-clips", "0"]


def train(run: Path, *arguments: str) -> int:
    return main([*QUICK, "--run", str(run), *arguments])


def test_the_same_sizes_are_copied_bit_for_bit() -> None:
    for kind, sizes in ((Autoencoder, VIDEO), (Denoiser, {**SIZES, "positions": True, "num_classes": 3})):
        trained, model = randomised(kind(**sizes)).eval(), kind(**sizes)
        initialise(model, trained)
        assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in trained.state_dict().items())
    assert differences(Autoencoder(**VIDEO), Autoencoder(**VIDEO)) == ""


def test_positions_of_another_length_lie_between_the_same_ends() -> None:
    positions = torch.tensor([[0.0, 1.0], [1.0, 3.0], [4.0, -1.0]])
    halfway = torch.tensor([[0.0, 1.0], [0.5, 2.0], [1.0, 3.0], [2.5, 1.0], [4.0, -1.0]])
    assert torch.equal(interpolated(positions, 5), halfway)
    assert torch.equal(interpolated(halfway, 3), positions)
    assert torch.equal(interpolated(positions, 3), positions)
    assert torch.equal(interpolated(positions[:1], 4), positions[:1].expand(4, 2))


def test_another_length_and_resolution() -> None:
    trained, model = randomised(Autoencoder(**VIDEO)).eval(), Autoencoder(**{**VIDEO, "frames": 7, "height": 32})
    initialise(model, trained)
    old, new = trained.state_dict(), model.state_dict()
    for plane, lengths in {"xy": (4, 7), "yt": (2, 4), "xt": (3, 3)}.items():
        name = f"{plane}_pos_embedding"
        assert torch.equal(new[name][:, -1], old[name][:, -1]), "the token's own position"
        assert torch.equal(new[name][0, :-1], interpolated(old[name][0, :-1], lengths[1]))
        assert old[name].shape[1] == lengths[0] + 1
    changed = {"xy_pos_embedding", "yt_pos_embedding", "coords"}
    assert all(torch.equal(new[name], old[name]) for name in old if name not in changed)
    assert torch.equal(new["coords"], torch.linspace(-1, 1, 7)[:, None])
    assert model(torch.rand(1, 3, 7, 32, 24)).sample.isfinite().all()
    assert differences(model, trained) == "positions interpolated from 4 x 2 x 3 to 7 x 4 x 3"


def test_a_denoiser_of_another_layout() -> None:
    for positions in (False, True):
        sizes = {**SIZES, "positions": positions}
        trained, model = randomised(Denoiser(**sizes)).eval(), Denoiser(**{**sizes, "time": 5, "width": 4})
        initialise(model, trained)
        assert model(torch.rand(1, 4, model.layout.num_tokens), 3).sample.isfinite().all()
        assert ("interpolated" in differences(model, trained)) == positions
    time = trained.state_dict()["position_vectors.time"]
    assert torch.equal(model.state_dict()["position_vectors.time"], interpolated(time, 5))


def test_classes_are_known_by_name() -> None:
    trained = randomised(Denoiser(**SIZES, num_classes=2, class_names=["run", "walk"])).eval()
    model = Denoiser(**SIZES, num_classes=3, class_names=["crawl", "walk", "run"])
    initialise(model, trained)
    old, new = trained.class_embed.weight, model.class_embed.weight
    assert torch.equal(new, old[[2, 1, 0, 2]]), "a new class begins as no class"
    assert differences(model, trained) == "2 of 3 classes known"


def test_leaving_classes_out_is_no_class_and_new_ones_change_nothing() -> None:
    latent, time = torch.rand(2, 4, 16), torch.tensor([10, 500])
    with_classes, without = randomised(Denoiser(**SIZES, num_classes=2)).eval(), Denoiser(**SIZES).eval()
    initialise(without, with_classes)
    assert_close(without(latent, time).sample, with_classes(latent, time).sample, FLOAT32_ERROR)
    again = Denoiser(**SIZES, num_classes=4).eval()
    initialise(again, without)
    labels = torch.tensor([0, 3])
    assert torch.equal(again(latent, time, class_labels=labels).sample, without(latent, time).sample)
    assert differences(without, with_classes) == "its classes left out"


@pytest.mark.slow
def test_a_run_goes_on_from_another(finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Both stages, with a learning rate of 0: the new run's models are the old one's, and its sizes are said."""
    run = tmp_path / "run"
    rates = ["--autoencoder-learning-rate", "0", "--diffusion-learning-rate", "0"]
    assert train(run, *steps(1), *rates, "--init-from", str(finished)) == 0
    said = capsys.readouterr().out
    assert f"start      autoencoder from {finished}; denoiser from {finished}\n" in said
    for model in ("autoencoder", "denoiser"):
        old, new = weights(finished, model), weights(run, model)
        assert all(torch.equal(new[name], tensor) for name, tensor in old.items())
    config = RunFolder(run).read_config()
    assert (config.init_from, config.video.frames, config.autoencoder.channels) == (str(finished), 4, 16)
    assert config.diffusion.prediction == "v" and config.diffusion.positions is True


@pytest.mark.slow
def test_another_size_is_interpolated_and_said(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    sizes = ["--frames", "6", "--height", "24"]
    assert train(run, *steps(1), "--init-from", str(finished), *sizes) == 0
    assert "(positions interpolated from 4 x 2 x 2 to 6 x 3 x 2)" in capsys.readouterr().out
    assert Autoencoder.from_pretrained(run / "autoencoder").config.frames == 6
    assert Denoiser.from_pretrained(run / "denoiser").layout.height == 3


@pytest.mark.slow
def test_the_denoiser_alone_is_tuned_on_the_run_s_autoencoder(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    assert train(run, "--stage", "diffusion", "--diffusion-steps", "2", "--init-from", str(finished)) == 0
    old, new = weights(finished, "autoencoder"), weights(run, "autoencoder")
    assert all(torch.equal(new[name], tensor) for name, tensor in old.items())
    first = losses(run, "diffusion")[0][1]
    scratch = losses(finished, "diffusion")[0][1]
    assert first != scratch
    assert RunFolder(run).read_config().autoencoder_from == str(finished)


@pytest.mark.slow
def test_a_resumed_run_is_not_initialised_again(finished: Path, tmp_path: Path) -> None:
    """What it started from may be gone by then."""
    source, run = copytree(finished, tmp_path / "source"), tmp_path / "run"
    options = ["--stage", "autoencoder", "--autoencoder-steps", "2", "--init-from", str(source)]
    assert train(run, *options) == 0
    source.rename(tmp_path / "moved")
    assert main(["--resume", str(run), "--autoencoder-steps", "3"]) == 0
    assert [step for step, *_ in losses(run, "autoencoder")] == [1, 2, 3]


@pytest.mark.slow
def test_a_model_folder_and_a_release_checkpoint(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--stage", "autoencoder", "--autoencoder-steps", "1", "--autoencoder-learning-rate", "0"]
    assert train(tmp_path / "a", *options, "--init-from", str(finished / "autoencoder")) == 0
    state = to_release(Autoencoder.from_pretrained(finished / "autoencoder"))
    torch.save({"state_dict": {f"module.{name}": tensor for name, tensor in state.items()}}, tmp_path / "ae.pth")
    capsys.readouterr()
    heads = ["--autoencoder-num-heads", "1"]
    assert train(tmp_path / "b", *options, *heads, "--init-from", str(tmp_path / "ae.pth")) == 0
    assert f"autoencoder from {tmp_path / 'ae.pth'}\n" in capsys.readouterr().out
    for run in ("a", "b"):
        new = weights(tmp_path / run, "autoencoder")
        assert all(torch.equal(new[name], state[name]) for name in new)
    torch.save(to_release(Autoencoder(**{**VIDEO, "num_heads": 8, "head_dim": 4})), tmp_path / "ae8.pth")
    assert train(tmp_path / "c", *options, "--init-from", str(tmp_path / "ae8.pth")) == 0
    assert "with the release's 8 attention heads (--autoencoder-num-heads)" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--init-from", "/no/such"], "--init-from /no/such is neither a run with a trained model"),
        (["--init-from", "{empty}"], "finish a stage of the run first"),
        (["--init-from", "{text}"], "letter.txt can't be read as a PyTorch file"),
        (["--init-from", "{run}", "--autoencoder-channels", "32"], "--autoencoder-channels is 32, but the models in"),
        (["--init-from", "{run}", "--diffusion-prediction", "noise"], "--diffusion-prediction is noise, but"),
        (["--init-from", "{run}", "--no-diffusion-positions"], "--diffusion-positions is False, but"),
        (["--init-from", "{run}", "--stage", "diffusion", "--frames", "8"], "or train the autoencoder too"),
        (["--init-from", "{run}", "--height", "20"], "height 20 is not divisible by the patch size 8"),
        (["--init-from", "{run}/denoiser", "--stage", "autoencoder"], "holds a denoiser only, which --stage autoenc"),
        (["--init-from", "{run}/autoencoder", "--stage", "diffusion"], "name it with --autoencoder-from"),
        (
            ["--init-from", "{run}/denoiser", "--stage", "diffusion", "--autoencoder-latent-channels", "4"],
            "needs a trained autoencoder",
        ),
        (
            ["--init-from", "{run}/denoiser", "--autoencoder-latent-channels", "3"],
            "made for latents of 4 channels, but the autoencoder's have 3",
        ),
        (["--init-from", "{run}", "--data", "{films}", "--diffusion-class-conditional"], "no classes in"),
        (["--resume", "{run}", "--init-from", "{run}"], "--init-from cannot change when a run is resumed"),
    ],
)
def test_what_does_not_fit_is_one_sentence_before_any_work(
    arguments: list[str], message: str, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "letter.txt").write_text("dear")
    (tmp_path / "films").mkdir()
    for number in range(2):
        write_video(tmp_path / "films" / f"{number}.mp4", np.zeros((16, 16, 16, 3), np.uint8))
    names = {name: tmp_path / name for name in ("empty", "films")} | {"run": finished, "text": tmp_path / "letter.txt"}
    where = [] if "--resume" in arguments else ["--run", str(tmp_path / "run")]
    before = (finished / "config.yaml").read_bytes()
    assert main([*where, *(word.format(**names) for word in arguments)]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.startswith("error: ") and error.count("\n") == 1
    assert not (tmp_path / "run").exists() and (finished / "config.yaml").read_bytes() == before


@pytest.mark.slow
def test_what_tiny_has_are_options(tmp_path: Path) -> None:
    run = tmp_path / "run"
    options = ["--diffusion-prediction", "noise", "--no-diffusion-positions", "--autoencoder-loss", "l1"]
    assert main([*SMALL, *steps(1), *options, "--run", str(run)]) == 0
    config = json.loads((run / "denoiser" / "config.json").read_text())
    assert (config["prediction"], config["positions"]) == ("noise", False)
    assert sample([str(run), "--out", str(tmp_path / "a.npy"), "--steps", "1", "--clips", "1", "--device", "cpu"]) == 0
