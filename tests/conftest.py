"""Shared by all tests: helpers beside this file are importable, and every test starts with the same seeds."""

from __future__ import annotations

import os
from importlib.util import find_spec

if "PYTEST_XDIST_WORKER" in os.environ:  # as many processes as cores: one thread each
    os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["TRITON_INTERPRET"] = "1"  # before anything imports triton: kernels then run on the CPU, checked

import pytest
import torch

if find_spec("triton"):
    from backends.triton import interpreter

    interpreter.install()


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """What needs so much memory runs only where it is asked for."""
    reasons = {"huge": "needs 15 GB of memory", "exhaustive": "takes minutes"}
    for name, reason in reasons.items():
        if name in config.getoption("markexpr"):
            continue
        for item in items:
            if item.get_closest_marker(name):
                item.add_marker(pytest.mark.skip(reason=f"{reason}: run with -m {name}"))
