"""FLOPs of PyTorch's own operations, by the formulas that everybody knows."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from pvdm_fast.analysis.flops import FlopCount


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_of_pytorch_counts(dtype: torch.dtype) -> None:
    """Two products forward; two and a half times that backward, which computes the scores again."""
    q, k, v = (torch.randn(2, 3, n, 16, dtype=dtype, requires_grad=True) for n in (20, 12, 12))
    product = 2 * 2 * 3 * 20 * 12 * 16
    with FlopCount() as forward:
        out = F.scaled_dot_product_attention(q, k, v)
    with FlopCount() as backward:
        out.float().sum().backward()
    assert forward.total == 2 * product
    assert backward.total == 5 * product


def test_a_layer_counts() -> None:
    layer = torch.nn.Linear(7, 5)
    with FlopCount() as count:
        layer(torch.randn(3, 7))
    assert count.total == 2 * 3 * 7 * 5
