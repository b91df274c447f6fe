"""Tensors that depend on sizes, dtype and device alone: made once for each, not in every forward pass."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from pvdm_fast.ops.derivatives import transforming

Result = TypeVar("Result")


@lru_cache(maxsize=64)
def _made(make: Callable[..., Any], sizes: tuple[Any, ...], device: torch.device, dtype: torch.dtype) -> Any:
    with torch.inference_mode(False):  # its tensors could not be saved for a backward pass later
        return make(*sizes, device, dtype)


def constant(make: Callable[..., Result], like: Tensor, dtype: torch.dtype, *sizes: Any) -> Result:
    """make(*sizes, like.device, dtype), made once: don't write into it.

    It is made anew wherever its tensors would be of no use later: in compiled code, in transforms of `torch.func`, for
    fake tensors, and while a CUDA graph is captured, which computes nothing.
    """
    if torch.compiler.is_compiling() or type(like) not in (Tensor, nn.Parameter) or transforming() or _capturing(like):
        return make(*sizes, like.device, dtype)
    result: Result = _made(make, sizes, like.device, dtype)
    return result


def _capturing(like: Tensor) -> bool:
    return like.is_cuda and torch.cuda.is_current_stream_capturing()
