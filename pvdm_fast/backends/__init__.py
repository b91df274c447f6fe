"""Where an operation is computed: the choice of a backend, and all backends except Triton's (`kernels/`)."""

from pvdm_fast.backends.choice import (
    BACKENDS,
    OPERATIONS,
    SERVED,
    BackendError,
    automatic,
    report,
    requested,
    unavailable,
    use_backend,
    why_not,
)

__all__ = [
    "BACKENDS",
    "OPERATIONS",
    "SERVED",
    "BackendError",
    "automatic",
    "report",
    "requested",
    "unavailable",
    "use_backend",
    "why_not",
]
