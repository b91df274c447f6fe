"""The second half of a sum over programs without atomics: each program writes a row, this adds the rows in order.

These rows are megabytes at full size. The last program to arrive (`arrivals.py`) would take far longer to read them.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from pvdm_fast.kernels.configs import ConfigTable
from pvdm_fast.kernels.launch import Config, launch

# Many rows: narrow programs, so that there are enough of them with few steps each. 64 bytes per row stay coalesced.
SUM_PARTIALS = ConfigTable(
    "sum_partials",
    {
        ("*", "*", "*"): Config({"ROWS": 32, "COLUMNS": 64}),
        ("*", "tall", "*"): Config({"ROWS": 128, "COLUMNS": 16}),
        ("interpreter", "*", "*"): Config({"ROWS": 8, "COLUMNS": 256}),
    },
    candidates=(Config({"ROWS": 64, "COLUMNS": 32}), Config({"ROWS": 256, "COLUMNS": 16}, num_warps=8)),
)


def height_class(count: int) -> str:
    """ "tall" for more than 64 rows, else "flat"."""
    return "tall" if count > 64 else "flat"


@triton.jit
def partials_sum(
    partials, first, second, count, columns, first_columns, second_start, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    totals = tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in range(0, count, ROWS):
        row = start + tl.arange(0, ROWS)
        inside = (row < count)[:, None] & (column < columns)[None, :]
        totals += tl.load(partials + row.to(tl.int64)[:, None] * columns + column[None, :], mask=inside, other=0.0)
    total = tl.sum(totals, 0)
    tl.store(first + column, total.to(first.dtype.element_ty), mask=column < first_columns)
    tl.store(
        second + column - second_start,
        total.to(second.dtype.element_ty),
        mask=(column >= second_start) & (column < columns),
    )


def sum_partials(partials: Tensor, first: Tensor, second: Tensor) -> None:
    """Sums partials (count, columns) over the rows. partials is float32 and contiguous. The head of the sum goes to
    `first`, the tail to `second` (both contiguous, any float dtype). If they have more than `columns` elements
    together, they overlap.
    """
    count, columns = partials.shape
    config = SUM_PARTIALS(partials.device, height_class(count), partials.dtype)
    launch(
        partials_sum,
        (triton.cdiv(columns, config.blocks["COLUMNS"]),),
        partials,
        first,
        second,
        count,
        columns,
        first.numel(),
        columns - second.numel(),
        config=config,
    )
