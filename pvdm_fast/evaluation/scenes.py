"""Scores of rendered scenes: whether samples show the same named objects on unbroken paths, and reconstructions too.

The scenes of `pvdm_fast.data.shapes` are known exactly, so no downloaded network is needed. `judge_clips` gives all
scores of clips in memory. A colour occurs at most once in a scene, so the colour says which object is which in another
frame. Times are frames, lengths are short sides of the frame.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pvdm_fast.data.shapes import KINDS, MAX_OBJECTS, SPEEDS
from pvdm_fast.evaluation.moments import Gaussian, frechet_distance, moments
from pvdm_fast.evaluation.scene_judge import FEATURES, SceneJudge, Seen, load_judge, see

SURE = 0.9  # confidence of a name that counts
CLEAR = 0.6  # visible share from which an object counts as clearly visible
PRESENT = 0.5
SLOWEST, FASTEST = SPEEDS  # of a frame of stride 1
PLACE_ERROR = 0.04  # two estimated places may be off by so much together
STEPS_OF_REST = 4  # so many steps in a row show whether an object moves
AT_BORDER = 0.15  # an object whose centre is farther inside is clearly visible, for all that the border hides of it
CLIP_FEATURES = 2 * FEATURES
MOTION = 4  # how much changes count beside means in distances: so frames out of order are as far as wrong kinds
OVERLAP = 0.4  # centres of two objects that are farther apart leave both clearly visible


@dataclass(frozen=True)
class Track:
    """One object of a clip through its frames, as numpy arrays.

    ``present`` (T,) bool; ``clear`` (T,) bool: clearly visible; ``kind`` (T,); ``sure`` (T,) bool: of one of the five
    kinds with confidence; ``place`` (T, 2); ``may_hide`` (T,) bool: it is at the border or beside another object.
    """

    present: np.ndarray
    clear: np.ndarray
    kind: np.ndarray
    sure: np.ndarray
    place: np.ndarray
    at_border: np.ndarray
    may_hide: np.ndarray


def tracks(seen: Seen, stride: int = 1) -> Iterator[list[Track]]:
    """The objects of each clip: every colour that is clearly visible in one frame at least."""
    slack = FASTEST * stride  # it may have moved so far before the next frame
    present = (seen.present >= PRESENT).numpy()
    clear = present & (seen.visible >= CLEAR).numpy()
    place = seen.place.double().numpy()
    kind, confidence = seen.kind.numpy(), seen.confidence.numpy()
    inside = np.minimum(place, np.array(seen.extent) - place).min(-1)
    apart = np.linalg.norm(place[:, :, :, None] - place[:, :, None], axis=-1)
    others = present[:, :, None] & ~np.eye(present.shape[-1], dtype=bool)
    beside = (others & (apart < OVERLAP + 2 * slack)).any(-1)
    at_border = inside < AT_BORDER + slack
    sure = (kind < len(KINDS)) & (confidence >= SURE)
    whole = (present, clear, kind, sure, place, at_border, at_border | beside)
    for clip in range(len(present)):
        slots = np.flatnonzero(clear[clip].any(0))
        yield [Track(*(values[clip, :, slot] for values in whole)) for slot in slots]


def is_kept(track: Track) -> bool:
    """Whether the object is there in all frames, but where the border or another object can hide it.

    It is never gone in the frame beside one in which it is clearly visible: no object is that fast. While it isn't
    clearly visible, it was at the border or beside another object when it last was, and is when it is again.
    """
    clear, present = track.clear, track.present
    if (clear[:-1] & ~present[1:]).any() or (clear[1:] & ~present[:-1]).any():
        return False
    left, came = clear[:-1] & ~clear[1:], clear[1:] & ~clear[:-1]
    return bool(track.may_hide[:-1][left].all() and track.may_hide[1:][came].all())


def is_named(objects: list[Track]) -> bool:
    """Whether there are one or two objects, each of which keeps one of the five kinds, with a confidence of 0.9, in all
    frames in which it is clearly visible, and doesn't vanish or appear in plain sight."""
    return 1 <= len(objects) <= MAX_OBJECTS and all(
        track.sure[track.clear].all() and len(set(track.kind[track.clear])) == 1 and is_kept(track) for track in objects
    )


def is_path(objects: list[Track], stride: int = 1) -> bool:
    """Whether there are objects, and each moves on one uninterrupted path: without a jump, never at rest, and without
    vanishing or appearing in plain sight. It may turn, and it may leave the frame and come back elsewhere."""
    return bool(objects) and all(
        is_kept(track) and not _jumps(track, stride) and not _rests(track, stride) for track in objects
    )


def _jumps(track: Track, stride: int) -> bool:
    """Whether the object is farther from where it was last clearly visible than the fastest object gets."""
    frames = np.flatnonzero(track.clear)
    passed = np.diff(frames)
    distance = np.linalg.norm(np.diff(track.place[frames], axis=0), axis=1)
    was_away = (passed > 1) & track.at_border[frames][:-1] & track.at_border[frames][1:]
    return bool((~was_away & (distance > FASTEST * stride * passed + PLACE_ERROR)).any())


def _rests(track: Track, stride: int) -> bool:
    """Whether the object is slower than half the slowest for some steps in a row, clearly visible all the time."""
    step = np.linalg.norm(np.diff(track.place, axis=0), axis=1)
    both = track.clear[1:] & track.clear[:-1]
    for first in range(len(step) - STEPS_OF_REST + 1):
        window = slice(first, first + STEPS_OF_REST)
        if both[window].all() and step[window].mean() < SLOWEST * stride / 2:
            return True
    return False


def kinds_right(original: Seen, reconstruction: Seen) -> Tensor:
    """For each clip (N, 2): how many clearly visible objects of the original's frames have the same name in the
    reconstruction, and how many there are. What the judge says of the original counts as the truth."""
    return _counts(original, (reconstruction.present >= PRESENT) & (reconstruction.kind == original.kind))


def of_class(seen: Seen, classes: Sequence[str]) -> Tensor:
    """For each clip (N, 2): how many clearly visible objects of all frames are of the kind that was asked for, and how
    many there are. ``classes`` names the kind of each clip."""
    asked = torch.tensor([KINDS.index(name) for name in classes])
    return _counts(seen, seen.kind == asked[:, None, None])


def _counts(seen: Seen, right: Tensor) -> Tensor:
    """Of each clip's clearly visible objects (N, 2): how many are ``right`` (N, T, 6), and how many there are."""
    clear = (seen.present >= PRESENT) & (seen.visible >= CLEAR)
    return torch.stack([(clear & right).sum((1, 2)), clear.sum((1, 2))], dim=-1).double()


def clip_features(seen: Seen) -> Tensor:
    """Features of clips (N, 30), float64, for a Fréchet distance: the mean of what the judge says of frames, and the
    root mean square of its change from frame to frame, which notices motion."""
    features = seen.features.double()
    change = features.diff(dim=1).square().sum(1).div(max(1, features.shape[1] - 1)).sqrt()  # 0 for a single frame
    return torch.cat([features.mean(1), MOTION * change], dim=1)


def first_frames(seen: Seen, frames: int) -> Seen:
    """What is seen in the first frames of each clip."""
    return Seen(
        seen.present[:, :frames],
        seen.kinds[:, :frames],
        seen.place[:, :frames],
        seen.visible[:, :frames],
        seen.features[:, :frames],
        seen.extent,
    )


def clip_scores(seen: Seen, length: int, stride: int = 1) -> dict[str, Tensor]:
    """Of each clip 1.0 or 0.0 (N,), float64: "named" and "path" of the first ``length`` frames. If there are twice as
    many frames, "second_named" and "second_path" of these, across the border between the first and the second clip."""
    scores = {}
    for prefix, frames in (("", length), ("second_", 2 * length)):
        if seen.present.shape[1] >= frames:
            objects = list(tracks(first_frames(seen, frames), stride))
            scores[f"{prefix}named"] = torch.tensor([is_named(clip) for clip in objects], dtype=torch.float64)
            scores[f"{prefix}path"] = torch.tensor([is_path(clip, stride) for clip in objects], dtype=torch.float64)
    return scores


def judge_clips(
    clips: Tensor,
    *,
    length: int | None = None,
    stride: int = 1,
    real: Tensor | None = None,
    originals: Tensor | None = None,
    judge: SceneJudge | None = None,
) -> dict[str, float]:
    """All scores of clips of rendered scenes.

    Args:
        clips: (N, 3, T, H, W), uint8, or floating point in [-1, 1].
        length: frames of the model's clip (default: all). With twice as many frames the scores of the second clip are
            there too.
        stride: step between frames. Objects move so much farther.
        real: real clips (M, 3, T', H, W) to which the Fréchet distance is taken, of ``length`` frames at least.
        originals: the originals (N, 3, T, H, W) that ``clips`` reconstruct.
        judge: from `load_judge` (default: it is loaded).

    Returns:
        "named", "path", "second_named" and "second_path": shares of clips, see `is_named` and `is_path`. With ``real``
        "frechet_distance", see `clip_features`. With ``originals`` "kinds_right": a share of objects, see
        `kinds_right`.

    Raises:
        ValueError: the clips have another form, or fewer than ``length`` frames.
    """
    judge = judge or load_judge()
    seen = see(judge, clips)
    length = clips.shape[2] if length is None else length
    for given in (clips, real):
        if given is not None and not 1 <= length <= given.shape[2]:
            raise ValueError(f"length must be from 1 to the clips' {given.shape[2]} frames, not {length}")
    scores = {name: float(values.mean()) for name, values in clip_scores(seen, length, stride).items()}
    if real is not None:
        pair = (see(judge, real), seen)
        gaussians = (Gaussian.of(moments(clip_features(first_frames(one, length)))) for one in pair)
        scores["frechet_distance"] = frechet_distance(*gaussians)
    if originals is not None:
        right, whole = kinds_right(see(judge, originals), seen).sum(0).tolist()
        scores["kinds_right"] = right / whole if whole else float("nan")
    return scores
