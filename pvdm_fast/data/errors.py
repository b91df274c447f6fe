"""The two things that can go wrong with video data: one file cannot be used, or nothing can."""

from __future__ import annotations

import errno

from pvdm_fast.errors import UserError


class DataError(UserError):
    """The data as a whole cannot be used; the message says what was looked for, where, and what to do."""


class UnreadableVideo(Exception):
    """One video cannot give a clip; the message is the reason. The dataset skips the video and records the reason.

    ``passing``: the cause may be gone at the next try: too many open files, a network disk that stutters.
    """

    passing = False


# What the system says of a file that may be all right: not enough of something, or a disk that doesn't answer now.
_PASSING = frozenset(
    {
        errno.EMFILE,
        errno.ENFILE,
        errno.ENOMEM,
        errno.EIO,
        errno.ESTALE,
        errno.EAGAIN,
        errno.EINTR,
        errno.EBUSY,
        errno.ETIMEDOUT,
        errno.ENXIO,
        errno.ENETDOWN,
        errno.EHOSTDOWN,
    }
)


def unreadable(what: str, error: Exception) -> UnreadableVideo:
    """The reason that an error of a library is: ``what``, and the error's own words."""
    words = getattr(error, "strerror", None) or error or type(error).__name__
    reason = UnreadableVideo(f"{what}: {words}")
    reason.passing = isinstance(error, MemoryError) or getattr(error, "errno", None) in _PASSING
    return reason
