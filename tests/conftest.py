"""Shared by all tests: helpers beside this file are importable, and every test starts with the same seeds."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
