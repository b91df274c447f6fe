"""Several processes, joined by Gloo on this machine: equal to one, in agreement, and what happens if one is lost."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from shutil import copytree, rmtree
from types import SimpleNamespace

import numpy as np
import psutil
import pytest
import torch
from tolerances import PROCESSES_GRADIENTS, PROCESSES_LONG, PROCESSES_RECORDS, PROCESSES_WEIGHTS
from training.jobs import finish, run_job, start_job
from training.small import SMALL, checkpoint_names, losses, steps, wait_for, weights

from pvdm_fast.diffusion.noise import joint_batch
from pvdm_fast.errors import UserError
from pvdm_fast.jobs.share import Share
from pvdm_fast.train import main
from pvdm_fast.training import checkpoint
from pvdm_fast.training.building import check_processes
from pvdm_fast.training.config import make_config
from pvdm_fast.training.options import parse
from pvdm_fast.training.resuming import resumed_folder
from pvdm_fast.training.run_folder import RunFolder
from pvdm_fast.training.stages import AutoencoderStage

# one stage has two passes per step and recomputation, and there is a checkpoint in the middle
JOB = [*SMALL, *steps(4), "--save-every", "2", "--autoencoder-accumulate", "2", "--autoencoder-checkpointing"]
STAGES = ("autoencoder", "diffusion")


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The job in one process."""
    from accelerate.state import AcceleratorState

    run = tmp_path_factory.mktemp("alone") / "run"
    assert main([*JOB, "--run", str(run)]) == 0
    AcceleratorState._reset_state(reset_partial_state=True)
    return run


@pytest.fixture(scope="module", params=["data parallel", "sharded"])
def together(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The job in two processes."""
    folder = tmp_path_factory.mktemp("together")
    run_job([*JOB, *(["--fsdp"] if request.param == "sharded" else []), "--run", str(folder / "run")], folder / "log")
    assert "Warning" not in (folder / "log0").read_text()
    assert not (folder / "log1").read_text(), "only the main process prints"
    return folder / "run"


def assert_same_run(run: Path, expected: Path) -> None:
    """Records, gradients and weights equal another run's, up to rounding."""
    for stage in STAGES:
        np.testing.assert_allclose(losses(run, stage), losses(expected, stage), rtol=PROCESSES_RECORDS, err_msg=stage)
    scores, expected_scores = (json.loads((item / "results.json").read_text()) for item in (run, expected))
    assert scores["autoencoder"]["psnr"] == pytest.approx(expected_scores["autoencoder"]["psnr"], rel=PROCESSES_WEIGHTS)
    assert scores["diffusion"]["held_out_loss"] == pytest.approx(
        expected_scores["diffusion"]["held_out_loss"], rel=PROCESSES_WEIGHTS
    )
    a, b = (checkpoint.load(checkpoint.found(item / "checkpoints")[-1]) for item in (run, expected))
    assert a["progress"]["draw"] == b["progress"]["draw"] == 8
    gradients = [[entry["exp_avg"] for entry in state["optimizer"]["state"].values()] for state in (a, b)]
    assert distance(*gradients) < PROCESSES_GRADIENTS, "AdamW's mean of the gradients"
    assert distance(*(state["stage"]["ema"]["shadow_params"] for state in (a, b))) < PROCESSES_WEIGHTS
    for model in ("autoencoder", "denoiser"):
        saved, expected_weights = weights(run, model), weights(expected, model)
        assert saved.keys() == expected_weights.keys()
        assert distance(list(saved.values()), list(expected_weights.values())) < PROCESSES_WEIGHTS, model


def distance(values: list[torch.Tensor], expected: list[torch.Tensor]) -> float:
    """The distance of all tensors together, relative to their norm.

    It isn't taken per tensor. The gradient of a bias just before a norm is only rounding errors, and AdamW makes these
    as large as a step.
    """
    assert all(type(value) is torch.Tensor for value in values)
    a, b = (torch.cat([value.flatten() for value in group]) for group in (values, expected))
    return float((a - b).norm() / b.norm())


@pytest.mark.slow
def test_two_processes_train_as_one_does(alone: Path, together: Path) -> None:
    assert_same_run(together, alone)


def forget_the_end(run: Path) -> None:
    """As if the job had been lost after step 2 of the second stage."""
    results = json.loads((run / "results.json").read_text())
    (run / "results.json").write_text(json.dumps({"autoencoder": results["autoencoder"]}))
    rmtree(run / "checkpoints" / "diffusion-step-0000004")
    assert checkpoint_names(run) == ["diffusion-step-0000002"]


@pytest.mark.slow
def test_one_process_continues_what_two_began(alone: Path, together: Path, tmp_path: Path) -> None:
    run = copytree(together, tmp_path / "run")
    forget_the_end(run)
    assert main(["--resume", str(run)]) == 0
    assert_same_run(run, alone)


@pytest.mark.slow
def test_two_processes_continue_what_one_began(alone: Path, tmp_path: Path) -> None:
    """Sharded, unlike the original run."""
    run = copytree(alone, tmp_path / "run")
    forget_the_end(run)
    assert "continuing the diffusion stage after step 2" in run_job(["--resume", str(run), "--fsdp"], tmp_path / "log")
    assert_same_run(run, alone)


def going(run: Path, processes: list) -> None:
    """Waits until some steps are taken."""
    deadline = time.monotonic() + 300
    while not (run / "metrics.jsonl").exists() or len(losses(run, "autoencoder")) < 3:
        assert time.monotonic() < deadline
        assert all(process.exitcode is None for process in processes)
        time.sleep(0.1)


@pytest.mark.slow
def test_a_signal_to_any_process_stops_all_after_saving(tmp_path: Path) -> None:
    run = tmp_path / "run"
    processes = start_job([*SMALL, *steps(100_000), "--run", str(run)], tmp_path / "log")
    going(run, processes)
    os.kill(processes[1].pid, signal.SIGTERM)
    assert finish(processes) == [128 + signal.SIGTERM] * 2, (tmp_path / "log0").read_text()
    assert f"continue with: python -m pvdm_fast.train --resume {run}" in (tmp_path / "log0").read_text()
    newest, _ = checkpoint.newest_good(run / "checkpoints")
    assert newest is not None
    assert newest.step == losses(run, "autoencoder")[-1][0]


@pytest.mark.slow
def test_a_second_trainer_is_refused_and_a_lost_process_ends_the_job(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    processes = start_job([*SMALL, *steps(100_000), "--save-every", "2", "--run", str(run)], tmp_path / "log")
    going(run, processes)
    before = (run / "config.yaml").read_text()
    assert main(["--resume", str(run), "--workers", "1"]) == 2
    error = capsys.readouterr().err
    assert f"another trainer (process {processes[0].pid} on " in error
    assert error.count("\n") == 1
    assert (run / "config.yaml").read_text() == before
    os.kill(processes[1].pid, signal.SIGKILL)
    assert finish(processes) == [2, -signal.SIGKILL]
    log = (tmp_path / "log0").read_text()
    assert "another process of this job ended or did not answer" in log
    assert f"--resume {run}" in log
    assert "Traceback" not in log
    newest, _ = checkpoint.newest_good(run / "checkpoints")
    assert newest is not None
    assert main(["--resume", str(run), "--stage", "autoencoder", "--autoencoder-steps", str(newest.step + 1)]) == 0
    assert f"continuing the autoencoder stage after step {newest.step}" in capsys.readouterr().out


def poison_second_process() -> None:
    """Makes the loss of its third pass NaN."""
    if os.environ["RANK"] == "1":
        original, seen = AutoencoderStage.loss, []

        def loss(self: AutoencoderStage, *arguments: object) -> torch.Tensor:
            seen.append(None)
            return original(self, *arguments) * (float("nan") if len(seen) == 3 else 1.0)  # type: ignore[arg-type]

        AutoencoderStage.loss = loss  # type: ignore[method-assign,assignment]


@pytest.mark.slow
def test_all_leave_a_step_out_where_one_loss_is_not_finite(tmp_path: Path) -> None:
    run = tmp_path / "run"
    arguments = [*SMALL, *steps(4), "--stage", "autoencoder", "--run", str(run)]
    run_job(arguments, tmp_path / "log", before=poison_second_process)
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    skipped = [record for record in records if "skipped" in record]
    assert [record["step"] for record in skipped] == [3]
    assert skipped[0]["clips"] == ["synthetic:shapes/train/4", "synthetic:shapes/train/5"], "of both processes"
    assert all(torch.isfinite(tensor).all() for tensor in weights(run, "autoencoder").values())


@pytest.mark.parametrize(
    ("changes", "kind", "sentence"),
    [
        (
            {"diffusion.batch_size": 9},
            "MULTI_GPU",
            "--diffusion-batch-size 9 cannot be shared evenly among 2 processes",
        ),
        ({"fsdp": True, "mixed_precision": "fp16"}, "MULTI_GPU", "--fsdp goes with --mixed-precision bf16 or no"),
        ({}, "DEEPSPEED", "accelerate's DEEPSPEED is not supported"),
    ],
)
def test_what_processes_cannot_do_is_said_once(changes: dict, kind: str, sentence: str) -> None:
    config = make_config(changes)
    for rank, exception in enumerate((UserError, SystemExit)):
        accelerator = SimpleNamespace(
            num_processes=2, process_index=rank, distributed_type=SimpleNamespace(value=kind), device="cpu"
        )
        with pytest.raises(exception, match=sentence if rank == 0 else "2"):
            check_processes(config, accelerator)  # type: ignore[arg-type]


def test_shares_of_a_batch_are_drawn_as_one() -> None:
    video = torch.randn(6, 3, 8, 2, 2)

    def draw(share: Share) -> tuple[torch.Tensor, torch.Tensor]:
        return joint_batch(share.of(video), lambda clip: clip, 0.5, torch.Generator().manual_seed(1), share)

    whole = draw(Share())
    for rank in range(3):
        for part, expected in zip(draw(Share(rank, 3)), whole, strict=True):
            assert torch.equal(part, expected[rank::3])


def commands(launcher: str) -> list[list[str]]:
    """The arguments of each of the page's commands that begin with ``launcher``."""
    page = (Path(__file__).parents[2] / "docs" / "distributed.md").read_text(encoding="utf-8")
    lines = [
        line for block in re.findall(r"^```\n(.*?)^```$", page, re.MULTILINE | re.DOTALL) for line in block.splitlines()
    ]
    # environment variables come before the launcher
    return [shlex.split(line.split(f"{launcher} ")[1]) for line in lines if f"{launcher} " in line]


def test_the_commands_of_the_page_parse() -> None:
    from accelerate.commands.launch import launch_command_parser
    from torch.distributed.run import get_args_parser

    for launcher, parser, number in (
        ("torchrun", get_args_parser(), 2),
        ("accelerate launch", launch_command_parser(), 1),
    ):
        found = [parser.parse_args(arguments) for arguments in commands(launcher)]
        assert len(found) == number
        for arguments in found:
            assert arguments.module and arguments.training_script == "pvdm_fast.train"
            assert parse(arguments.training_script_args).run == Path("RUN")


@pytest.mark.exhaustive
def test_a_launched_job_goes_on_by_itself_after_a_loss(tmp_path: Path) -> None:
    """The page's first command, with one of its processes killed in the middle of training."""
    run, job = tmp_path / "run", [*SMALL, "--autoencoder-steps", "40", "--stage", "autoencoder"]
    arguments = [str(run) if word == "RUN" else word for word in commands("torchrun")[0]]
    process = subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", *arguments, *job, "--save-every", "2"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"},
    )
    try:
        wait_for(lambda: (run / "metrics.jsonl").exists() and len(losses(run, "autoencoder")) > 4, process)
        (second,) = (
            child
            for child in psutil.Process(process.pid).children()
            if "pvdm_fast.train" in child.cmdline() and child.environ()["RANK"] == "1"
        )
        second.kill()
        output, _ = process.communicate(timeout=300)
    finally:
        process.terminate()
    assert process.returncode == 0, output
    assert "continuing the autoencoder stage after step" in output
    assert [step for step, _, _ in losses(run, "autoencoder")] == list(range(1, 41))
    assert main([*job, "--run", str(tmp_path / "alone")]) == 0
    np.testing.assert_allclose(
        losses(run, "autoencoder"), losses(tmp_path / "alone", "autoencoder"), rtol=PROCESSES_LONG
    )


def test_a_job_that_may_start_again_names_its_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "1")
    with pytest.raises(UserError, match="name it with --run-dir"):
        resumed_folder(parse([]))
    run = tmp_path / "run"
    assert resumed_folder(parse(["--run-dir", str(run)])) is None
    RunFolder.create(run).write_config(make_config({}))
    assert resumed_folder(parse(["--run-dir", str(run)])) == run
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "0")
    assert resumed_folder(parse(["--run-dir", str(run)])) is None
