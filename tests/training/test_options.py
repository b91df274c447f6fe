"""Options, config files, and every way they can be wrong: one sentence, exit code 2, nothing written."""

from __future__ import annotations

from pathlib import Path

import pytest
from training.small import SMALL, assert_refused

from pvdm_fast.errors import UserError
from pvdm_fast.sample import main as sample_main
from pvdm_fast.train import main
from pvdm_fast.training.config import OPTIONS, PRESETS, TrainConfig, get, make_config, read_changes, to_yaml
from pvdm_fast.training.options import flag, make_parser, parse
from pvdm_fast.training.presets import FLOW_OPTIONS
from pvdm_fast.training.trainer import learning_rate


def test_every_hyper_parameter_has_an_option_with_help(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    text = make_parser().format_help()
    for option in OPTIONS.values():
        assert option.metadata["help"], option.key
        assert flag(option) in text
    assert max(map(len, text.splitlines())) <= 110
    monkeypatch.setenv("COLUMNS", "70")
    assert max(map(len, make_parser().format_help().splitlines())) <= 70


def test_help_shows_the_value_of_every_preset() -> None:
    text = " ".join(make_parser().format_help().split())
    assert "(tiny: 1; small: 1 2 3; base, release: 1 2 4 4)" in text
    assert "(tiny: none; small: 4 2; base, release: 4 2 1)" in text
    assert "(tiny: 64; small: 192; base, release: 384)" in text and "default: the preset's" not in text
    assert "(tiny, small, base: flow; release: noise)" in text and "(tiny: on; small, base, release: off)" in text


@pytest.mark.parametrize("preset", list(PRESETS))
def test_presets_are_valid_and_survive_yaml(preset: str, tmp_path: Path) -> None:
    config = make_config({"preset": preset, "diffusion.channel_mult": [1, 2]})
    file = tmp_path / "config.yaml"
    file.write_text(to_yaml(config))
    assert make_config(read_changes(file)) == config


def test_the_command_line_goes_before_the_file_and_the_file_before_the_preset(tmp_path: Path) -> None:
    file = tmp_path / "options.yaml"
    file.write_text("preset: base\nautoencoder: {learning_rate: 2e-4, steps: 7}\n")
    request = parse(["--config", str(file), "--autoencoder-steps", "9"])
    config = make_config(request.changes)
    assert config.autoencoder.steps == 9
    assert config.autoencoder.learning_rate == 2e-4
    assert config.autoencoder.beta1 == get(make_config({"preset": "base"}), "autoencoder.beta1") == 0.5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--autoencoder-step", "4"], "no option --autoencoder-step; did you mean '--autoencoder-steps'?"),
        (["--autoencoder-steps", "x"], "--autoencoder-steps must be a whole number, not 'x'"),
        (["--autoencoder-steps", "0"], "--autoencoder-steps must be at least 1, not 0"),
        (["--diffusion-conditional-probability", "1.5"], "must be at most 1, not 1.5"),
        (["--diffusion-channel-mult"], "--diffusion-channel-mult must be a list of whole numbers"),
        (["--diffusion-learning-rate", "nan"], "must be a finite number, not 'nan'"),
        (["--mixed-precision", "fp8"], "--mixed-precision must be one of auto, no, bf16, fp16, not 'fp8'"),
        (["--preset", "huge"], "--preset must be one of tiny, small, base, release, not 'huge'"),
        (["--data", "/no/such/folder"], "/no/such/folder"),
        (["--height", "30"], "height 30 is not divisible by the patch size 8"),
        (["--frames", "3", "--diffusion-channel-mult", "1", "2"], "3"),
        (["--stage", "diffusion"], "--stage diffusion needs a trained autoencoder"),
        (["--stage", "diffusion", "--autoencoder-from", "/no/such/run"], "there is no folder /no/such/run"),
        (["--stage", "diffusion", "--autoencoder-from", "/"], "there is no autoencoder in /"),
        (["--autoencoder", "runs/mine"], "no option --autoencoder; did you mean '--autoencoder-from'"),
        (["--autoencoder-from", "."], "--autoencoder-from goes with --stage diffusion only"),
        (["--config", "/no/such.yaml"], "cannot read the config file /no/such.yaml"),
    ],
)
def test_mistakes_are_one_sentence_and_write_nothing(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert_refused(arguments, message, tmp_path / "run", capsys)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("preset: tiny\nautoencoder: {step: 5}", "no option 'autoencoder.step'; did you mean 'autoencoder.steps'?"),
        ("steps: 5", "there is no option 'steps'"),
        ("autoencoder: 5", "autoencoder must hold options"),
        ("- a\n- b", "must hold options"),
        ("a: [1", "is not valid YAML at line"),
        ("autoencoder: {steps: 1.5}", "autoencoder.steps must be a whole number, not 1.5"),
        ("autoencoder: {steps: true}", "autoencoder.steps must be a whole number, not True"),
        ("video: {flip: 1}", "video.flip must be true or false, not 1"),
        ("diffusion: {channel_mult: 2}", "diffusion.channel_mult must be a list of whole numbers"),
        ("seed:", "seed must be a whole number, not None"),
    ],
)
def test_mistakes_in_a_config_file_are_named(text: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "options.yaml"
    file.write_text(text)
    with pytest.raises(UserError) as error:
        make_config(read_changes(file))
    assert message in str(error.value)


def test_an_existing_run_is_not_written_over(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = (finished / "metrics.jsonl").read_bytes()
    assert main([*SMALL, "--run", str(finished)]) == 2
    assert "already holds a run: continue it with --resume" in capsys.readouterr().err
    assert (finished / "metrics.jsonl").read_bytes() == before


def test_a_folder_with_other_things_is_not_used(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "letter.txt").write_text("dear")
    assert main([*SMALL, "--run", str(tmp_path)]) == 2
    assert "is not empty" in capsys.readouterr().err


def test_a_run_folder_that_cannot_be_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    assert main([*SMALL, "--run", str(tmp_path / "file" / "run")]) == 2
    assert "cannot write the run folder" in capsys.readouterr().err


def test_what_was_learned_cannot_be_changed_on_resuming(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--resume", str(finished), "--autoencoder-channels", "32"]) == 2
    assert "--autoencoder-channels cannot change when a run is resumed" in capsys.readouterr().err
    assert main(["--resume", str(finished), "--fold", "2"]) == 2
    assert "--fold cannot change when a run is resumed" in capsys.readouterr().err
    assert main(["--resume", str(finished)]) == 0, "a finished run only reports its results"
    assert main(["--resume", str(finished / "autoencoder")]) == 2
    assert "holds no run" in capsys.readouterr().err


def test_learning_rates() -> None:
    options = make_config(
        {"autoencoder.steps": 100, "autoencoder.warmup": 9, "autoencoder.learning_rate": 1.0}
    ).autoencoder
    options.schedule = "constant"
    assert [learning_rate(options, step) for step in (0, 4, 9, 99)] == [0.1, 0.5, 1.0, 1.0]
    options.schedule = "cosine"
    rates = [learning_rate(options, step) for step in range(9, 100)]
    assert rates[0] == 1.0
    assert rates == sorted(rates, reverse=True)
    assert 0.01 <= rates[-1] < 0.02


def sample(run: Path, out: Path, *arguments: str) -> int:
    return sample_main([str(run), "--out", str(out), "--steps", "3", "--device", "cpu", *arguments])


@pytest.mark.slow
@pytest.mark.parametrize("suffix", ["mp4", "gif", "npy"])
def test_the_same_seed_gives_the_same_bytes(finished: Path, tmp_path: Path, suffix: str) -> None:
    files = [tmp_path / f"{name}.{suffix}" for name in "abc"]
    for file, seed in zip(files, "001", strict=True):
        assert sample(finished, file, "--seed", seed, "--frames", "7", "--guidance", "1") == 0
    assert files[0].read_bytes() == files[1].read_bytes()
    assert files[0].read_bytes() != files[2].read_bytes()


@pytest.mark.slow
def test_samples_have_the_asked_for_size(finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import numpy as np

    for scheduler in ("ddim", "ddpm", "dpm++"):
        out = tmp_path / f"{scheduler}.npy"
        assert sample(finished, out, "--clips", "3", "--frames", "9", "--scheduler", scheduler) == 0
        videos = np.load(out)
        assert (videos.shape, videos.dtype) == ((3, 9, 16, 16, 3), np.uint8)
    assert "100%" in capsys.readouterr().err, "the progress bar"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--out", "film.avi"], "its name must end in .mp4, .gif, .npy"),
        (["--scheduler", "foo"], "there is no scheduler called 'foo'"),
        (["--scheduler", "euler"], "the scheduler euler doesn't go with this denoiser, which predicts v: choose"),
        (["--steps", "0"], "--steps must be at least 1, not 0"),
        (["--clips", "0"], "at least 1"),
        (["--frame", "3"], "no option --frame; did you mean '--frames'?"),
        (["--device", "tpu"], "--device must be auto, cpu, cuda or cuda:N, not 'tpu'"),
        (["--fps", "0"], "--fps must be at least 0.1, not 0"),
        (["--dtype", "fp8"], "--dtype must be auto, fp32 or bf16, not 'fp8'"),
    ],
)
def test_mistakes_in_sampling_are_one_sentence(
    finished: Path, tmp_path: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert sample(finished, tmp_path / "out.npy", *arguments) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error


def test_sampling_needs_a_trained_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert sample(tmp_path, tmp_path / "out.npy") == 2
    assert "there is no trained autoencoder" in capsys.readouterr().err


def test_another_prediction_than_the_presets_leaves_out_what_goes_with_its_flow() -> None:
    """Otherwise you would be asked to leave out options that you didn't give."""
    usual, preset = TrainConfig(), make_config({})
    assert any(get(preset, key) != get(usual, key) for key in FLOW_OPTIONS)
    chosen = make_config({"diffusion.prediction": "v"})
    assert all(get(chosen, key) == get(usual, key) for key in FLOW_OPTIONS)
    again = make_config({"diffusion.prediction": "v", "diffusion.time_shift": 3.0})
    assert again.diffusion.time_shift == 3.0
