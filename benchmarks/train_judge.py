"""`python -m benchmarks.train_judge`: trains the scene judge that `pvdm_fast.evaluate` asks, in minutes on one thread.

Every step draws new frames. In a part of them everything is as `pvdm_fast.data.shapes` renders it. The others also have
shapes that are none of the five kinds, such as halves of two kinds, blends and blobs, and are damaged as an autoencoder
or a sampler would: blur, wobbling outlines, noise, shifted colours. The worse the blur and the wobble, the more the
judge is taught to call a shape "none of the kinds". The same seed gives the same frames in the same order.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

from benchmarks.pace import pace
from pvdm_fast.backends.precision import cpu_multiplies_bfloat16
from pvdm_fast.data.draws import generator
from pvdm_fast.data.shapes import BACKDROPS, COLOURS, KINDS, MAX_OBJECTS, PALETTE, signed_distance
from pvdm_fast.evaluation.scene_judge import SIDE, WEIGHTS, SceneJudge
from pvdm_fast.jobs import numbers
from pvdm_fast.jobs.arguments import Parser
from pvdm_fast.jobs.command import run_command
from pvdm_fast.jobs.files import share_as_usual, whole_file
from pvdm_fast.jobs.progress import make_bar

MOST = 3  # objects in a frame: one more than in a scene, so that the judge sees one too many
SIZES = ((32, 32), (32, 32), (32, 48), (48, 32))
UNKNOWN = len(KINDS)
LEARNING_RATE = 3e-3
EXACT = 0.5  # share of frames as scenes show them; with few of them the judge is right, but never sure
# What is drawn, and how often. All but the first are none of the five kinds.
DRAWN = {
    "whole": 0.7,
    "halves": 0.07,  # left one kind and right another, or upper and lower
    "blend": 0.05,  # two kinds, each half transparent
    "between": 0.05,  # the outline halfway between two kinds
    "blob": 0.05,
    "faint": 0.02,
    "small": 0.03,
    "mixed": 0.03,  # two colours at once: between them, or one on each half
}


@dataclass(frozen=True)
class Truth:
    """What frames show, by colour. ``present`` (B, 6) is 1, 0, or NaN where either would be right. ``kinds`` (B, 6, 6)
    are probabilities, ``place`` (B, 6, 2) and ``visible`` (B, 6) as in `pvdm_fast.evaluation.scene_judge.Seen`.
    ``paint`` (B, 6, H, W) is each pixel's share of each colour, and ``shape`` (B, 6, 5) is 1 for the kind that was
    drawn, however damaged it is."""

    present: Tensor
    kinds: Tensor
    place: Tensor
    visible: Tensor
    paint: Tensor
    shape: Tensor


def draw_frames(rng: np.random.Generator, batch: int, height: int, width: int) -> tuple[Tensor, Truth]:
    """Frames (B, 3, H, W) in [-1, 1], damaged, and what they show."""
    extent = np.array([height, width], np.float32) / SIDE
    exact = rng.random(batch) < EXACT
    count = rng.choice(MOST + 1, size=batch, p=(0.04, 0.4, 0.46, 0.1))
    count = np.where(exact, rng.integers(1, MAX_OBJECTS + 1, size=batch), count)
    order = np.argsort(rng.random((batch, len(COLOURS))), axis=1)
    canvas = np.empty((batch, 3, height, width), np.float32)
    canvas[:] = BACKDROPS[rng.integers(len(BACKDROPS), size=batch)][:, :, None, None]
    truth = {
        "present": np.zeros((batch, len(COLOURS)), np.float32),
        "kinds": np.zeros((batch, len(COLOURS), len(KINDS) + 1), np.float32),
        "shape": np.zeros((batch, len(COLOURS), len(KINDS)), np.float32),
        "place": np.zeros((batch, len(COLOURS), 2), np.float32),
        "visible": np.zeros((batch, len(COLOURS)), np.float32),
    }
    paint = np.zeros((batch, len(COLOURS), height, width), np.float32)
    seen = np.zeros((batch, len(COLOURS), height, width), np.float32)  # of the objects in each colour
    area = np.ones((batch, len(COLOURS)), np.float32)
    for number in range(MOST):
        rows = np.flatnonzero(count > number)
        drawn = np.where(exact[rows], "whole", rng.choice(list(DRAWN), size=len(rows), p=list(DRAWN.values())))
        kind = rng.integers(len(KINDS), size=len(rows))
        radius = np.where(drawn == "small", rng.uniform(0.07, 0.13, len(rows)), rng.uniform(0.19, 0.29, len(rows)))
        radius = radius.astype(np.float32)[:, None]
        reach = np.where(rng.random((len(rows), 1)) < 0.65, radius, -0.8 * radius)  # the rest may be cut by the border
        place = (reach + rng.random((len(rows), 2)) * (extent - 2 * reach)).astype(np.float32)
        outline = Outline.draw(rng, drawn, kind, radius[:, :, None])
        cover = outline.cover(place, height, width)
        whole = cover.sum((1, 2))  # in pixels
        cut = np.flatnonzero(reach < 0)
        whole[cut] = outline.only(cut).area()
        first, second = order[rows, number], order[rows, -1 - number]
        shares = _shares(rng, drawn, outline.half(place, height, width))
        opaque = (cover * np.where(exact[rows, None, None], np.float32(1), _opacity(rng, drawn)))[:, None]
        shades = rng.normal(0, 0.03, (len(rows), *PALETTE.shape)) * ~exact[rows, None, None]
        palette = (PALETTE + shades).astype(np.float32)
        here, there = (palette[np.arange(len(rows)), colour][:, :, None, None] for colour in (first, second))
        canvas[rows] += opaque * (here + shares[:, None] * (there - here) - canvas[rows])
        paint[rows] *= 1 - opaque
        seen[rows] *= 1 - cover[:, None]
        mixed = drawn == "mixed"
        for colours, share, chosen in ((first, 1 - shares, ~mixed | mixed), (second, shares, mixed)):
            at = rows[chosen], colours[chosen]
            paint[at] += opaque[chosen, 0] * share[chosen]
            seen[at] = cover[chosen]
            area[at] = whole[chosen]
            truth["present"][at] = np.where(mixed[chosen], np.nan, 1)
            truth["kinds"][at[0], at[1], np.where(drawn == "whole", kind, UNKNOWN)[chosen]] = 1
            truth["place"][at] = place[chosen]
    truth["visible"] = visible = seen.sum((2, 3)) / area
    truth["present"][(truth["present"] == 1) & (visible < 0.08)] = np.nan
    truth["present"][visible < 0.02] = 0
    frames, truth["paint"], sureness = damage(rng, canvas, paint, exact)
    truth["shape"][:] = truth["kinds"][..., :UNKNOWN]
    truth["kinds"][..., :UNKNOWN] *= sureness[..., None]
    truth["kinds"][..., UNKNOWN] = 1 - truth["kinds"][..., :UNKNOWN].sum(-1)
    return frames, Truth(**{name: torch.from_numpy(values) for name, values in truth.items()})


@dataclass(frozen=True)
class Outline:
    """The shapes of one object each of n frames. ``radius`` is (n, 1, 1), everything else random is (n, ...)."""

    drawn: np.ndarray
    kind: np.ndarray
    other: np.ndarray
    radius: np.ndarray
    upright: np.ndarray
    waves: np.ndarray

    @staticmethod
    def draw(rng: np.random.Generator, drawn: np.ndarray, kind: np.ndarray, radius: np.ndarray) -> Outline:
        count = len(kind)
        other = (kind + rng.integers(1, len(KINDS), size=count)) % len(KINDS)
        waves = np.stack([rng.uniform(0.1, 0.3, (count, 4)), rng.uniform(0, 2 * np.pi, (count, 4))], -1)
        return Outline(drawn, kind, other, radius, rng.random(count) < 0.5, waves.astype(np.float32))

    def only(self, chosen: np.ndarray) -> Outline:
        """These objects of the n."""
        return Outline(*(getattr(self, field.name)[chosen] for field in fields(self)))

    def cover(self, place: np.ndarray, height: int, width: int) -> np.ndarray:
        """The share of each pixel (n, H, W) that is covered, with the centres at ``place`` (n, 2)."""
        down, right = _offsets(place, height, width)
        first = self._distance(self.kind, down, right)
        second = np.zeros_like(first)
        two = np.isin(self.drawn, ("halves", "blend", "between"))
        if two.any():
            second[two] = self._distance(self.other[two], down[two], right[two], self.radius[two])
        halves, blob = (self.drawn == name for name in ("halves", "blob"))
        half = self.half(place, height, width)
        first = np.where((halves[:, None, None] & half), second, first)
        between = self.drawn == "between"
        first[between] = (first[between] + second[between]) / 2
        if blob.any():
            first[blob] = self._blob(down[blob], right[blob], blob)
        covered = np.clip(0.5 - SIDE * first, 0, 1)
        blend = self.drawn == "blend"
        covered[blend] = (covered[blend] + np.clip(0.5 - SIDE * second[blend], 0, 1)) / 2
        return covered

    def area(self) -> np.ndarray:
        """The area (n,) in pixels, in a frame that holds all of the object."""
        return self.cover(np.full((len(self.kind), 2), 0.5, np.float32), SIDE, SIDE).sum((1, 2))

    def half(self, place: np.ndarray, height: int, width: int) -> np.ndarray:
        """Which pixels (n, H, W) lie in the upper or left half of the objects."""
        down, right = _offsets(place, height, width)
        return np.where(self.upright[:, None, None], down < 0, right < 0)

    def _distance(
        self, kind: np.ndarray, down: np.ndarray, right: np.ndarray, radius: np.ndarray | None = None
    ) -> np.ndarray:
        radius = self.radius if radius is None else radius
        distance = np.empty(np.broadcast_shapes(down.shape, right.shape), np.float32)
        for index in range(len(KINDS)):
            chosen = kind == index
            distance[chosen] = signed_distance(index, down[chosen], right[chosen], radius[chosen])
        return distance

    def _blob(self, down: np.ndarray, right: np.ndarray, chosen: np.ndarray) -> np.ndarray:
        """Signed distance, roughly, to an outline whose radius goes up and down in two to five waves."""
        angle = np.arctan2(down, right)
        size = np.full_like(angle, 0.8)
        for number in range(4):
            strength, phase = self.waves[chosen, number].T[:, :, None, None]
            size += strength * np.cos((number + 2) * angle + phase) / 2
        return np.sqrt(down**2 + right**2) - self.radius[chosen] * size


def _offsets(place: np.ndarray, height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """How far each row (n, H, 1) and column (n, 1, W) is from the centres, in short sides."""
    rows = (np.arange(height, dtype=np.float32) + 0.5) / SIDE
    columns = (np.arange(width, dtype=np.float32) + 0.5) / SIDE
    return (rows - place[:, :1])[:, :, None], (columns - place[:, 1:])[:, None, :]


def _shares(rng: np.random.Generator, drawn: np.ndarray, half: np.ndarray) -> np.ndarray:
    """How much of each pixel's colour (n, H, W) is the object's second one: of "mixed" objects half of it all over, or
    all of it on one half."""
    between = np.where(rng.random(len(drawn)) < 0.5, rng.uniform(0.35, 0.65, len(drawn)), 0)[:, None, None]
    return np.where((drawn == "mixed")[:, None, None], np.where(between > 0, between, half), 0).astype(np.float32)


def _opacity(rng: np.random.Generator, drawn: np.ndarray) -> np.ndarray:
    """(n, 1, 1): 0.85 to 1, and 0.25 to 0.5 of faint objects."""
    count = len(drawn)
    usual = 1 - 0.15 * rng.random(count) * (rng.random(count) < 0.3)
    return np.where(drawn == "faint", rng.uniform(0.25, 0.5, count), usual).astype(np.float32)[:, None, None]


def damage(
    rng: np.random.Generator, canvas: np.ndarray, paint: np.ndarray, spared: np.ndarray
) -> tuple[Tensor, np.ndarray, np.ndarray]:
    """Blur, wobble, noise and shifted colours, each in a part of the frames that aren't spared.

    Args:
        canvas: (B, 3, H, W) in [0, 1].
        paint: (B, 6, H, W), which is blurred and shifted likewise.
        spared: (B,) bool.

    Returns:
        frames in [-1, 1], rounded to 8 bits, the paint, and how sure one can still be of a kind, by colour (B, 6),
        from 1 to 0.
    """
    batch, _, height, width = canvas.shape
    layers = torch.from_numpy(np.concatenate([canvas, paint], axis=1))

    def some(share: float, low: float, high: float) -> tuple[Tensor, Tensor]:
        hit = np.flatnonzero((rng.random(batch) < share) & ~spared)
        values = rng.uniform(low, high, len(hit)).astype(np.float32)
        return torch.from_numpy(hit), torch.from_numpy(values)

    bent, wobble = some(0.25, 0.2, 3.0)  # the largest shift in pixels
    layers[bent], torn = _wobbled(rng, layers[bent], wobble)
    smeared, blur = some(0.35, 0.3, 3.0)
    layers[smeared] = _blur(height, blur) @ layers[smeared] @ _blur(width, blur).transpose(-1, -2)
    frames, paint = layers[:, :3], layers[:, 3:].clamp(0, 1).numpy()
    # of single pixels, of the patches of an autoencoder, and clouds
    for most, rows, columns, mode in (
        (0.06, height, width, "nearest"), (0.05, height // 4, width // 4, "nearest"), (0.05, 4, 4, "bicubic")
    ):  # fmt: skip
        hit, strength = some(0.3, 0.0, most)
        if not len(hit):  # F.interpolate takes no empty batch, and F.affine_grid neither
            continue
        noise = F.interpolate(_normal(rng, len(hit), 3, rows, columns), size=(height, width), mode=mode)
        frames[hit] += strength[:, None, None, None] * noise
    hit, gain = some(0.3, -0.12, 0.12)
    frames[hit] *= 1 + gain[:, None, None, None]
    sureness = torch.ones(batch, len(COLOURS))
    sureness[smeared] *= _falling(blur, 1.0, 2.2)[:, None]
    sureness[bent] *= _falling(torn, 0.5, 1.4)
    return (frames * 255).round().clamp(0, 255) / 127.5 - 1, paint, sureness.numpy()


def _wobbled(rng: np.random.Generator, layers: Tensor, most: Tensor) -> tuple[Tensor, Tensor]:
    """Layers (n, 9, H, W) whose pixels are shifted by a smooth random field of up to so many (n,) pixels.

    Also by how much what can be seen of each colour is torn (n, 6): the root mean square of its pixels' shifts, less
    their mean, in pixels. Where little is seen of an object, only that little counts.
    """
    count, _, height, width = layers.shape
    if not count:
        return layers, layers.new_zeros(0, len(COLOURS))
    coarse = torch.from_numpy(rng.uniform(-1, 1, (count, 2, 6, 6)).astype(np.float32))
    field = F.interpolate(coarse, size=(height, width), mode="bicubic", align_corners=True) * most[:, None, None, None]
    straight = F.affine_grid(torch.eye(2, 3).expand(count, -1, -1), [count, 1, height, width], align_corners=False)
    shifted = straight + field.permute(0, 2, 3, 1) * 2 / torch.tensor([width, height])
    layers = F.grid_sample(layers, shifted, padding_mode="border", align_corners=False)
    paint = layers[:, 3:] / layers[:, 3:].sum((2, 3), keepdim=True).clamp_min(1e-6)
    mean, square = (torch.einsum("nchw,nkhw->nck", paint, values) for values in (field, field.square()))
    return layers, (square - mean.square()).sum(-1).clamp_min(0).sqrt()


def _falling(value: Tensor, start: float, end: float) -> Tensor:
    return ((end - value) / (end - start)).clamp(0, 1)


def _normal(rng: np.random.Generator, *shape: int) -> Tensor:
    return torch.from_numpy(rng.standard_normal(shape, np.float32))


def _blur(size: int, sigma: Tensor) -> Tensor:
    """Gaussian blur along an axis as matrices (B, 1, size, size). A sigma of 0 pixels gives the identity."""
    places = torch.arange(size, dtype=torch.float32)
    squared = (places[:, None] - places).square()
    weights = torch.exp(-squared / (2 * sigma.clamp_min(0.1)[:, None, None].square()))
    return (weights / weights.sum(-1, keepdim=True))[:, None]


def loss_of(judge: SceneJudge, frames: Tensor, truth: Truth) -> Tensor:
    """Cross-entropies of paint, presence, kinds and known kinds, and distances of places and visible shares.

    Which kind was drawn is learned from damaged shapes too. With 20 times the weight on places, kinds stayed at chance
    for 200 steps.
    """
    told = judge(frames)
    loss = 3 * F.binary_cross_entropy_with_logits(told.painted, truth.paint)
    at = told.frame, told.colour
    told_of = ~truth.present[at].isnan()
    there = F.binary_cross_entropy_with_logits(told.present[told_of], truth.present[at][told_of], reduction="sum")
    visible = truth.visible[at]
    loss = loss + (there + (told.visible.sigmoid() - visible).abs().sum()) / max(1, len(visible))
    weight = ((visible - 0.2) / 0.3).clamp(0, 1)  # of a shape of which too little shows nothing can be told
    away = F.smooth_l1_loss(told.place, truth.place[at], reduction="none", beta=0.02).sum(-1)
    known = truth.kinds[at][:, :UNKNOWN].sum(-1)
    unsure = F.binary_cross_entropy_with_logits(told.known, known, reduction="none")
    unsure = unsure * doubt(truth.shape[at].sum(-1) == 0, visible)
    wrong = -(truth.shape[at] * told.kinds.log_softmax(-1)).sum(-1)
    return loss + (weight * (unsure + wrong + away)).sum() / weight.sum().clamp_min(1)


def doubt(odd: Tensor, visible: Tensor) -> Tensor:
    """How much it counts (n,) whether a shape is one of the kinds at all.

    Of shapes that are none, ``odd``, the less, the less of them is seen. So the judge learns to believe the best of
    what is hidden. Otherwise it is never sure of a kind of which a third is hidden.
    """
    return torch.where(odd, ((visible - 0.5) / 0.4).clamp(0, 1), 1.0)


def train(steps: int, batch: int, seed: int) -> SceneJudge:
    """A trained judge in eval mode. Products are in bfloat16 on CPUs that multiply it."""
    torch.manual_seed(seed)
    judge = SceneJudge().train()
    last = judge.paint[-1]
    assert isinstance(last, torch.nn.Conv2d) and last.bias is not None
    torch.nn.init.constant_(last.bias, -3.0)  # at first nothing is painted, so nothing is looked at
    optimizer = torch.optim.AdamW(judge.parameters(), LEARNING_RATE, weight_decay=1e-3, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: pace(step, steps))
    quick = cpu_multiplies_bfloat16()
    with make_bar("scene judge", steps, unit="step") as bar:
        for step in range(steps):
            rng = generator("scene judge", seed, step)
            frames, truth = draw_frames(rng, batch, *SIZES[int(rng.integers(len(SIZES)))])
            with torch.autocast("cpu", torch.bfloat16, enabled=quick):
                loss = loss_of(judge, frames, truth)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            bar.update(1)
            if step % 100 == 0:
                bar.write(f"step {step}: loss {loss.item():.3f}")
    return judge.eval()


def main(arguments: Sequence[str] | None = None) -> int:
    parser = Parser(prog="python -m benchmarks.train_judge", description=str(__doc__).splitlines()[0])
    parser.add_argument("--steps", type=numbers.whole(10, 1_000_000), default=12_000, help="default: %(default)s")
    parser.add_argument("--batch-size", type=numbers.BATCH, default=64, help="frames in a step (default: %(default)s)")
    parser.add_argument("--seed", type=numbers.SEED, default=0, help="default: %(default)s")
    parser.add_argument("--out", type=Path, default=WEIGHTS, help="default: the weights in the package")
    given: argparse.Namespace = parser.parse_args(arguments)

    def run() -> None:
        torch.set_num_threads(1)
        judge = train(given.steps, given.batch_size, given.seed)
        weights = {name: value.contiguous() for name, value in judge.state_dict().items()}
        with whole_file(given.out) as temporary:
            # one entry: safetensors writes several in an order that changes
            trained = f"{given.steps} steps of {given.batch_size} frames, seed {given.seed}"
            save_file(weights, temporary, {"trained": trained})
            share_as_usual(temporary)
        print(f"written: {given.out}")

    return run_command(run, "take a smaller --batch-size")


if __name__ == "__main__":
    sys.exit(main())
