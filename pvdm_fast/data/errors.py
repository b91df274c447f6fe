"""What can go wrong with video data: one file can't be used, or none can."""

from __future__ import annotations

import errno

from pvdm_fast.errors import UserError


class DataError(UserError):
    """The data as a whole can't be used. The message says what was looked for, where, and what to do."""


class UnreadableVideo(Exception):
    """One video can't give a clip, and the message is the reason. The dataset skips the video and records the reason.

    ``passing``: the cause may be gone at the next try, such as too many open files or a network disk that doesn't
    answer.
    """

    passing = False


# System errors of a file that may be fine: the system has too little of something, or a disk doesn't answer right now.
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
    """The reason from a library's error: ``what``, and the error's own words."""
    words = getattr(error, "strerror", None) or error or type(error).__name__
    reason = UnreadableVideo(f"{what}: {words}")
    reason.passing = isinstance(error, MemoryError) or getattr(error, "errno", None) in _PASSING
    return reason
