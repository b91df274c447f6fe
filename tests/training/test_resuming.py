"""Going on with a run: what may change and is recorded, finished stages with more steps, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from shutil import copytree, rmtree

import pytest
import yaml
from training.small import SMALL, losses, same_weights, steps

from pvdm_fast.models import Autoencoder
from pvdm_fast.train import main
from pvdm_fast.training import checkpoint
from pvdm_fast.training.config import SIZES, get
from pvdm_fast.training.run_folder import RunFolder


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    return copytree(finished, tmp_path / "run")


@pytest.fixture(scope="module")
def first_stage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An autoencoder with a constant learning rate, and no denoiser."""
    run = tmp_path_factory.mktemp("first") / "run"
    options = ["--stage", "autoencoder", "--autoencoder-steps", "4", "--autoencoder-schedule", "constant"]
    assert main([*SMALL, *options, "--run", str(run)]) == 0
    return run


def changes(run: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (run / "changes.jsonl").read_text().splitlines()]


def test_config_yaml_holds_every_size_that_was_used(finished: Path) -> None:
    values = yaml.safe_load((finished / "config.yaml").read_text())
    assert None not in [values[key.partition(".")[0]][key.partition(".")[2]] for key in SIZES]
    config = RunFolder(finished).read_config()
    used = Autoencoder.from_pretrained(finished / "autoencoder").config
    assert config.autoencoder.projection_depth == used.projection_depth
    assert config.autoencoder.latent_channels == used.latent_channels
    assert config.diffusion.positions is True, "of the preset"


@pytest.mark.slow
def test_editing_a_size_gives_that_size(finished: Path, tmp_path: Path) -> None:
    values = yaml.safe_load((finished / "config.yaml").read_text())
    values["autoencoder"]["projection_hidden"] = 24
    values["stage"] = "autoencoder"
    values["autoencoder"]["steps"] = 1
    (tmp_path / "edited.yaml").write_text(yaml.safe_dump(values))
    assert main(["--config", str(tmp_path / "edited.yaml"), "--run", str(tmp_path / "run")]) == 0
    assert Autoencoder.from_pretrained(tmp_path / "run" / "autoencoder").config.projection_hidden == 24


@pytest.mark.slow
def test_a_finished_stage_goes_on_as_if_it_had_not_ended(
    first_stage: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, whole = copytree(first_stage, tmp_path / "run"), tmp_path / "whole"
    options = ["--stage", "autoencoder", "--autoencoder-steps", "7", "--autoencoder-schedule", "constant"]
    assert main([*SMALL, *options, "--run", str(whole)]) == 0
    capsys.readouterr()
    assert main(["--resume", str(run), "--autoencoder-steps", "7"]) == 0
    assert "changed    autoencoder.steps: 4 until step 4 of the autoencoder stage, 7 from there on" in (
        capsys.readouterr().out
    )
    assert losses(run, "autoencoder") == losses(whole, "autoencoder")
    assert same_weights(run, whole, "autoencoder")
    assert RunFolder(run).results()["autoencoder"]["steps"] == 7
    assert changes(run) == [
        {"stage": "autoencoder", "step": 4, "option": "autoencoder.steps", "from": 4, "to": 7},
    ]


def test_a_finished_denoiser_goes_on(run: Path, finished: Path) -> None:
    assert main(["--resume", str(run), "--diffusion-steps", "10"]) == 0
    assert losses(run, "diffusion")[:8] == losses(finished, "diffusion")
    assert [step for step, *_ in losses(run, "diffusion")] == list(range(1, 11))
    assert not same_weights(run, finished, "denoiser")
    assert same_weights(run, finished, "autoencoder")


@pytest.mark.slow
def test_what_changes_is_in_use_and_recorded_with_its_step(run: Path) -> None:
    """Rate, schedule, AdamW's decays and the average's: none of them comes back with the checkpoint's state."""
    options = "--diffusion-learning-rate 0.25 --diffusion-schedule constant --diffusion-beta1 0.5"
    options += " --diffusion-weight-decay 0.125 --diffusion-ema-decay 0.75 --diffusion-batch-size 4 --flip"
    assert main(["--resume", str(run), "--diffusion-steps", "9", *options.split()]) == 0
    newest, _ = checkpoint.newest_good(run / "checkpoints")
    assert newest is not None and newest.step == 9
    state = checkpoint.load(newest)
    (group,) = state["optimizer"]["param_groups"]
    assert (group["lr"], group["betas"], group["weight_decay"]) == (0.25, (0.5, 0.98), 0.125)
    assert state["stage"]["ema"]["decay"] == 0.75
    assert state["progress"]["draw"] == 8 * 2 + 4
    record = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [item["learning_rate"] for item in record if item["step"] == 9 and "loss" in item] == [0.25]
    recorded = {item["option"]: (item["from"], item["to"]) for item in changes(run)}
    assert recorded["diffusion.learning_rate"] == (3e-3, 0.25) and recorded["video.flip"] == (False, True)
    assert {item["step"] for item in changes(run)} == {8}
    assert RunFolder(run).read_config().diffusion.ema_decay == 0.75


@pytest.mark.slow
def test_an_edited_config_is_obeyed_or_refused(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = run / "config.yaml"
    text = config.read_text()
    config.write_text(text.replace("channels: 16", "channels: 32"))
    assert main(["--resume", str(run)]) == 2
    error = capsys.readouterr().err
    assert f"autoencoder.channels in {config}, which was 16, cannot change when a run is resumed" in error
    values = yaml.safe_load(text)
    values["diffusion"] |= {"steps": 9, "clip_norm": 0.5}
    config.write_text(yaml.safe_dump(values))
    assert main(["--resume", str(run)]) == 0
    assert {item["option"] for item in changes(run)} == {"diffusion.steps", "diffusion.clip_norm"}
    assert len(losses(run, "diffusion")) == 9


@pytest.mark.slow
def test_discriminators_are_free_until_there_are_any(
    first_stage: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = copytree(first_stage, tmp_path / "run")
    options = ["--adversarial-start", "4", "--adversarial-norm", "spectral", "--adversarial-channels", "8"]
    assert main(["--resume", str(run), "--autoencoder-steps", "5", *options]) == 0
    assert {item["option"] for item in changes(run)} >= {"adversarial.norm", "adversarial.channels"}
    assert main(["--resume", str(run), "--autoencoder-steps", "6", "--adversarial-channels", "4"]) == 2
    assert "--adversarial-channels cannot change when a run is resumed" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--autoencoder-steps", "9000"], "the denoiser was trained on its latents, so that it cannot go on; start"),
        (["--autoencoder-steps", "5"], "--autoencoder-steps 5 is less than the 8 steps that the finished stage"),
        (["--diffusion-steps", "5"], "--diffusion-steps 5 is less than the 8 steps"),
        (["--autoencoder-learning-rate", "1"], "--autoencoder-learning-rate would do nothing: the autoencoder stage"),
        (["--adversarial-start", "3"], "--adversarial-start would do nothing: the autoencoder stage is finished"),
        (["--save-every", "50"], "--save-every would do nothing: the run is finished; raise --diffusion-steps"),
        (["--seed", "5"], "--seed cannot change when a run is resumed"),
        (["--diffusion-prediction", "noise"], "--diffusion-prediction cannot change"),
        (["--optimizer", "adamw8bit"], "--optimizer cannot change"),
        (["--diffusion-steps", "9", "--autoencoder-clip-norm", "2"], "--autoencoder-clip-norm would do nothing"),
    ],
)
def test_no_option_is_taken_and_ignored(
    arguments: list[str], message: str, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file() and path.name != "trainer.lock"}
    assert main(["--resume", str(run), *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    after = {path: path.read_bytes() for path in run.rglob("*") if path.is_file() and path.name != "trainer.lock"}
    assert after == before


@pytest.mark.slow
def test_values_that_are_the_same_change_nothing(run: Path, finished: Path) -> None:
    assert main(["--resume", str(run), "--autoencoder-steps", "8", "--seed", "0"]) == 0
    assert same_weights(run, finished, "denoiser") and not (run / "changes.jsonl").exists()


def test_a_finished_stage_without_its_checkpoint(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rmtree(run / "checkpoints" / "diffusion-step-0000008")
    assert main(["--resume", str(run), "--diffusion-steps", "9"]) == 2
    assert "no checkpoint of the finished diffusion stage is left; start a new run" in capsys.readouterr().err
    assert RunFolder(run).results()["diffusion"]["steps"] == 8


def test_fewer_steps_than_were_taken(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results = json.loads((run / "results.json").read_text())
    (run / "results.json").write_text(json.dumps({"autoencoder": results["autoencoder"]}))
    assert main(["--resume", str(run), "--diffusion-steps", "3"]) == 2
    assert "--diffusion-steps 3 is less than the 8 steps that the run has taken" in capsys.readouterr().err


@pytest.mark.slow
def test_a_run_of_an_earlier_version_keeps_its_sizes(run: Path, finished: Path) -> None:
    """Its config.yaml leaves sizes open that are not the preset's, and its checkpoints hold no options."""
    config = run / "config.yaml"
    values = yaml.safe_load(config.read_text())
    for key in SIZES:
        group, _, name = key.partition(".")
        if group != "diffusion":
            values[group][name] = None
    config.write_text(yaml.safe_dump(values))
    for path in (run / "checkpoints").glob("*/config.yaml"):
        path.unlink()
    assert main(["--resume", str(run), "--diffusion-steps", "9"]) == 0
    used = RunFolder(run).read_config()
    assert all(get(used, key) == get(RunFolder(finished).read_config(), key) for key in SIZES)


@pytest.mark.slow
def test_a_second_stage_in_the_same_folder_starts_from_the_same_weights(finished: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    rates = ["--autoencoder-learning-rate", "0", "--diffusion-learning-rate", "0", "--no-diffusion-class-conditional"]
    options = [*rates, "--init-from", str(finished), "--held-out-clips", "2", "--diffusion-sampling-steps", "1"]
    assert main([*options, *steps(1), "--stage", "autoencoder", "--run", str(run)]) == 0
    assert main(["--resume", str(run), "--stage", "diffusion"]) == 0
    assert same_weights(run, finished, "denoiser")
