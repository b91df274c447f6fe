"""The numbers that commands and functions take. Each has a kind and a range, and is checked before any work."""

from __future__ import annotations

import math
import numbers
from dataclasses import dataclass
from typing import Any

from pvdm_fast.errors import UserError

LONGEST_SHOWN = 40  # characters of a wrong value


class WrongNumber(UserError, ValueError):
    """A value that isn't such a number. The message says what was expected, without the argument's name."""


class Checked:
    """What is called with a value, and returns it as it should be or raises WrongNumber."""

    def __call__(self, value: Any) -> Any:
        raise NotImplementedError

    def checked(self, name: str, value: Any) -> Any:
        """The same, with the name of the argument in the message (UserError)."""
        try:
            return self(value)
        except WrongNumber as error:
            raise UserError(f"{name} {error}") from None


@dataclass(frozen=True)
class Number(Checked):
    """A finite number in a range that includes both ends.

    Args:
        kind: int or float.
        minimum, maximum: the ends of the range.
    """

    kind: type
    minimum: float
    maximum: float

    def __call__(self, value: Any) -> Any:
        """``value``, a number or a word for one, as this kind of number.

        Raises:
            WrongNumber: it is something else, not finite, or out of range. The message begins with "must be".
        """
        converted = self._convert(value)
        if converted < self.minimum:
            raise WrongNumber(f"must be at least {_short(self.minimum)}, not {_short(value)}")
        if converted > self.maximum:
            raise WrongNumber(f"must be at most {_short(self.maximum)}, not {_short(value)}")
        return converted

    def _convert(self, value: Any) -> Any:
        whole = self.kind is int
        wrong = WrongNumber(f"must be {'a whole number' if whole else 'a finite number'}, not {_short(value, True)}")
        if isinstance(value, bool) or not isinstance(value, (str, numbers.Real)):
            raise wrong
        try:
            if whole and isinstance(value, (str, numbers.Integral)):
                return int(value)
            converted = float(value)
        except (ValueError, OverflowError):
            raise wrong from None
        if not math.isfinite(converted) or (whole and not converted.is_integer()):
            raise wrong
        return int(converted) if whole else converted


def _short(value: Any, quoted: bool = False) -> str:
    text = repr(value) if quoted else f"{value}"
    return text if len(text) <= LONGEST_SHOWN else f"{text[:LONGEST_SHOWN]}..."


def whole(minimum: int, maximum: int) -> Number:
    return Number(int, minimum, maximum)


def real(minimum: float, maximum: float) -> Number:
    return Number(float, minimum, maximum)


# Ranges that several commands share. The upper ends are far beyond real use. They catch typing mistakes.
SEED = whole(0, 2**63 - 1)
VIDEOS = whole(1, 10_000_000)
FIRST_VIDEO = whole(0, 1_000_000_000)
FRAMES = whole(1, 1_000_000)  # of a sampled video
CLIP_FRAMES = whole(1, 4096)
SIDE = whole(1, 16_384)  # pixels
STRIDE = whole(1, 10_000)
FOLD = whole(1, 3)  # of UCF-101
BATCH = whole(1, 100_000)
STEPS = whole(1, 1_000_000_000)  # of training
SAMPLING_STEPS = whole(1, 1000)
DEFAULT_STEPS = 50  # of sampling, in every command
DEFAULT_ETA = 1.0  # the release's
WORKERS = whole(0, 256)
THREADS = whole(1, 1024)
HEADS = whole(1, 1024)
CLIPS_OR_NONE = whole(0, 10_000_000)
SHOWN = whole(1, 1000)
SECONDS = real(0, 1e6)
FPS = real(0.1, 1000)
CRF = whole(0, 51)  # x264's constant rate factor for 8 bits
ETA = real(0, 1)
GUIDANCE = real(0, 1000)


def check_eta(scheduler: object, eta: float) -> None:
    """Raise UserError for an `eta` that a sampler, given by name, would pass over. "auto" may be ddim."""
    if isinstance(scheduler, str) and scheduler not in ("auto", "ddim") and eta != DEFAULT_ETA:
        raise UserError(f"eta is DDIM's share of new noise, and {scheduler} has none: leave it out, or take ddim")
