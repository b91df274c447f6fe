"""Shared by all tests: helpers beside this file are importable, and every test starts with the same seeds."""

from __future__ import annotations

import os

os.environ["TRITON_INTERPRET"] = "1"  # before anything imports triton: kernels then run on the CPU, checked

import pytest
import torch


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
