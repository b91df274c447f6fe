"""Shared by all tests: helpers beside this file are importable, and every test starts with the same seeds."""

from __future__ import annotations

import os
from importlib.util import find_spec

os.environ["TRITON_INTERPRET"] = "1"  # before anything imports triton: kernels then run on the CPU, checked

import pytest
import torch

if find_spec("triton"):
    import interpreter

    interpreter.install()


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
