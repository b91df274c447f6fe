"""Where a run can be followed besides its folder: TensorBoard and Weights & Biases (W&B).

Both get every record of metrics.jsonl and, at each preview, its video and its picture.
"""

from __future__ import annotations

import os
import tempfile
import uuid
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

import numpy as np

from pvdm_fast.data import write_video
from pvdm_fast.errors import UserError
from pvdm_fast.jobs.files import whole_file
from pvdm_fast.training.config import STAGES, TrainConfig, values_of

WANDB_PROJECT = "pvdm-fast"


class Tracker(Protocol):
    """A context manager that ends what it began."""

    def record(self, record: dict[str, Any]) -> None:
        """Take a record of metrics.jsonl."""

    def show(self, stage: str, step: int, video: Path, picture: Path) -> None:
        """Take a preview: an mp4 and a PNG."""

    def __enter__(self) -> Tracker: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


def check_trackers(config: TrainConfig) -> None:
    """Raises UserError if what --tensorboard or --wandb needs isn't installed."""
    if config.tensorboard:
        _summary_writer()
    if config.wandb:
        _wandb()


def make_trackers(config: TrainConfig, path: Path) -> list[Tracker]:
    """The trackers that the options name, for the run in the folder ``path``.

    Raises:
        UserError: a package is not installed, or W&B cannot start.
    """
    trackers: list[Tracker] = [TensorBoard(path)] if config.tensorboard else []
    return [*trackers, WandB(path, values_of(config))] if config.wandb else trackers


def _scalars(record: dict[str, Any]) -> dict[str, float]:
    return {f"{record['stage']}/{key}": value for key, value in record.items() if isinstance(value, float)}


class TensorBoard:
    """Logs in ``path``/tensorboard."""

    def __init__(self, path: Path) -> None:
        self.writer = _summary_writer()(path / "tensorboard")

    def record(self, record: dict[str, Any]) -> None:
        for name, value in _scalars(record).items():
            self.writer.add_scalar(name, value, record["step"])

    def show(self, stage: str, step: int, video: Path, picture: Path) -> None:
        from PIL import Image

        with Image.open(picture) as opened:
            self.writer.add_image(f"{stage}/frames", np.asarray(opened.convert("RGB")), step, dataformats="HWC")
        self.writer.file_writer.add_summary(_animation(f"{stage}/preview", video), step)
        self.writer.flush()

    def __enter__(self) -> TensorBoard:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.writer.close()


def _animation(tag: str, video: Path) -> Any:
    """A video as TensorBoard shows it: an image that is a GIF. SummaryWriter.add_video needs moviepy for that."""
    import av
    from tensorboard.compat.proto.summary_pb2 import Summary

    with av.open(os.path.abspath(video)) as container:
        fps = float(container.streams.video[0].average_rate)
        frames = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])
    with tempfile.TemporaryDirectory() as folder:
        write_video(Path(folder) / "video.gif", frames, fps)
        encoded = (Path(folder) / "video.gif").read_bytes()
    _, height, width, colours = frames.shape
    image = Summary.Image(height=height, width=width, colorspace=colours, encoded_image_string=encoded)
    return Summary(value=[Summary.Value(tag=tag, image=image)])


class WandB:
    """A run of W&B, in the project that WANDB_PROJECT names (default: pvdm-fast).

    Its id is kept in the run's folder, so that a resumed run goes on in the same place. Each stage counts its own
    steps. W&B keeps what it has got: steps that are taken again after a crash are there twice.
    """

    def __init__(self, path: Path, values: dict[str, Any]) -> None:
        self.wandb = _wandb()
        kept = path / "wandb-id.txt"
        if not kept.exists():
            with whole_file(kept) as temporary:
                temporary.write_text(uuid.uuid4().hex[:16], encoding="utf-8")
        try:
            self.run = self.wandb.init(
                project=os.environ.get("WANDB_PROJECT") or WANDB_PROJECT,
                name=path.resolve().name,
                dir=str(path),
                id=kept.read_text(encoding="utf-8"),
                resume="allow",
                config=values,
                settings=self.wandb.Settings(console="off"),  # the progress bar is no log
            )
        except self.wandb.Error as error:
            raise UserError(
                f"W&B cannot start: {error}; log in with the command wandb login, or set WANDB_MODE=offline, and "
                f"go on with --resume {path}"
            ) from error
        for stage in STAGES:
            self.run.define_metric(f"{stage}/step")
            self.run.define_metric(f"{stage}/*", step_metric=f"{stage}/step")

    def record(self, record: dict[str, Any]) -> None:
        self.run.log({**_scalars(record), f"{record['stage']}/step": record["step"]})

    def show(self, stage: str, step: int, video: Path, picture: Path) -> None:
        media = {"preview": self.wandb.Video(str(video), format="mp4"), "frames": self.wandb.Image(str(picture))}
        self.run.log({**{f"{stage}/{name}": value for name, value in media.items()}, f"{stage}/step": step})

    def __enter__(self) -> WandB:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.run.finish(exit_code=0 if error is None else getattr(error, "exit_code", 1))


def _summary_writer() -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise UserError("--tensorboard needs TensorBoard: pip install 'pvdm-fast[tensorboard]'") from error
    return SummaryWriter


def _wandb() -> Any:
    try:
        import wandb
    except ImportError as error:
        raise UserError("--wandb needs Weights & Biases: pip install 'pvdm-fast[wandb]'") from error
    return wandb
