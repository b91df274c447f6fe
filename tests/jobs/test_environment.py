"""Variables of launchers and schedulers, and a calling program's PyTorch defaults: which count, and which don't."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from training.small import SMALL, losses, same_weights, steps

from pvdm_fast.errors import UserError
from pvdm_fast.jobs.environment import LAUNCHER, Place, only_the_launcher, place_in_job, plain_torch, starts_again
from pvdm_fast.train import main

TWO = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}


@pytest.fixture(autouse=True)
def _clean(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    from accelerate.state import AcceleratorState

    for name in LAUNCHER:
        monkeypatch.delenv(name, raising=False)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def variables(monkeypatch: pytest.MonkeyPatch, values: dict[str, str]) -> None:
    for name, value in values.items():
        monkeypatch.setenv(name, value)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({}, Place(0, 1, 0, launched=False)),
        ({"LOCAL_RANK": "0"}, Place(0, 1, 0, launched=False)),
        ({"RANK": "", "WORLD_SIZE": ""}, Place(0, 1, 0, launched=False)),
        ({"RANK": "0", "WORLD_SIZE": "1"}, Place(0, 1, 0, launched=False)),
        (TWO, Place(1, 2, 1, launched=True)),
        ({**TWO, "RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}, Place(0, 1, 0, launched=True)),
    ],
)
def test_places(values: dict[str, str], expected: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    variables(monkeypatch, values)
    assert place_in_job() == expected


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"RANK": "1"}, "RANK is 1, but WORLD_SIZE is not set"),
        ({"LOCAL_RANK": "3"}, "LOCAL_RANK is 3, but WORLD_SIZE is not set"),
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE is 2, but RANK, LOCAL_RANK, MASTER_ADDR, MASTER_PORT is not set"),
        ({**TWO, "RANK": "2"}, "RANK is 2 and LOCAL_RANK 1, but both must be from 0 to WORLD_SIZE - 1, which is 1"),
        ({**TWO, "RANK": "-1"}, "RANK must be a whole number, not '-1'"),
        ({**TWO, "WORLD_SIZE": "two"}, "WORLD_SIZE must be a whole number, not 'two'"),
        ({**TWO, "MASTER_PORT": "x"}, "MASTER_PORT must be a whole number, not 'x'"),
        ({"WORLD_SIZE": "0"}, "from 0 to WORLD_SIZE - 1"),
        ({"LOCAL_RANK": "9" * 30}, "LOCAL_RANK must be a whole number"),
    ],
)
def test_places_that_cannot_be(
    values: dict[str, str], message: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    variables(monkeypatch, values)
    assert main([*SMALL, *steps(1), "--run", str(tmp_path / "run")]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1 and "unset these" in error
    assert not (tmp_path / "run").exists()


def test_restarts(monkeypatch: pytest.MonkeyPatch) -> None:
    for value, expected in (("0", False), ("3", True), ("", False)):
        monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", value)
        assert starts_again() is expected
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "x")
    with pytest.raises(UserError, match="TORCHELASTIC_MAX_RESTARTS must be a whole number"):
        starts_again()


def test_accelerate_sees_the_launcher_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = {"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4", "OMPI_COMM_WORLD_SIZE": "4", "FSDP_VERSION": "2"}
    variables(monkeypatch, {**settings, "LOCAL_RANK": "0"})
    with only_the_launcher():
        assert not {*settings, "LOCAL_RANK"} & os.environ.keys()
    assert {name: os.environ[name] for name in settings} == settings and os.environ["LOCAL_RANK"] == "0"
    variables(monkeypatch, TWO)
    with only_the_launcher():
        assert {name: os.environ[name] for name in TWO} == TWO


STRAY = {
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4",
    "ACCELERATE_MIXED_PRECISION": "bf16",
    "ACCELERATE_DYNAMO_BACKEND": "INDUCTOR",
    "ACCELERATE_TORCH_DEVICE": "meta",
    "ACCELERATE_USE_CPU": "nonsense",
    "OMPI_COMM_WORLD_SIZE": "4",
    "PMI_SIZE": "2",
    "MPLBACKEND": "nonsense",
    "LOCAL_RANK": "0",
    "WORLD_SIZE": "1",
}


@pytest.mark.slow
def test_stray_variables_change_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    arguments = [*SMALL, *steps(2), "--stage", "autoencoder"]
    assert main([*arguments, "--run", str(tmp_path / "plain")]) == 0
    _reset()
    variables(monkeypatch, STRAY)
    assert main([*arguments, "--run", str(tmp_path / "stray")]) == 0
    assert losses(tmp_path / "plain", "autoencoder") == losses(tmp_path / "stray", "autoencoder")
    assert same_weights(tmp_path / "plain", tmp_path / "stray", "autoencoder")


def _reset() -> None:
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.parametrize("name", ["DEEPSPEED", "FSDP", "MEGATRON_LM"])
def test_other_ways_to_train_are_refused(
    name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(f"ACCELERATE_USE_{name}", "true")
    assert main([*SMALL, *steps(1), "--run", str(tmp_path / "run")]) == 2
    assert f"ACCELERATE_USE_{name} is set, but accelerate's {name} is not supported" in capsys.readouterr().err


@pytest.mark.slow
def test_the_caller_s_defaults_of_pytorch_change_nothing(tmp_path: Path) -> None:
    arguments = [*SMALL, *steps(2)]
    assert main([*arguments, "--run", str(tmp_path / "plain")]) == 0
    _reset()
    torch.set_default_dtype(torch.float64)
    torch.set_default_device("meta")
    try:
        with torch.inference_mode():
            assert main([*arguments, "--run", str(tmp_path / "odd")]) == 0
        assert torch.get_default_dtype() == torch.float64 and torch.get_default_device().type == "meta"
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_default_device(None)
    for model in ("autoencoder", "denoiser"):
        assert same_weights(tmp_path / "plain", tmp_path / "odd", model)


def test_gradients_are_taken_whatever_the_caller_switched_off() -> None:
    with torch.no_grad():
        with plain_torch():
            assert torch.is_grad_enabled()
        assert not torch.is_grad_enabled()


def test_the_user_s_style_of_drawing_changes_nothing(tmp_path: Path) -> None:
    """If LaTeX isn't installed, its style would end the run at its first picture."""
    import matplotlib

    from pvdm_fast.training.previews import write_loss_curves, write_picture

    with matplotlib.rc_context({"text.usetex": True, "savefig.format": "nothing", "font.size": 1e9}):
        write_picture(tmp_path / "a.png", [("a", torch.zeros(3, 2, 4, 4))])
        write_loss_curves(tmp_path / "b.png", [{"stage": "autoencoder", "step": 1, "loss": 1.0}])
    assert (tmp_path / "a.png").is_file() and (tmp_path / "b.png").is_file()
