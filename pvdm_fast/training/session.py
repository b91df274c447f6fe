"""A training run from its configuration to its results: models, stages, pictures."""

from __future__ import annotations

import gc
import shutil
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError

from pvdm_fast.backends.precision import choose_precision
from pvdm_fast.data.latents import is_latents
from pvdm_fast.diffusion.sampling import SamplingOptions, names_in_turn, sample_video
from pvdm_fast.errors import Interrupted, UserError
from pvdm_fast.jobs import threads
from pvdm_fast.jobs.allocator import keep_freed_memory
from pvdm_fast.jobs.checksums import write_checksums
from pvdm_fast.jobs.command import out_of_memory
from pvdm_fast.jobs.environment import only_the_launcher, plain_torch
from pvdm_fast.jobs.files import copy_whole, whole_folder
from pvdm_fast.jobs.interrupt import StopRequest
from pvdm_fast.jobs.processes import Processes, lost_another
from pvdm_fast.jobs.progress import say
from pvdm_fast.training import checkpoint, previews, report
from pvdm_fast.training.building import (
    empty_autoencoder,
    existing_autoencoder,
    forget_job,
    make_accelerator,
    make_stage,
)
from pvdm_fast.training.config import TrainConfig, with_absolute_places
from pvdm_fast.training.encoding import cached_latents
from pvdm_fast.training.hyperparameters import StageOptions
from pvdm_fast.training.initialisation import initial_config
from pvdm_fast.training.options import Request
from pvdm_fast.training.resuming import Resumption, reopen, resumed_folder, resumption
from pvdm_fast.training.run_folder import RunFolder
from pvdm_fast.training.sharding import unsharded
from pvdm_fast.training.stages import AutoencoderStage, DiffusionStage, video_size
from pvdm_fast.training.tracking import make_trackers
from pvdm_fast.training.trainer import Trainer

if TYPE_CHECKING:
    from accelerate import Accelerator


class StageTooLarge(UserError):
    """A stage found no memory; ``config``: the run's, with one process's batch, and with its precision chosen."""

    def __init__(self, stage: str, config: TrainConfig, run: RunFolder, accelerator: Accelerator) -> None:
        options: StageOptions = getattr(config, stage)
        share = replace(options, batch_size=options.batch_size // accelerator.num_processes)
        weighed: dict[str, Any] = {stage: share, "mixed_precision": "bf16"}  # as fp16 does
        if accelerator.mixed_precision == "no":
            weighed["mixed_precision"] = "no"
        self.stage, self.config, self.device = stage, replace(config, **weighed), accelerator.device
        steps = [f"continue with python -m pvdm_fast.train --resume {run.path} --{stage}-checkpointing"] * (
            not options.checkpointing
        )
        if share.batch_size > 1:
            steps.append(
                f"start a new run with a smaller --{stage}-batch-size, and --{stage}-accumulate larger by as much"
            )
        if accelerator.mixed_precision == "no" and choose_precision("bf16", self.device).name == "bf16":
            steps.append("start a new run with --mixed-precision bf16")
        steps.append("take smaller clips or a smaller model")
        self.remedy = ", or ".join(steps)
        super().__init__(f"the {stage} stage is out of memory: {self.remedy}")


def run_training(request: Request) -> RunFolder:
    """Do what the command line asks for. Returns the run's folder.

    Raises:
        UserError: something that you can mend. Interrupted: a signal came, and everything is saved.
    """
    keep_freed_memory()
    with plain_torch(), only_the_launcher():
        return _run_training(replace(request, changes=with_absolute_places(request.changes)))


def _run_training(request: Request) -> RunFolder:
    resume = resumed_folder(request)
    resumed = resumption(resume, request) if resume else None
    config, source = (resumed.config, None) if resumed else initial_config(request.changes)
    with ExitStack() as ending:
        ending.enter_context(threads.chosen(config.threads, config.device))
        accelerator = make_accelerator(config)
        ending.callback(forget_job, accelerator)
        accelerator.wait_for_everyone()  # until all have seen whether there is a run to continue
        processes = Processes(accelerator)
        found = existing_autoencoder(config, resume)
        plan = report.make_plan(config, found or empty_autoencoder(config), accelerator, source)
        kept: dict[str, Any] = {} if found is None or resumed else {"autoencoder": found}
        if config.distillation.steps and source is not None:
            kept["teacher"] = source.denoiser
        run = RunFolder(processes.on_main(partial(claim_folder, request, resumed, config, kept, ending)))
        del source, kept  # each stage reads the models that it needs again
        if processes.main:
            print(plan.text(run.path), flush=True)
            run.trackers += map(ending.enter_context, make_trackers(config, run.path))
        try:
            train_stages(plan.stages, config, run, accelerator, ending.enter_context(StopRequest(processes)))
        except RuntimeError as error:
            if not lost_another(error):
                raise
            raise UserError(
                f"another process of this job ended or did not answer ({str(error).splitlines()[0]}); continue from "
                f"the last checkpoint with --resume {run.path}"
            ) from error
        if processes.main:
            print(report.summary(run), flush=True)
        accelerator.end_training()
    return run


def train_stages(
    names: Iterable[str], config: TrainConfig, run: RunFolder, accelerator: Accelerator, stop: StopRequest
) -> None:
    """Train the stages that have no results yet, one after another."""
    try:
        for name in names:
            if name not in stop.processes.on_main(run.results):
                train_stage(name, config, run, accelerator, stop)
            stop.check()
    except Interrupted:
        if accelerator.is_main_process:
            print(f"stopped and saved; continue with: python -m pvdm_fast.train --resume {run.path}", flush=True)
        raise


def claim_folder(
    request: Request, resumed: Resumption | None, config: TrainConfig, kept: Mapping[str, Any], ending: ExitStack
) -> Path:
    """Make or open the run's folder, and keep other trainers out of it until ``ending``.

    ``kept``: the models that a new run doesn't train but needs, by the name of their folder.
    """
    run = RunFolder(resumed.path) if resumed else RunFolder.create(request.run)
    ending.enter_context(run.locked())
    run.clean_up()
    if resumed:
        reopen(run, resumed)
    for name, model in kept.items():
        save_model(model, run.path / name)
    run.write_config(config)
    return run.path


def train_stage(name: str, config: TrainConfig, run: RunFolder, accelerator: Accelerator, stop: StopRequest) -> None:
    """Train one stage from its newest checkpoint, or from the start, and write its model and results."""
    newest = stop.processes.on_main(lambda: place_to_continue(name, run))
    stage = make_stage(name, config, run, accelerator, begins=newest is None)
    if isinstance(stage, DiffusionStage) and config.diffusion.cached_clips and not is_latents(Path(config.data)):
        stage.data = cached_latents(stage, config, run.latents, accelerator, stop)
    trainer = Trainer(stage, config, run, accelerator, stop)
    if newest is not None:
        trainer.restore(checkpoint.load(newest))
        if config.early_stop is not None:
            trainer.find_best()
    try:
        trainer.fit(lambda: show(trainer))
    except (MemoryError, RuntimeError) as error:
        if not out_of_memory(error):
            raise
        raise StageTooLarge(name, config, run, accelerator) from error
    if not trainer.progress.scores:  # it went on from a checkpoint with all its steps, now that fewer are asked for
        trainer.score()
    result = stage_result(trainer)
    if config.early_stop is not None:
        trainer.take_best()
        result |= {"best_step": trainer.progress.step} | _rounded(trainer.progress.scores)
    show(trainer)
    with stage.evaluation_weights():
        model: Any = accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)
        model = unsharded(model, trainer.processes.main)
        trainer.processes.on_main(lambda: write_results(trainer, model, result))
    if stage.data is not None:  # 18 KB a clip for `tiny`, and made again where they are wanted again
        trainer.processes.on_main(lambda: shutil.rmtree(run.latents, ignore_errors=True))
    accelerator.free_memory()


def stage_result(trainer: Trainer) -> dict[str, Any]:
    """What results.json says of a stage that ends here. ``planned_steps`` and ``scores_waited``: only of one that
    --early-stop ended."""
    progress = trainer.progress
    result = {"steps": progress.step, "seconds": round(progress.seconds, 1), **_rounded(progress.scores)}
    if trainer.stopped_early:
        waited, planned = progress.best["waited"], trainer.options.steps
        result |= {"planned_steps": planned, "scores_waited": waited}
        if trainer.processes.main:
            scores = "one held-out score" if waited == 1 else f"{waited} held-out scores"
            end = f"{trainer.stage.name} ends at step {progress.step}: {scores} without a new best"
            say(f"{end}; the best weights are those of step {progress.best['step']}")
    return {**result, "unreadable_files": progress.unreadable}


def _rounded(scores: dict[str, float]) -> dict[str, float]:
    return {key: round(value, 4) for key, value in scores.items()}


def write_results(trainer: Trainer, model: Any, result: dict[str, Any]) -> None:
    """Save a finished stage's model, then mark the stage as finished."""
    name, run = trainer.stage.name, trainer.run
    save_model(model, run.path / ("autoencoder" if name == "autoencoder" else "denoiser"))
    run.record_result(name, result)


def place_to_continue(stage: str, run: RunFolder) -> checkpoint.Checkpoint | None:
    """The newest good checkpoint of a stage. Drops later records."""
    newest, passed_over = checkpoint.newest_good(run.checkpoints)
    for sentence in passed_over:
        print(sentence)
    if newest is None or newest.stage_name != stage:
        run.forget_after(stage, 0)
        return None
    run.forget_after(stage, newest.step)
    print(f"continuing the {stage} stage after step {newest.step}", flush=True)
    return newest


def save_model(model: Any, path: Path) -> None:
    """``save_pretrained``, complete or not at all."""
    try:
        with whole_folder(path) as temporary:
            model.save_pretrained(temporary)
            write_checksums(temporary)
    except (OSError, SafetensorError) as error:  # the latter's writer has errors of its own
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"cannot write the model folder {path}: {reason}") from error


def show(trainer: Trainer) -> None:
    """Write videos, picture and curves, with the weights that will be saved.

    Every process computes the same, and the main one writes.
    """
    run, stage, config = trainer.run, trainer.stage, trainer.config
    autoencoder: Any = stage.model if isinstance(stage, AutoencoderStage) else stage.autoencoder  # type: ignore[attr-defined]
    with torch.no_grad(), stage.evaluation_weights(), trainer.accelerator.autocast():
        frames = video_size(autoencoder)[0]
        clips = next(trainer.held_out())[0][: previews.SHOWN_CLIPS]
        cached = clips.dim() == 4  # latents
        latents = clips[:, 0] if cached else autoencoder.encode(clips[:, :, :frames]).latent
        reconstructions = autoencoder.decode(latents).sample.float()
        originals = clips[:, :, :frames]
        rows = []
        for index in range(min(3, len(clips))):
            if not cached:
                rows.append(("held-out clip", originals[index]))
            rows.append(("held-out latents, decoded" if cached else "its reconstruction", reconstructions[index]))
        if isinstance(stage, DiffusionStage):
            options = SamplingOptions(
                clips=previews.SHOWN_CLIPS,
                frames=2 * frames,
                seed=config.seed,
            )
            samples = sample_video(autoencoder, stage.model, options, progress=lambda done, total: trainer.stop.check())
            shown = samples[: previews.SHOWN_SAMPLES]
            names = [f" of the class {name}" for name in names_in_turn(stage.model, range(len(shown)))]
            labels = [f"sample{name}, {2 * frames} frames" for name in names or [""] * len(shown)]
            rows += zip(labels, shown, strict=True)

    def write() -> None:
        name = f"{stage.name}-step-{trainer.progress.step}"
        video, picture = run.previews / f"{name}.mp4", run.previews / f"{name}.png"
        run.previews.mkdir(exist_ok=True)
        if isinstance(stage, DiffusionStage):
            previews.write_samples(video, samples, config.video.fps)
        else:
            previews.write_reconstructions(video, originals, reconstructions, config.video.fps)
        previews.write_picture(picture, rows)
        newest = run.path / ("samples.mp4" if isinstance(stage, DiffusionStage) else "reconstructions.mp4")
        copy_whole(video, newest)
        copy_whole(picture, run.path / "grid.png")
        previews.write_loss_curves(run.path / "loss.png", run.records())
        for tracker in run.trackers:
            tracker.show(stage.name, trainer.progress.step, video, picture)

    trainer.processes.on_main(write)
    gc.collect()  # a figure is a reference cycle: 2 MB per preview stayed until the garbage collector ran
