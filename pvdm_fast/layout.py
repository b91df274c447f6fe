"""How planes lie in one packed buffer. Only this module knows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor

PLANE_NAMES = ("xy", "yt", "xt")


def _is_size(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


@dataclass(frozen=True)
class PlaneLayout:
    """Planes of any sizes, one after another in a packed token axis, each row-major.

    Args:
        planes: (rows, columns) of each plane.

    Attributes:
        sizes: (rows, columns, rows, columns, ...).
        offsets: start of each plane in the packed axis, and its end.
        num_tokens: N, the tokens of all planes.

    Raises:
        ValueError: there is no plane, or a size is below 1. From `downsample`: the factor doesn't divide a size.
    """

    planes: tuple[tuple[int, int], ...]
    sizes: list[int] = field(init=False, repr=False, compare=False)
    offsets: tuple[int, ...] = field(init=False, repr=False, compare=False)
    num_tokens: int = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not self.planes or not all(_is_size(size) for plane in self.planes for size in plane):
            raise ValueError(f"A layout needs planes whose sizes are whole numbers of at least 1, not {self.planes}.")
        offsets = [0]
        for rows, columns in self.planes:
            offsets.append(offsets[-1] + rows * columns)
        object.__setattr__(self, "sizes", [size for plane in self.planes for size in plane])
        object.__setattr__(self, "offsets", tuple(offsets))
        object.__setattr__(self, "num_tokens", offsets[-1])

    @classmethod
    def from_sizes(cls, sizes: Sequence[int]) -> PlaneLayout:
        """From (rows, columns, rows, columns, ...), the form in which operations take a layout."""
        return cls(tuple(zip(sizes[::2], sizes[1::2], strict=True)))

    def upsample(self, factor: int = 2) -> PlaneLayout:
        return PlaneLayout(tuple((rows * factor, columns * factor) for rows, columns in self.planes))

    def downsample(self, factor: int = 2) -> PlaneLayout:
        if not _is_size(factor):
            raise ValueError(f"A layout can be made smaller by whole factors of at least 1, not {factor!r}.")
        for size in self.sizes:
            if size % factor:
                raise ValueError(
                    f"{self} can't be made {factor} times smaller: {size} is not divisible by {factor}. "
                    f"Choose sizes that are divisible at every level of the network."
                )
        return PlaneLayout(tuple((rows // factor, columns // factor) for rows, columns in self.planes))

    def split(self, packed: Tensor, dim: int = 1) -> tuple[Tensor, ...]:
        """Views of the planes of a packed tensor, with token axis `dim` unflattened to (rows, columns).

        Raises:
            ValueError: the axis does not hold N tokens.
        """
        self.check(packed, dim)
        return tuple(
            packed.narrow(dim, start, rows * columns).unflatten(dim, (rows, columns))
            for start, (rows, columns) in zip(self.offsets[:-1], self.planes, strict=True)
        )

    def check(self, packed: Tensor, dim: int = 1) -> None:
        """Raise ValueError unless axis `dim` of `packed` holds this layout's N tokens."""
        if packed.shape[dim] != self.num_tokens:
            raise ValueError(
                f"Got {packed.shape[dim]} tokens on axis {dim} of a tensor of shape {tuple(packed.shape)}, but "
                f"{self} has {self.num_tokens}: pass the layout that the tensor was packed with."
            )


@dataclass(frozen=True, init=False)
class TriplaneLayout(PlaneLayout):
    """The three planes of a latent lattice, N = HW + TW + TH tokens.

    Planes have the release's names (PVDM, Yu et al. 2023, section 3.1). `xy` keeps (height, width) and comes first,
    `yt` keeps (time, width), `xt` keeps (time, height).

    Args:
        time, height, width: latent sizes (pixels / patch for height and width), each at least 1.

    Raises:
        ValueError: a size is below 1. From `downsample`: the factor doesn't divide a size.
    """

    time: int
    height: int
    width: int

    def __init__(self, time: int, height: int, width: int) -> None:
        for name, size in (("time", time), ("height", height), ("width", width)):
            if not _is_size(size):
                raise ValueError(f"TriplaneLayout: {name} is {size!r}, but must be a whole number of at least 1.")
            object.__setattr__(self, name, size)
        object.__setattr__(self, "planes", ((height, width), (time, width), (time, height)))
        self.__post_init__()

    def __repr__(self) -> str:
        return f"TriplaneLayout(time={self.time}, height={self.height}, width={self.width})"

    @property
    def num_lattice_tokens(self) -> int:
        """T H W."""
        return self.time * self.height * self.width

    def upsample(self, factor: int = 2) -> TriplaneLayout:
        return TriplaneLayout(self.time * factor, self.height * factor, self.width * factor)

    def downsample(self, factor: int = 2) -> TriplaneLayout:
        smaller = super().downsample(factor).planes
        return TriplaneLayout(smaller[1][0], *smaller[0])
