"""One finished small run that several tests look at, and a clean accelerate state for each test."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from small import SMALL, steps

from pvdm_fast.train import main


@pytest.fixture(autouse=True)
def _fresh_accelerate() -> Iterator[None]:
    """Accelerate keeps its precision for the whole process; tests use several."""
    from accelerate.state import AcceleratorState

    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Both stages, 8 steps each, without interruption."""
    run = tmp_path_factory.mktemp("finished") / "run"
    assert main([*SMALL, *steps(8), "--run", str(run)]) == 0
    return run
