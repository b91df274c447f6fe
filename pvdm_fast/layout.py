"""The one place that knows how three planes lie in one packed buffer."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

PLANE_NAMES = ("xy", "yt", "xt")


@dataclass(frozen=True)
class TriplaneLayout:
    """Sizes of a latent lattice, and where its three planes lie in a packed token axis.

    A plane is named after the axes it keeps, in the release's names (PVDM, Yu et al. 2023, section 3.1): `xy` keeps
    (height, width) and comes first, `yt` keeps (time, width), `xt` keeps (time, height). Each is row-major.

    Args:
        time, height, width: latent sizes (pixels / patch for height and width), each at least 1, all free.

    Raises:
        ValueError: a size below 1, or (from `downsample`) a size that the factor doesn't divide.
    """

    time: int
    height: int
    width: int

    def __post_init__(self) -> None:
        for name in ("time", "height", "width"):
            size = getattr(self, name)
            if not isinstance(size, int) or isinstance(size, bool) or size < 1:
                raise ValueError(f"TriplaneLayout: {name} is {size!r}, but must be a whole number of at least 1.")

    @property
    def planes(self) -> tuple[tuple[int, int], tuple[int, int], tuple[int, int]]:
        """(rows, columns) of each plane in packed order."""
        return (self.height, self.width), (self.time, self.width), (self.time, self.height)

    @property
    def offsets(self) -> tuple[int, int, int, int]:
        """Start of each plane in the packed axis, and its end: (0, HW, HW + TW, N)."""
        xy, yt, xt = (rows * columns for rows, columns in self.planes)
        return 0, xy, xy + yt, xy + yt + xt

    @property
    def num_tokens(self) -> int:
        """N = HW + TW + TH."""
        return self.offsets[-1]

    @property
    def num_lattice_tokens(self) -> int:
        """T H W."""
        return self.time * self.height * self.width

    def upsample(self, factor: int = 2) -> TriplaneLayout:
        return TriplaneLayout(self.time * factor, self.height * factor, self.width * factor)

    def downsample(self, factor: int = 2) -> TriplaneLayout:
        for name in ("time", "height", "width"):
            if getattr(self, name) % factor:
                raise ValueError(
                    f"{self} can't be made {factor} times smaller: {name} {getattr(self, name)} is not divisible by "
                    f"{factor}. Choose sizes that are divisible at every level of the network."
                )
        return TriplaneLayout(self.time // factor, self.height // factor, self.width // factor)

    def split(self, packed: Tensor, dim: int = 1) -> tuple[Tensor, ...]:
        """Views of the three planes of a packed tensor, the token axis `dim` unflattened to (rows, columns).

        Raises:
            ValueError: the axis does not hold N tokens.
        """
        self.check(packed, dim)
        starts = self.offsets
        return tuple(
            packed.narrow(dim, starts[i], rows * columns).unflatten(dim, (rows, columns))
            for i, (rows, columns) in enumerate(self.planes)
        )

    def check(self, packed: Tensor, dim: int = 1) -> None:
        """Raise ValueError unless axis `dim` of `packed` holds this layout's N tokens."""
        if packed.shape[dim] != self.num_tokens:
            raise ValueError(
                f"Got {packed.shape[dim]} tokens on axis {dim} of a tensor of shape {tuple(packed.shape)}, but "
                f"{self} has {self.num_tokens} (height x width + time x width + time x height): pass the layout "
                f"that the tensor was packed with."
            )
