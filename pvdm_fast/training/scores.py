"""Held-out scores: how they read in a line, which is the best, and for how long there was no better one."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

FORMS = {"psnr": "PSNR {:.2f} dB", "held_out_loss": "loss {:.4f}", "lpips": "LPIPS {:.4f}"}


def score_text(scores: Mapping[str, float]) -> str:
    """For example ``PSNR 24.31 dB, LPIPS 0.2310``. Anything else in ``scores`` is left out."""
    return ", ".join(form.format(scores[name]) for name, form in FORMS.items() if name in scores)


def merit(scores: Mapping[str, float]) -> float:
    """What decides which scores are better: PSNR of an autoencoder, minus the held-out loss of a denoiser."""
    value = scores["psnr"] if "psnr" in scores else -scores["held_out_loss"]
    return value if math.isfinite(value) else -math.inf


@dataclass
class Best:
    """The best held-out scores of a stage so far.

    Attributes:
        scores: the best ones. Empty before the first.
        step: the step that they are of.
        waited: how many scores came since then, none of them better.
    """

    scores: dict[str, float] = field(default_factory=dict)
    step: int = 0
    waited: int = 0

    def add(self, scores: Mapping[str, float], step: int) -> bool:
        """Count new scores. Returns whether they are the best. Equal ones are not."""
        if self.scores and merit(scores) <= merit(self.scores):
            self.waited += 1
            return False
        self.scores, self.step, self.waited = dict(scores), step, 0
        return True
