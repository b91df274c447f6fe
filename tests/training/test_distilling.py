"""Distilled runs: they resume exactly, everything that follows takes their models, and what can't be is refused."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from shutil import copytree

import numpy as np
import pytest
import torch
from tolerances import PROCESSES_RECORDS, PROCESSES_WEIGHTS
from training.jobs import run_job
from training.small import SMALL, assert_refused, losses, same_weights, weights
from training.test_processes import distance

from pvdm_fast import PVDMPipeline
from pvdm_fast.diffusion.sampling import SamplingOptions, sample_video
from pvdm_fast.diffusion.schedulers import FlowEulerScheduler, FlowHeunScheduler, FlowUniPCScheduler
from pvdm_fast.distill import main as distill
from pvdm_fast.distill import parse
from pvdm_fast.errors import UserError
from pvdm_fast.evaluate import main as evaluate
from pvdm_fast.jobs.checksums import NAME, write_checksums
from pvdm_fast.models import Autoencoder, Denoiser
from pvdm_fast.sample import main as sample
from pvdm_fast.train import main as train
from pvdm_fast.training import checkpoint
from pvdm_fast.training.run_folder import RunFolder
from pvdm_fast.training.trainer import Trainer

FLOW = [
    *("--diffusion-prediction", "flow", "--diffusion-schedule", "constant", "--autoencoder-steps", "1"),
    *("--diffusion-normalize-latents", "--diffusion-time-shift", "2", "--diffusion-time-mean", "-0.5"),
]


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("teacher") / "run"
    assert train([*SMALL, *FLOW, "--diffusion-steps", "2", "--run", str(run)]) == 0
    return run


SAMPLER = {"distribution": "stochastic", "path": "euler"}
TWO = ("--steps", "2", "--guidance", "1")


@pytest.fixture(scope="module", params=["distribution", pytest.param("path", marks=pytest.mark.slow)])
def student(teacher: Path, request: pytest.FixtureRequest) -> Path:
    """Six steps of training, without interruption, to sample in two."""
    run = teacher.with_name(request.param)
    method = ["--method", request.param] if request.param == "path" else []
    assert distill([str(teacher), *TWO, *method, "--training-steps", "6", "--out", str(run)]) == 0
    return run


@pytest.fixture(scope="module")
def matched(teacher: Path) -> Path:
    """A student by distribution matching."""
    run = teacher.with_name("matched")
    assert distill([str(teacher), *TWO, "--training-steps", "3", "--out", str(run)]) == 0
    return run


@pytest.fixture(scope="module")
def guide(teacher: Path) -> Path:
    """A student that can teach: it follows its teacher's path."""
    assert distill([str(teacher), *TWO, "--method", "path", "--training-steps", "1"]) == 0
    return teacher.with_name("run-2-steps")


def test_a_student_is_a_run_that_knows_its_steps(teacher: Path, student: Path) -> None:
    config = Denoiser.load_config(student / "denoiser")
    taught = Denoiser.load_config(teacher / "denoiser")
    assert (config["distilled_steps"], taught["distilled_steps"]) == (2, None)
    assert all(config[name] == taught[name] for name in ("latent_mean", "latent_std", "time_shift", "model_channels"))
    assert same_weights(teacher, student, "autoencoder")
    assert not same_weights(teacher, student, "denoiser")
    before, kept = weights(teacher, "denoiser"), weights(student, "teacher")
    assert all(torch.equal(before[name], kept[name]) for name in before)
    assert np.isfinite(json.loads((student / "results.json").read_text())["diffusion"]["held_out_loss"])
    assert (student / "samples.mp4").stat().st_size > 0


def test_out_of_memory_is_said_with_the_estimate_and_its_own_options(
    teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def step(*arguments: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(Trainer, "train_step", step)
    run = tmp_path / "run"
    assert distill([str(teacher), "--out", str(run), "--training-steps", "3"]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("error: the diffusion stage is out of memory: python -m pvdm_fast.estimate puts a step of")
    assert line.partition("; ")[2] == (
        f"continue with python -m pvdm_fast.train --resume {run} --diffusion-checkpointing, or start a new run with a "
        "smaller --batch-size"
    )


def test_a_resumed_distillation_is_the_same(teacher: Path, student: Path, tmp_path: Path) -> None:
    """Also between two of the critic's turns."""
    run = tmp_path / "run"
    assert distill([str(teacher), *TWO, "--method", student.name, "--training-steps", "4", "--out", str(run)]) == 0
    assert train(["--resume", str(run), "--diffusion-steps", "6"]) == 0
    assert losses(run, "diffusion") == losses(student, "diffusion")
    assert same_weights(run, student, "denoiser")


def test_runs_from_before_there_were_methods_go_on(guide: Path, tmp_path: Path) -> None:
    """They followed a path, and their files don't say so."""
    run = tmp_path / "run"
    copytree(guide, run)
    for file in (run / "config.yaml", *run.glob(f"checkpoints/*/{checkpoint.CONFIG}")):
        lines = file.read_text().splitlines(keepends=True)
        kept = [line for line in lines if "method: " not in line]
        assert len(kept) == len(lines) - 1
        file.write_text("".join(kept))
    for sums in run.glob(f"checkpoints/*/{NAME}"):
        write_checksums(sums.parent)
    assert train(["--resume", str(run), "--diffusion-steps", "2"]) == 0
    assert RunFolder(run).read_config().distillation.method == "path"
    assert len(losses(run, "diffusion")) == 2


@pytest.mark.slow
def test_two_processes_match_as_one_does(teacher: Path, tmp_path: Path) -> None:
    """Two turns of each: student and critic learn from the same samples, whatever the number of processes."""
    job = [*SMALL, *FLOW[:-2], "--diffusion-sampling-steps", "50", "--stage", "diffusion", "--init-from", str(teacher)]
    job += ["--distillation-steps", "2", "--distillation-guidance", "2", "--diffusion-steps", "6"]
    assert train([*job, "--run", str(tmp_path / "one")]) == 0
    run_job([*job, "--run", str(tmp_path / "two")], tmp_path / "log")
    found, expected = (
        [[value or 0.0 for value in record] for record in losses(tmp_path / name, "diffusion")]
        for name in ("two", "one")
    )
    np.testing.assert_allclose(found, expected, rtol=PROCESSES_RECORDS)
    ours, theirs = (checkpoint.load(checkpoint.found(tmp_path / name / "checkpoints")[-1]) for name in ("two", "one"))
    for state in (ours, theirs):
        state["critic"] = state["stage"]["critic"]["nets"]
    for model in ("model", "critic"):
        assert distance(list(ours[model].values()), list(theirs[model].values())) < PROCESSES_WEIGHTS, model


def test_the_students_folder_stands_beside_the_teachers(teacher: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where RUN is the folder that one is in, or written with a slash at its end."""
    monkeypatch.chdir(teacher / "denoiser")
    for words, name in (([".."], "run-4-steps"), ([f"{teacher}/", "--steps", "1"], "run-1-step")):
        assert parse(words).run == teacher.with_name(name)
    monkeypatch.chdir(teacher)
    assert parse(["."]).run == teacher.with_name("run-4-steps")


@pytest.mark.parametrize(("method", "steps"), [("distribution", 3), pytest.param("path", 1, marks=pytest.mark.slow)])
def test_guidance_is_learned_along(teacher: Path, tmp_path: Path, method: str, steps: int) -> None:
    shared = [*SMALL, *FLOW[:-2], "--stage", "diffusion", "--init-from", str(teacher), "--diffusion-steps", str(steps)]
    options = ["--diffusion-conditional-probability", "1", "--diffusion-sampling-steps", "50"]
    for guidance in ("0", "2"):
        more = ["--distillation-steps", "2", "--distillation-method", method, "--distillation-guidance", guidance]
        assert train([*shared, *options, *more, "--run", str(tmp_path / guidance)]) == 0
    assert not same_weights(tmp_path / "0", tmp_path / "2", "denoiser")


def test_it_is_sampled_without_being_told(student: Path, tmp_path: Path) -> None:
    """By the command, the pipeline and the function: two passes a clip, the same clips."""
    out = tmp_path / "out.npy"
    assert sample([str(student), "--out", str(out), "--clips", "2", "--frames", "7", "--device", "cpu"]) == 0
    pixels = np.load(out)
    models = [kind.from_pretrained(student / name).eval() for kind, name in MODELS]
    passes: list[float] = []

    def count(step: int, timestep: float, latent: torch.Tensor) -> torch.Tensor:
        passes.append(timestep)
        return latent

    videos = sample_video(*models, SamplingOptions(clips=2, frames=7), on_step=count)
    assert passes == pytest.approx([1000, 1000 * 2 / 3] * 2), "even times 1 and 1/2, shifted by 2, for both clips"
    assert np.abs(pixels.astype(float) - (videos.permute(0, 2, 3, 4, 1).numpy() + 1) * 127.5).max() < 1
    pipeline = PVDMPipeline.from_pretrained(student)
    pipeline.save_pretrained(tmp_path / "pipeline")
    loaded = PVDMPipeline.from_pretrained(tmp_path / "pipeline")
    for pipe in (pipeline, loaded):
        frames = pipe(num_frames=7, generator=torch.Generator().manual_seed(0)).frames
        assert np.abs(frames[0] * 255 - pixels[0]).max() < 1


MODELS = ((Autoencoder, "autoencoder"), (Denoiser, "denoiser"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--steps", "50"], "distilled to sample in 2 steps, not in 50"),
        (["--scheduler", "unipc"], "distilled for SAMPLER, not unipc"),
        (["--guidance", "1", "--frames", "8"], "can't be added to a distilled denoiser"),
        (["--eta", "0"], "--eta is DDIM's"),
    ],
)
def test_what_a_student_cannot_sample_is_refused(
    student: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    out = tmp_path / "out.npy"
    assert sample([str(student), "--out", str(out), "--device", "cpu", *options]) == 2
    error = capsys.readouterr().err
    message = message.replace("SAMPLER", SAMPLER[student.name])
    assert error.startswith("error: ") and message in error and error.count("\n") == 1, error
    assert not out.exists()


def test_other_schedulers_are_refused_in_python(student: Path) -> None:
    models = [kind.from_pretrained(student / name).eval() for kind, name in MODELS]
    other = FlowEulerScheduler(stochastic_sampling=SAMPLER[student.name] == "euler")
    unipc = FlowUniPCScheduler(prediction_type="flow_prediction", use_flow_sigmas=True)
    for scheduler in (unipc, FlowHeunScheduler(), other):
        with pytest.raises(UserError, match=f"distilled for {SAMPLER[student.name]}"):
            sample_video(*models, SamplingOptions(clips=1, frames=4, scheduler=scheduler))


def test_evaluation_takes_the_students_steps(student: Path, tmp_path: Path) -> None:
    options = ["--clips", "4", "--samples", "2", "--frames", "4", "--nearest-among", "0", "--device", "cpu"]
    assert evaluate([str(student), *options, "--out", str(tmp_path)]) == 0
    sampling = json.loads((tmp_path / "evaluation.json").read_text())["protocol"]["sampling"]
    assert (sampling["steps"], sampling["scheduler"]) == (2, SAMPLER[student.name])


def test_a_student_teaches_in_its_own_steps(guide: Path, tmp_path: Path) -> None:
    """One pass for each of the two: the student's student is taught by Euler steps at the same times."""
    run = tmp_path / "one"
    assert distill([str(guide), "--steps", "1", "--method", "path", "--training-steps", "1", "--out", str(run)]) == 0
    assert Denoiser.load_config(run / "denoiser")["distilled_steps"] == 1
    assert Denoiser.load_config(run / "teacher")["distilled_steps"] == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["--steps", "1"],
            "and knows its own steps only: name the run of the flow that taught it",
        ),
        (["--method", "path", "--steps", "3"], "for 2 steps itself: take a number that divides it with --steps"),
        (["--method", "path", "--steps", "1", "--guidance", "1"], "and no guidance"),
        (["--method", "path", "--steps", "1", "--solver-steps", "5"], "error: --solver-steps does nothing here"),
    ],
)
def test_what_a_student_cannot_teach_is_refused(
    guide: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    run = tmp_path / "run"
    assert distill([str(guide), *options, "--out", str(run)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error and error.count("\n") == 1, error
    assert not run.exists()


def test_what_cannot_be_distilled_is_refused_before_there_is_a_folder(
    finished: Path, teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    assert distill([str(finished), "--out", str(run)]) == 2  # it predicts v
    assert "only a flow can be distilled" in capsys.readouterr().err
    assert distill([str(tmp_path), "--out", str(run)]) == 2
    assert "holds no run" in capsys.readouterr().err
    flow = ["--diffusion-prediction", "flow", "--diffusion-sampling-steps", "50"]  # as many as is usual
    of_teacher = ["--init-from", str(teacher)]
    two = ["--distillation-steps", "2"]
    assert_refused([*flow, *two], "needs --stage diffusion and a trained flow", run, capsys)
    assert_refused([*flow, *two, *of_teacher], "needs --stage diffusion and a trained flow", run, capsys)
    for name, value in (("guidance", "1"), ("method", "path")):
        alone = [f"--distillation-{name}", value]
        assert_refused([*flow, *alone], "does nothing without --distillation-steps", run, capsys)
    assert distill([str(teacher), "--training-steps", "2", "--out", str(run)]) == 2
    assert "--training-steps must be 3 at least with --method distribution" in capsys.readouterr().err
    assert distill([str(teacher), "--training-steps", "3", "--solver-steps", "4", "--out", str(run)]) == 2
    assert "--solver-steps belongs to --method path" in capsys.readouterr().err
    longer = ["--stage", "diffusion", *of_teacher, *two, "--diffusion-steps", "3"]
    sharded = [*longer, "--fsdp", "--optimizer", "adamw"]
    assert_refused([*flow, *sharded], "--fsdp doesn't cut the critic", run, capsys)
    early = [*longer, "--early-stop", "3"]
    assert_refused([*flow, *early], "--early-stop goes by the held-out loss", run, capsys)
    guided = ["--stage", "diffusion", *of_teacher, *two, "--diffusion-sampling-guidance", "1"]
    assert_refused([*flow, *guided], "learns along with --distillation-guidance", run, capsys)
    other = ["--stage", "diffusion", *of_teacher, *two, "--diffusion-sampling-scheduler", "heun"]
    assert_refused([*flow, *other], "--diffusion-sampling-scheduler does nothing for a student", run, capsys)
    more = ["--stage", "diffusion", *of_teacher, *two, "--diffusion-sampling-steps", "7"]
    assert_refused([*flow, *more], "--diffusion-sampling-steps does nothing for a student", run, capsys)
    times = ["--stage", "diffusion", *of_teacher, *two, "--diffusion-time-mean", "1"]
    assert_refused([*flow, *times], "--diffusion-time-mean chooses the times of a flow", run, capsys)
    classes = ["--stage", "diffusion", *of_teacher, *two, "--diffusion-class-conditional"]
    assert_refused([*flow, *classes], "has no classes", run, capsys)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--early-stop", "3"], "--early-stop goes by the held-out loss"),
        (["--fsdp", "--optimizer", "adamw"], "--fsdp doesn't cut the critic"),
        (["--distillation-solver-steps", "4"], "belongs to --distillation-method path"),
        (["--diffusion-sampling-steps", "7"], "--diffusion-sampling-steps does nothing for a student"),
        (["--diffusion-sampling-scheduler", "heun"], "--diffusion-sampling-scheduler does nothing for a student"),
        (["--diffusion-time-mean", "1"], "--diffusion-time-mean chooses the times of a flow"),
    ],
)
def test_nor_on_resuming(matched: Path, options: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    before = (matched / "config.yaml").read_bytes()
    assert train(["--resume", str(matched), "--diffusion-steps", "9", *options]) == 2
    assert message in capsys.readouterr().err
    assert (matched / "config.yaml").read_bytes() == before


def test_solver_steps_are_a_paths_on_resuming_too(
    teacher: Path, guide: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A flow's students alone have them."""
    more = ["--distillation-solver-steps", "4", "--diffusion-steps", "3"]
    assert train(["--resume", str(teacher), *more]) == 2
    assert "--distillation-solver-steps does nothing without --distillation-steps" in capsys.readouterr().err
    one, again = tmp_path / "one", tmp_path / "again"
    assert distill([str(guide), "--steps", "1", "--method", "path", "--training-steps", "1", "--out", str(one)]) == 0
    capsys.readouterr()
    assert train(["--resume", str(one), *more]) == 2
    assert "--distillation-solver-steps does nothing here" in capsys.readouterr().err
    copytree(guide, again)
    assert train(["--resume", str(again), *more]) == 0


def test_a_matched_student_shows_no_path(matched: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert distill([str(matched), "--steps", "1", "--method", "path", "--out", str(tmp_path / "run")]) == 2
    assert "was distilled by distribution matching, and follows no path" in capsys.readouterr().err


def test_a_sharded_run_can_be_distilled(teacher: Path, tmp_path: Path) -> None:
    """One process has nothing to shard, and the critic isn't sharded."""
    run = tmp_path / "run"
    copytree(teacher, run)
    file = run / "config.yaml"
    file.write_text(file.read_text().replace("fsdp: false", "fsdp: true"))
    assert parse([str(run)]).changes["fsdp"] is False
    assert parse([str(run), "--method", "path"]).changes["fsdp"] is True


@pytest.mark.slow
def test_the_page_s_commands_run(teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    page = (Path(__file__).resolve().parents[2] / "docs" / "few_steps.md").read_text(encoding="utf-8")
    commands = [shlex.split(line)[2:] for line in re.findall(r"^python -m .*$", page, re.MULTILINE)]
    run = {"pvdm_fast.distill": distill, "pvdm_fast.sample": sample, "pvdm_fast.evaluate": evaluate}
    few = {
        "pvdm_fast.distill": ["--training-steps", "3"],
        "pvdm_fast.evaluate": ["--clips", "2", "--samples", "1", "--frames", "4", "--nearest-among", "0"],
    }
    for module, *words in commands:
        words = [str(teacher) if word == "RUN" else word for word in words]
        assert run[module]([*words, *few.get(module, [])]) == 0
    assert Path("four.mp4").stat().st_size > 0
    assert Denoiser.load_config("runs/one/denoiser")["distilled_steps"] == 1


def test_distilled_steps_go_with_a_flow() -> None:
    with pytest.raises(ValueError, match="needs prediction flow"):
        Denoiser.from_preset("tiny", prediction="noise", distilled_steps=4)
    with pytest.raises(ValueError, match="1 or more"):
        Denoiser.from_preset("tiny", distilled_steps=0)
