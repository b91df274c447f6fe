"""The training clip that is nearest to each shown sample: a copy would be seen here, and by its distance."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from pvdm_fast.data import ClipDataset
from pvdm_fast.errors import Interrupted, UserError
from pvdm_fast.evaluation.clips import read_batches
from pvdm_fast.evaluation.passes import show
from pvdm_fast.jobs.files import whole_file
from pvdm_fast.jobs.interrupt import StopRequest
from pvdm_fast.jobs.progress import make_bar
from pvdm_fast.jobs.reading import UnreadableFile, read_json_object

if TYPE_CHECKING:
    from pvdm_fast.evaluation.session import Evaluation

SIDE = 32
DISTANCE = (
    f"root mean square difference of all pixels and colours (0 to 255), frame by frame, of frames averaged down to "
    f"{SIDE} pixels on the short side"
)
NEIGHBOURS = 50
RELATIVE = f"the distance as a share of the mean distance of the {NEIGHBOURS} nearest training clips"


def small_pixels(videos: Tensor) -> Tensor:
    """Videos (B, 3, T, H, W) in [-1, 1] as rows (B, D) of 8-bit levels, their frames reduced to SIDE by averaging."""
    height, width = videos.shape[-2:]
    factor = min(1.0, SIDE / min(height, width))
    size = (videos.shape[2], max(1, round(height * factor)), max(1, round(width * factor)))
    return F.interpolate(videos.float(), size=size, mode="area").flatten(1) * 127.5


def distances(first: Tensor, second: Tensor) -> Tensor:
    """DISTANCE between every row of ``first`` (n, D) and of ``second`` (m, D): (n, m)."""
    # without products of matrices, which give a copy another distance than 0
    apart = torch.cdist(first.double(), second.double(), compute_mode="donot_use_mm_for_euclid_dist")
    return apart / first.shape[1] ** 0.5


@dataclass(frozen=True)
class Found:
    """Of each query the NEIGHBOURS least distances (n, k) in ascending order, and the numbers of their clips."""

    distances: Tensor
    clips: Tensor
    unreadable: dict[str, str]

    @property
    def relative(self) -> Tensor:
        """The least distance as a share of the mean of the NEIGHBOURS least, (n,): 1 where all are alike, 0 of a copy.

        Carlini et al. (2023, arXiv 2301.13188) find copies by such a share: a blurred sample is near to everything, and
        only this tells it from a copy.
        """
        return self.distances[:, 0] / self.distances.mean(1).clamp_min(1e-9)

    def rows(self) -> list[dict[str, Any]]:
        """What results["nearest"] holds of each query."""
        columns = zip(self.distances[:, 0].tolist(), self.relative.tolist(), self.clips[:, 0].tolist(), strict=True)
        return [{"distance": round(d, 2), "relative": round(r, 3), "clip": clip} for d, r, clip in columns]


def search(queries: Tensor, dataset: ClipDataset, clips: int, evaluation: Evaluation, stop: StopRequest) -> Found:
    """The nearest of the first ``clips`` clips of ``dataset`` to each of ``queries`` (n, 3, T, H, W).

    Raises:
        Interrupted: a signal came.
    """
    size, frames, rows = evaluation.request.batch_size, queries.shape[2], small_pixels(queries)
    batches = [range(first, min(clips, first + size)) for first in range(0, clips, size)]
    least = torch.empty(len(rows), 0, dtype=torch.float64)
    place = torch.empty(len(rows), 0, dtype=torch.long)
    unreadable: dict[str, str] = {}
    with make_bar("nearest training clips", clips, unit="clip") as bar:
        for numbers, batch in zip(batches, read_batches(dataset, batches, evaluation.request.workers), strict=True):
            least = torch.cat([least, distances(rows, small_pixels(batch["video"][:, :, :frames]))], dim=1)
            place = torch.cat([place, torch.tensor(numbers).expand(len(rows), -1)], dim=1)
            least, index = least.topk(min(NEIGHBOURS, least.shape[1]), largest=False)
            place = place.gather(1, index)
            unreadable.update(batch["skipped"])
            if stop.number is not None:
                raise Interrupted(stop.number)
            bar.update(len(numbers))
    return Found(least, place, unreadable)


def nearest_clips(evaluation: Evaluation, samples: Path, statistics: Path, stop: StopRequest) -> dict[str, Any]:
    """Find the nearest training clip of each sample in the folder ``samples``, and of as many held-out clips.

    Clip number i is draw i of the training split, as in the passes: one window of each video, again from the start
    where there are fewer videos. Only the first clip of a sample is compared.

    Returns:
        What results["nearest"] holds. Its ``folder`` has the videos clip-N.mp4: sample N beside its clip.
    """
    request, subject = evaluation.request, evaluation.subject
    settings = {"among": request.nearest_among, "shown": request.shown, "distance": DISTANCE, "samples": samples.name}
    identity = evaluation.protocol.identity("data", "model", "sampling", **settings)
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
    folder = statistics / f"nearest-{digest[:16]}"
    kept = folder / "nearest.json"
    if kept.exists():
        try:
            return read_json_object(kept)
        except (OSError, UnreadableFile) as error:
            raise UserError(f"{kept} is damaged: remove the folder {folder} to look again") from error
    made = _read_samples(samples, min(request.shown, evaluation.samples))
    frames, training = made[0].shape[1], evaluation.training
    assert training is not None
    held_out = evaluation.datasets[subject.frames] if request.split == "test" else None
    compared = [held_out[number]["video"][:, :frames] for number in range(len(made))] if held_out is not None else []
    found = search(torch.stack([*made, *compared]), training, request.nearest_among, evaluation, stop)
    rows = found.rows()
    for number, sample in enumerate(made):
        clip = training[rows[number]["clip"]]
        show(folder, [number], torch.stack([sample, clip["video"][:, :frames]])[None], subject.fps, len(made))
        rows[number]["name"] = str(clip["name"])
    result = {
        "among": request.nearest_among,
        "videos": len(training),
        "source": training.description,
        "frames": frames,
        "distance": DISTANCE,
        "relative": RELATIVE,
        "samples": rows[: len(made)],
        "held_out": rows[len(made) :],
        "unreadable_files": found.unreadable,
        "folder": str(folder.relative_to(evaluation.folder)),
    }
    try:
        with whole_file(kept) as temporary:
            temporary.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot write {kept}: {error.strerror or error}") from error
    return result


def _read_samples(folder: Path, count: int) -> list[Tensor]:
    """The first clips of the samples: (3, T, H, W) in [-1, 1] each."""
    arrays = [np.load(folder / f"clip-{number}.npy") for number in range(count)]
    return [torch.from_numpy(array).permute(3, 0, 1, 2).float() / 127.5 - 1 for array in arrays]
