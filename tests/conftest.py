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


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """What needs so much memory runs only where it is asked for."""
    if "huge" in config.getoption("markexpr"):
        return
    for item in items:
        if item.get_closest_marker("huge"):
            item.add_marker(pytest.mark.skip(reason="needs 15 GB of memory: run with -m huge"))
