"""The training clip that is nearest to each shown sample: a copy would be seen here, and by its distance."""

from __future__ import annotations

import hashlib
import json
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


def small_pixels(videos: Tensor) -> Tensor:
    """Videos (B, 3, T, H, W) in [-1, 1] as rows (B, D) of 8-bit levels, their frames reduced to SIDE by averaging."""
    height, width = videos.shape[-2:]
    factor = min(1.0, SIDE / min(height, width))
    size = (videos.shape[2], max(1, round(height * factor)), max(1, round(width * factor)))
    return F.interpolate(videos.float(), size=size, mode="area").flatten(1) * 127.5


def distances(first: Tensor, second: Tensor) -> Tensor:
    """DISTANCE between every row of ``first`` (n, D) and of ``second`` (m, D): (n, m)."""
    return torch.cdist(first.double(), second.double()) / first.shape[1] ** 0.5


def search(
    queries: Tensor, dataset: ClipDataset, clips: int, evaluation: Evaluation, stop: StopRequest
) -> tuple[Tensor, Tensor, dict[str, str]]:
    """The least distance of each row of ``queries`` (n, D) among the first clips of ``dataset``, and its clip's number.

    Returns:
        Distances (n,), clip numbers (n,), and files that couldn't be read.

    Raises:
        Interrupted: a signal came.
    """
    size = evaluation.request.batch_size
    unreadable: dict[str, str] = {}
    batches = [range(first, min(clips, first + size)) for first in range(0, clips, size)]
    least, place = torch.full((len(queries),), torch.inf).double(), torch.zeros(len(queries), dtype=torch.long)
    with make_bar("nearest training clips", clips, unit="clip") as bar:
        for numbers, batch in zip(batches, read_batches(dataset, batches, evaluation.request.workers), strict=True):
            found, index = distances(queries, small_pixels(batch["video"])).min(1)
            place = torch.where(found < least, index + numbers.start, place)
            least = torch.minimum(found, least)
            unreadable.update(batch["skipped"])
            if stop.number is not None:
                raise Interrupted(stop.number)
            bar.update(len(numbers))
    return least, place, unreadable


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
    held_out = evaluation.datasets[subject.frames] if request.split == "test" else None
    compared = [held_out[number]["video"] for number in range(len(made))] if held_out is not None else []
    training = evaluation.training
    assert training is not None
    queries = small_pixels(torch.stack([*made, *compared]))
    least, place, unreadable = search(queries, training, request.nearest_among, evaluation, stop)
    rows = []
    for number, sample in enumerate(made):
        clip = training[int(place[number])]
        show(folder, [number], torch.stack([sample, clip["video"]])[None], subject.fps, len(made))
        rows.append({"distance": round(float(least[number]), 2), "clip": int(place[number]), "name": str(clip["name"])})
    result = {
        "among": request.nearest_among,
        "videos": len(training),
        "source": training.description,
        "distance": DISTANCE,
        "samples": rows,
        "held_out": [round(value, 2) for value in least[len(made) :].tolist()],
        "unreadable_files": unreadable,
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
