"""The training loop, the same for both stages: steps, records, checkpoints, and stopping without losing anything."""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from pvdm_fast.data import make_loader, open_dataset
from pvdm_fast.errors import NonFiniteLossError
from pvdm_fast.training import checkpoint
from pvdm_fast.training.config import StageOptions, TrainConfig
from pvdm_fast.training.interrupt import StopRequest
from pvdm_fast.training.progress import StepBar
from pvdm_fast.training.run_folder import RunFolder
from pvdm_fast.training.stages import Stage

if TYPE_CHECKING:
    from accelerate import Accelerator

    from pvdm_fast.data import Batch, ClipDataset


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
    """Where a stage is: what a checkpoint holds besides tensors."""

    step: int = 0
    draw: int = 0
    skipped_in_a_row: int = 0
    seconds: float = 0.0
    unreadable: dict[str, str] = field(default_factory=dict)


class Trainer:
    """Trains one stage of a run; everything that changes is in ``progress``, the model, optimizer and stage state."""

    def __init__(
        self, stage: Stage, config: TrainConfig, run: RunFolder, accelerator: Accelerator, stop: StopRequest
    ) -> None:
        self.stage, self.config, self.run, self.accelerator, self.stop = stage, config, run, accelerator, stop
        self.options = options = stage.options
        self.progress = Progress()
        stage.to(accelerator.device)
        optimizer = torch.optim.AdamW(
            stage.model.parameters(),
            lr=options.learning_rate,
            betas=(options.beta1, options.beta2),
            weight_decay=options.weight_decay,
            fused=True,
        )
        self.model, self.optimizer = accelerator.prepare(stage.model, optimizer)

    def fit(self, preview: Callable[[], object]) -> None:
        """Take the steps that are left; ``preview`` is called between steps every ``preview_every`` of them.

        Raises:
            Interrupted: a signal came; everything is saved.
            NonFiniteLossError: too many steps in a row had a loss that is not finite.
            UserError: a checkpoint or the records could not be written, or the data gave out.
        """
        self.model.train()
        batches = self.batches()
        with StepBar(self.stage.name, self.options.steps, self.progress.step) as bar:
            while self.progress.step < self.options.steps:
                started = time.perf_counter()
                outcome = self.train_step([next(batches) for _ in range(self.options.accumulate)])
                self.progress.seconds += (seconds := time.perf_counter() - started)
                record = self.record(outcome, seconds)
                bar.advance(record, self.options.batch_size * self.options.accumulate / seconds)
                finished = self.progress.step == self.options.steps
                preview_due = self.progress.step % self.config.preview_every == 0 and not finished
                if finished or preview_due or self.stop.number or self.progress.step % self.config.save_every == 0:
                    self.save()
                self.stop.check()
                if preview_due:
                    preview()

    def train_step(self, batches: list[Batch]) -> dict[str, Any]:
        """One optimizer step over ``batches``; the values to record, with "skipped" where the step was left out."""
        number = self.progress.step
        rate = learning_rate(self.options, number)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.zero_grad(set_to_none=True)
        total = 0.0
        for index, batch in enumerate(batches):
            generator = step_generator(self.config.seed, self.stage.name, number, index)
            video = batch["video"].to(self.accelerator.device, non_blocking=True)
            with self.accelerator.autocast():
                loss = self.stage.loss(self.model, video, generator, batch["labels"]) / len(batches)
            total += loss.item()
            if not math.isfinite(total):
                return self.skip(batches, f"a loss of {total}")
            self.accelerator.backward(loss)
        norm = float(self.accelerator.clip_grad_norm_(self.model.parameters(), self.options.clip_norm))
        if not math.isfinite(norm) and self.accelerator.scaler is None:
            return self.skip(batches, f"a gradient norm of {norm}")
        self.optimizer.step()
        self.stage.after_step()
        self.progress.skipped_in_a_row = 0
        self.count(batches)
        return {"loss": total, "learning_rate": rate, "gradient_norm": norm if math.isfinite(norm) else None}

    def skip(self, batches: list[Batch], reason: str) -> dict[str, Any]:
        """Leave a step out whose loss or gradient is not finite; after too many in a row, save aside and stop."""
        names = [name for batch in batches for name in batch["names"]]
        self.progress.skipped_in_a_row += 1
        self.count(batches)
        if self.progress.skipped_in_a_row > self.config.max_skipped:
            step = self.progress.step
            path = checkpoint.save(self.run.path / "failed", self.stage.name, step, self.state(), keep=1)
            raise NonFiniteLossError(
                f"step {step} of the {self.stage.name} stage had {reason}, and the {self.config.max_skipped} steps "
                f"before it were not finite either; its clips were {', '.join(names)}; the state is saved in {path}, "
                f"while --resume {self.run.path} goes back to the last good checkpoint"
            )
        return {"loss": None, "skipped": reason, "clips": names}

    def count(self, batches: list[Batch]) -> None:
        """A step is done, or left out: go on with the next draws."""
        self.progress.step += 1
        for batch in batches:
            self.progress.draw += len(batch["names"])
            self.progress.unreadable.update(batch["skipped"])

    def record(self, outcome: dict[str, Any], seconds: float) -> dict[str, Any]:
        record = {"stage": self.stage.name, "step": self.progress.step, **outcome, "seconds": round(seconds, 4)}
        self.run.append_metrics(record)
        return record

    def dataset(self, split: str) -> ClipDataset:
        """The clips of a split, of the size this stage's model takes."""
        video, model = self.config.video, self.stage
        return open_dataset(
            self.config.data,
            frames=model.clip_frames,
            height=model.height,
            width=model.width,
            stride=video.stride,
            split=split,
            seed=self.config.seed,
            flip=video.flip,
        )

    def batches(self) -> Iterator[Batch]:
        """Training batches from the next draw on, without end."""
        loader = make_loader(
            self.dataset("train"),
            batch_size=self.options.batch_size,
            start_draw=self.progress.draw,
            workers=self.config.video.workers,
            pin_memory=self.accelerator.device.type == "cuda",
        )
        return iter(loader)

    def held_out(self) -> Iterator[torch.Tensor]:
        """Batches of held-out clips (B, 3, T, H, W) on the model's device, the same ones each time."""
        dataset = self.dataset("test")
        count = min(self.config.held_out_clips, len(dataset))
        for first in range(0, count, self.options.batch_size):
            clips = [dataset[draw]["video"] for draw in range(first, min(count, first + self.options.batch_size))]
            yield torch.stack(clips).to(self.accelerator.device)

    @torch.no_grad()
    def score(self) -> dict[str, float]:
        """Held-out scores with the weights that will be saved, also written to the records."""
        with self.stage.evaluation_weights(), self.accelerator.autocast():
            scores = self.stage.score(self.held_out())
        self.run.append_metrics({"stage": self.stage.name, "step": self.progress.step, **scores})
        return scores

    def state(self) -> dict[str, Any]:
        """Everything that continuing exactly needs."""
        scaler = self.accelerator.scaler
        return {
            "progress": vars(self.progress),
            "model": self.accelerator.unwrap_model(self.model).state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": scaler.state_dict() if scaler is not None else None,
            "stage": self.stage.state(),
            "random": checkpoint.random_states(),
        }

    def save(self) -> None:
        checkpoint.save(self.run.checkpoints, self.stage.name, self.progress.step, self.state())

    def restore(self, state: dict[str, Any]) -> None:
        """Continue from what :meth:`state` returned."""
        self.progress = Progress(**state["progress"])
        self.accelerator.unwrap_model(self.model).load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.accelerator.scaler is not None and state["scaler"] is not None:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        self.stage.restore(state["stage"])
        checkpoint.restore_random_states(state["random"])
