"""The two things that can go wrong with video data: one file cannot be used, or nothing can."""

from __future__ import annotations

from pvdm_fast.errors import UserError


class DataError(UserError):
    """The data as a whole cannot be used; the message says what was looked for, where, and what to do."""


class UnreadableVideo(Exception):
    """One video cannot give a clip; the message is the reason. The dataset skips the video and records the reason."""
