"""The training loop, the same for both stages: steps, records, checkpoints, and stopping without losing anything."""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from pvdm_fast.data import make_loader, open_dataset
from pvdm_fast.data.watch import is_lasting
from pvdm_fast.errors import Interrupted, NonFiniteLossError, UserError
from pvdm_fast.jobs import threads
from pvdm_fast.jobs.interrupt import StopRequest
from pvdm_fast.jobs.processes import Processes
from pvdm_fast.jobs.progress import StepBar, say
from pvdm_fast.training import checkpoint
from pvdm_fast.training.config import TrainConfig, to_yaml
from pvdm_fast.training.feed import Feed
from pvdm_fast.training.hyperparameters import StageOptions
from pvdm_fast.training.optimizer import make_optimizer, optimizer_settings
from pvdm_fast.training.pace import Pace
from pvdm_fast.training.run_folder import RunFolder
from pvdm_fast.training.scores import Best, score_text
from pvdm_fast.training.sharding import load_model, load_optimizer, whole
from pvdm_fast.training.stages import Labelled, Stage

if TYPE_CHECKING:
    from accelerate import Accelerator

    from pvdm_fast.data import Batch, ClipDataset

PACE_SECONDS = 10.0  # of steps, after which a line says how long the stage takes
DATA_GAVE_OUT = 1_000_000  # what the processes agree on where no signal came: more than any signal's number
MEASURED_CLIPS = 32  # of which a stage learns what it needs of the data


def learning_rate(options: StageOptions, step: int) -> float:
    """The rate of step number ``step``, counted from 0: linear warm-up, then constant or a half cosine to near 0."""
    if step < options.warmup:
        return options.learning_rate * (step + 1) / (options.warmup + 1)
    if options.schedule == "constant":
        return options.learning_rate
    progress = (step - options.warmup) / max(1, options.steps - options.warmup)
    return options.learning_rate * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * progress)))


def step_generator(*parts: int | str) -> torch.Generator:
    """A CPU generator seeded by all of ``parts``: a step's noise depends on its number alone."""
    digest = hashlib.blake2b(":".join(map(str, parts)).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1)


@dataclass
class Progress:
    """Where a stage is: what a checkpoint holds besides tensors. ``scores`` are this very step's, or empty."""

    step: int = 0
    draw: int = 0
    skipped_in_a_row: int = 0
    seconds: float = 0.0
    unreadable: dict[str, str] = field(default_factory=dict)
    scores: dict[str, float] = field(default_factory=dict)
    best: dict[str, Any] = field(default_factory=lambda: vars(Best()))


class Trainer:
    """Trains one stage of a run. Everything that changes is in ``progress``, model, optimizer and stage state.

    All processes take the same steps, each with its share of the clips. The main one writes.
    """

    def __init__(
        self, stage: Stage, config: TrainConfig, run: RunFolder, accelerator: Accelerator, stop: StopRequest
    ) -> None:
        self.stage, self.config, self.run, self.accelerator, self.stop = stage, config, run, accelerator, stop
        self.processes = Processes(accelerator)
        self.options = options = stage.options
        self.progress = Progress()
        self.saved = 0  # the step of the newest checkpoint
        self.feed: Feed
        if stage.in_float32:  # no autocast around the model or inside it, and no loss scale
            accelerator.native_amp, accelerator.scaler = False, None
        stage.to(accelerator.device)
        optimizer = make_optimizer(config.optimizer, stage.model, options)
        sharded = any(isinstance(parameter, DTensor) for parameter in stage.model.parameters())
        self.model = stage.model if sharded else accelerator.prepare_model(stage.model)
        self.optimizer = accelerator.prepare_optimizer(optimizer)
        stage.prepare(accelerator)

    def fit(self, preview: Callable[[], object]) -> None:
        """Take the remaining steps, fewer with --early-stop. The last step is scored and saved.

        ``preview`` is called between steps, every ``preview_every`` steps, after the scores of that step.

        Raises:
            Interrupted: a signal came, and everything is saved.
            NonFiniteLossError: too many steps in a row had a loss that is not finite.
            UserError: a checkpoint or the records couldn't be written, or the data ran out.
        """
        self.begin()
        pace = Pace()
        with StepBar(self.stage.name, self.options.steps, self.progress.step, shown=self.processes.main) as bar:
            while not self.over:
                started = time.perf_counter()
                batches = self.read()
                with threads.unit("training step"):
                    outcome = self.train_step(batches)
                self.progress.seconds += (seconds := time.perf_counter() - started)
                record = self.record(outcome, seconds)
                bar.advance(record, self.options.batch_size * self.options.accumulate)
                pace.add(seconds)
                if pace.seconds - seconds < PACE_SECONDS <= pace.seconds and self.processes.main:
                    say(pace.line(self.stage.name, self.options.steps - self.progress.step))
                due = self.over or self.progress.step % self.config.preview_every == 0
                if due:
                    self.score()  # first, because it is part of what is saved
                if due or self.progress.step % self.config.save_every == 0:
                    self.save()
                if due and not self.over:
                    self.stop.check()
                    preview()

    @property
    def over(self) -> bool:
        """Whether all steps are taken, or --early-stop ends the stage."""
        return self.progress.step >= self.options.steps or self.stopped_early

    @property
    def stopped_early(self) -> bool:
        """Whether as many held-out scores as --early-stop says have come since the best one."""
        return self.config.early_stop is not None and self.progress.best["waited"] >= self.config.early_stop

    def begin(self) -> None:
        """Get ready to take steps."""
        with torch.no_grad(), self.accelerator.autocast():
            clips = (video for video, _ in self.clips("train", MEASURED_CLIPS))
            self.stage.before_training(clips, self.processes)
        self.model.train()
        self.feed = Feed(self.batches(), self.options.accumulate, self.accelerator.device, self.stop)

    def read(self) -> list[Batch]:
        """The batches of a step. A signal is answered here, also while they don't come. If they never do, no step is
        lost: the processes agree, save what they have, and stop.

        Raises:
            Interrupted: a signal came to one of the processes.
            UserError: the data of one of them gave out.
        """
        found: list[Batch] = []
        problem: UserError | None = None
        try:
            found = self.feed.take()
        except Interrupted:
            pass  # what all agree on counts
        except UserError as error:
            problem = error
        stop = self.processes.largest(self.stop.number or 0 if problem is None else DATA_GAVE_OUT)
        if not stop:
            return found
        if self.progress.step > self.saved:
            self.save()
        if stop != DATA_GAVE_OUT:
            raise Interrupted(stop)
        raise problem or UserError("the data of another process gave out, and it says why; everything is saved")

    def train_step(self, batches: list[Batch]) -> dict[str, Any]:
        """One optimizer step over ``batches``. Returns the values to record, with "skipped" if the step was skipped.

        Loss, gradient norm and what the stage measured come to the host together, after the backward pass. With one
        GPU it is the only place where it is waited for. Several also agree in `read` that all go on.
        """
        number = self.progress.step
        rate = learning_rate(self.options, number)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.zero_grad(set_to_none=True)
        self.stage.before_step(number)
        losses = [self.accumulate(batch, index, len(batches)) for index, batch in enumerate(batches)]
        norm = self.clip()
        measured = self.stage.measured()
        together = torch.stack([*losses, norm, *measured.values()])
        reading = self.processes.means(together.float())
        if number + 1 < self.options.steps:
            self.feed.read_ahead()
        found = reading.values()
        total, found_norm = sum(found[: len(losses)]), found[len(losses)]
        values = dict(zip(measured, found[len(losses) + 1 :], strict=True))
        if not math.isfinite(total):
            return self.skip(batches, f"a loss of {total}")
        if not math.isfinite(found_norm) and self.accelerator.scaler is None:
            return self.skip(batches, f"a gradient norm of {found_norm}")
        recorded = dict(values)
        if self.stage.trains_model:
            self.optimizer.step()
            recorded = {"gradient_norm": found_norm, **values}
        self.stage.after_step(values)
        self.progress.skipped_in_a_row = 0
        self.count(batches)
        finite = {name: value if math.isfinite(value) else None for name, value in recorded.items()}
        return {"loss": total, "learning_rate": rate, **finite}

    def clip(self) -> Tensor:
        """Scale down gradients that are longer than the options allow. Their norm before that, a scalar."""
        if not self.stage.trains_model:  # there are none, nor can a loss scale be taken off them
            return torch.zeros((), device=self.accelerator.device)
        longest = self.options.clip_norm or math.inf
        norm: Tensor = self.accelerator.clip_grad_norm_(self.model.parameters(), longest)
        return norm.full_tensor() if isinstance(norm, DTensor) else norm

    def accumulate(self, batch: Batch, index: int, count: int) -> Tensor:
        """Add the gradients of one of ``count`` batches of a step; its share of the step's loss."""
        generator = step_generator(self.config.seed, self.stage.name, self.progress.step, index)
        with nullcontext() if index == count - 1 else self.accelerator.no_sync(self.model):
            with self.accelerator.autocast():
                loss = self.stage.loss(self.model, batch["video"], generator, self.processes.share, batch["labels"])
                loss = loss / count
            self.accelerator.backward(loss)
        self.stage.after_backward()
        return loss.detach()

    def skip(self, batches: list[Batch], reason: str) -> dict[str, Any]:
        """Skip a step whose loss or gradient isn't finite. After too many in a row, save a copy and stop."""
        self.stage.after_skip()
        if self.accelerator.scaler is not None:
            self.accelerator.scaler.update(self.accelerator.scaler.get_scale())  # as it was, and ready to unscale again
        everyone = self.processes.gathered([name for batch in batches for name in batch["names"]])
        names = [name for position in zip(*everyone, strict=True) for name in position]
        self.progress.skipped_in_a_row += 1
        self.count(batches)
        if self.progress.skipped_in_a_row > self.config.max_skipped:
            step = self.progress.step
            path = self.save(self.run.path / "failed", keep=1)
            error = NonFiniteLossError(
                f"step {step} of the {self.stage.name} stage had {reason}, and the {self.config.max_skipped} steps "
                f"before it were not finite either; its clips were {', '.join(names)}; the state is saved in {path}, "
                f"while --resume {self.run.path} goes back to the last good checkpoint"
            )
            self.processes.fail(error)
        return {"loss": None, "skipped": reason, "clips": names}

    def count(self, batches: list[Batch]) -> None:
        """A step is done or skipped: continue with the next draws."""
        self.progress.step += 1
        self.progress.scores = {}
        for batch in batches:
            self.progress.draw += len(batch["names"]) * self.processes.share.world
            self.progress.unreadable.update(batch["skipped"])

    def record(self, outcome: dict[str, Any], seconds: float) -> dict[str, Any]:
        record = {"stage": self.stage.name, "step": self.progress.step, **outcome, "seconds": round(seconds, 4)}
        if self.processes.main:
            self.run.append_metrics(record)
        return record

    def dataset(self, split: str) -> ClipDataset:
        """The clips of a split, of the size this stage's model takes."""
        video, model = self.config.video, self.stage
        return open_dataset(
            model.data or self.config.data,
            frames=model.clip_frames,
            height=model.height,
            width=model.width,
            split=split,
            seed=self.config.seed,
            pad_short=model.pad_short,
            **video.drawing(),
        )

    def batches(self) -> Iterator[Batch]:
        """Training batches from the next draw on, without end."""
        share = self.processes.share
        dataset = self.dataset("train")
        for file, reason in self.progress.unreadable.items():
            if is_lasting(reason):  # as in the interrupted run
                dataset.set_aside(file, reason)
        loader = make_loader(
            dataset,
            batch_size=self.options.batch_size // share.world,
            start_draw=self.progress.draw,
            workers=self.config.video.workers,
            rank=share.rank,
            world=share.world,
            pin_memory=self.accelerator.device.type == "cuda",
            pixels=True,
        )
        return iter(loader)

    def held_out(self) -> Iterator[Labelled]:
        """Held-out clips, the same ones in every process."""
        return self.clips("test", self.config.held_out_clips)

    def clips(self, split: str, most: int) -> Iterator[Labelled]:
        """Batches of the first clips of a split, at ``most`` so many, on the model's device."""
        dataset = self.dataset(split)
        count = min(most, len(dataset))
        for first in range(0, count, self.options.batch_size):
            items = [dataset[draw] for draw in range(first, min(count, first + self.options.batch_size))]
            video = torch.stack([item["video"] for item in items]).to(self.accelerator.device)
            yield video, [item["label"] for item in items]

    @torch.no_grad()
    def score(self) -> None:
        """Held-out scores with the weights that will be saved, written to the records and said in a line.

        Every process computes them. The others would only wait, and a sharded model needs all processes. The main
        one's count: all must agree on the best.
        """
        with self.stage.evaluation_weights(), self.accelerator.autocast():
            scores = self.stage.score(self.held_out())
        self.progress.scores = scores = self.processes.on_main(lambda: scores)
        step, best = self.progress.step, Best(**self.progress.best)
        first, before = not best.scores, Best(**self.progress.best)
        is_best = best.add(scores, step)
        self.progress.best = vars(best)
        if self.processes.main:
            self.run.append_metrics({"stage": self.stage.name, "step": step, **scores})
            note = "" if first or not self.stage.ranks else ", the best so far"
            if not is_best and self.stage.ranks:
                note = f" (best: {score_text(before.scores)} at step {before.step})"
            say(f"{self.stage.name} step {step}: held-out {score_text(scores)}{note}")
        if is_best and self.config.early_stop is not None:
            self.save(self.run.best)

    def find_best(self) -> checkpoint.Checkpoint | None:
        """The best scores' checkpoint. Where there is none, as before --early-stop was given, the best is forgotten."""
        best = Best(**self.progress.best)
        places = self.processes.on_main(lambda: checkpoint.found(self.run.best))
        for place in places:
            if (place.stage_name, place.step) == (self.stage.name, best.step):
                return place
        if best.scores and self.processes.main:
            say(f"there is no checkpoint of the best scores in {self.run.best}: --early-stop counts from here")
        self.progress.best = vars(Best())
        return None

    def take_best(self) -> None:
        """Go back to the weights of the best scores, and to that step.

        Raises:
            UserError: their checkpoint is damaged.
        """
        place = self.find_best()
        if place is None or place.step == self.progress.step:
            return
        if problem := self.processes.on_main(lambda: checkpoint.damage(place)):
            error = f"{place.path} holds the best weights, but {problem}: put a good copy there, or take the last"
            self.processes.fail(UserError(f"{error} weights with --resume {self.run.path} --early-stop none"))
        self.restore(checkpoint.load(place))

    def state(self) -> dict[str, Any]:
        """Everything needed to continue exactly. It is the same for any number of processes, and the main one saves
        it."""
        scaler = self.accelerator.scaler
        for unreadable in self.processes.gathered(self.progress.unreadable):
            self.progress.unreadable.update(unreadable)
        state = {
            "progress": vars(self.progress),
            "model": self.accelerator.unwrap_model(self.model).state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": scaler.state_dict() if scaler is not None else None,
            "stage": self.stage.state(),
            "random": checkpoint.random_states(),
        }
        return whole(state, self.processes.main)

    def save(self, folder: Path | None = None, keep: int = checkpoint.KEPT) -> Path:
        """Write a checkpoint, by default among the run's own."""
        state, place = self.state(), (folder or self.run.checkpoints, self.stage.name, self.progress.step)
        path = self.processes.on_main(lambda: checkpoint.save(*place, state, keep=keep, config=to_yaml(self.config)))
        if folder is None:
            self.saved = self.progress.step
        return path

    def restore(self, state: dict[str, Any]) -> None:
        """Continue from what `state` returned, with the options as they now are."""
        self.progress = Progress(**state["progress"])
        self.saved = self.progress.step
        load_model(self.accelerator.unwrap_model(self.model), state["model"])
        load_optimizer(self.optimizer, state["optimizer"])
        for group in self.optimizer.param_groups:  # the state holds those that it was saved with
            group.update(optimizer_settings(self.options))
        if self.accelerator.scaler is not None and state["scaler"] is not None:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        self.stage.restore(state["stage"])
        checkpoint.restore_random_states(state["random"])
