"""Every measured case, by name."""

from __future__ import annotations

from benchmarks import cases_networks, cases_operations
from benchmarks.registry import Case

_CASES = {
    case.name: case
    for kind in ("operation", "block", "network")
    for case in (cases_operations.REGISTRY.cases | cases_networks.REGISTRY.cases).values()
    if case.kind == kind
}


def all_cases() -> dict[str, Case]:
    """Every case by name: operations, then blocks, then networks."""
    return dict(_CASES)
