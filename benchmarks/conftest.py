"""`pytest benchmarks/ --benchmark-only`: options, and the table at the end."""

from __future__ import annotations

import pytest

from benchmarks import rows

ROWS = pytest.StashKey[list[rows.Row]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--full", action="store_true", help="benchmarks: the full-size models instead of small ones")
    parser.addoption("--compiled", action="store_true", help="benchmarks: torch.compile too (slow; always on a GPU)")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[ROWS] = []


@pytest.fixture
def measured(request: pytest.FixtureRequest) -> list[rows.Row]:
    """Rows for the table at the end."""
    return request.config.stash[ROWS]


@pytest.hookimpl(trylast=True)  # after pytest-benchmark's own tables
def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    if found := config.stash[ROWS]:
        terminalreporter.section("ours against the eager baseline (ratio above 1: ours is faster)")
        terminalreporter.write_line(rows.aligned(found))
        for text in sorted({text for row in found for text in row["left_out"]}):
            terminalreporter.write_line(f"left out: {text}")
