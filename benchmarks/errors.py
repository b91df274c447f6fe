"""`python -m benchmarks.errors`: errors of our and the eager computation against float64, in float32 and bf16."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from benchmarks.cases import all_cases
from benchmarks.measure import Runner, outcome
from benchmarks.registry import Case, Setting
from benchmarks.report import PAGES, matching, write_section
from pvdm_fast import use_backend
from pvdm_fast.analysis.comparison import relative_error
from pvdm_fast.backends import choice

# Large enough to mean something, small enough for tests: 296 tokens of three unequal planes, 2 heads of 32, and a
# lattice of 8 x 10 x 12.
SETTING = Setting(
    "tiny",
    denoiser_overrides=(("time", 8), ("height", 10), ("width", 12), ("num_heads", 2)),
    autoencoder_overrides=(
        ("frames", 8), ("height", 40), ("width", 48), ("head_dim", 32), ("num_heads", 2),
    ),
)  # fmt: skip
DOCUMENT = PAGES / "errors.md"
LEFT_OUT = ("sampler step",)  # the denoiser twice, with the same arithmetic around it for all
COLUMNS = ("case", "of", "shape", "fp32 ours", "fp32 eager", "bf16 ours", "bf16 eager", "bf16 ours / eager")


@dataclass(frozen=True)
class Error:
    """Relative errors (2-norm) of one result or gradient against float64, for "ours" and "eager"."""

    case: str
    quantity: str
    shape: str
    float32: dict[str, float]
    bfloat16: dict[str, float]


def cases(pattern: str = "*") -> list[Case]:
    """The cases with errors of their own: operations that a CPU kernel computes, blocks and networks."""
    left_out = (*LEFT_OUT, *choice.PLAIN_ELSEWHERE)
    return [case for case in matching(pattern) if case.name.partition("/")[0] not in left_out]


def measure(case: Case, setting: Setting = SETTING) -> list[Error]:
    """Errors of a case's results and, if it has a backward pass, of its gradients.

    The truth is the float64 reference. Inputs, weights and incoming gradients are the same numbers for all, exact in
    the measured dtype. A network's weight gradients are compared together, an operation's one by one.
    """
    found = {dtype: _by_way(case, replace(setting, dtype=dtype)) for dtype in (torch.float32, torch.bfloat16)}
    shape, float32 = found[torch.float32]
    _, bfloat16 = found[torch.bfloat16]
    return [Error(case.name, quantity, shape, float32[quantity], bfloat16[quantity]) for quantity in float32]


def _by_way(case: Case, setting: Setting) -> tuple[str, dict[str, dict[str, float]]]:
    """The shape, and {quantity: {"ours" or "eager": error}} in the setting's dtype."""
    differentiate = case.directions != ("forward",)
    prepared = case.prepare(setting)
    exact = case.prepare(replace(setting, dtype=torch.float64, values=setting.dtype))
    with use_backend("reference"):
        expected = dict(_quantities(exact.runners["ours"], case.kind, differentiate))
    errors: dict[str, dict[str, float]] = {quantity: {} for quantity in expected}
    for way in ("ours", "eager"):
        for quantity, tensors in _quantities(prepared.runners[way], case.kind, differentiate):
            errors[quantity][way] = relative_error(tensors, expected[quantity])
    return prepared.shape, errors


def _quantities(runner: Runner, kind: str, differentiate: bool) -> Iterator[tuple[str, Sequence[Tensor]]]:
    """The compared quantities, by name."""
    found, _ = outcome(runner, differentiate)
    yield "result", found["result"]
    if "input" in found:
        yield "gradient of input", found["input"]
    weights = found.get("weights", [])
    if kind == "operation":
        for name, gradient in zip(runner.parameters, weights, strict=False):
            yield f"gradient of {name}", [gradient]
    elif weights:
        yield "gradient of weights", weights


def cells(error: Error) -> list[str]:
    """One line of the table. There is no ratio to an error of 0 (sums of few terms can be exact)."""
    values = [of[way] for of in (error.float32, error.bfloat16) for way in ("ours", "eager")]
    ours, eager = values[2:]
    ratio = f"{ours / eager:.2f}" if eager else "-"
    return [error.case, error.quantity, error.shape, *(f"{value:.1e}" for value in values), ratio]


def markdown(errors: Sequence[Error]) -> str:
    lines = [COLUMNS, ["---"] * len(COLUMNS), *map(cells, errors)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.errors", description=__doc__)
    parser.add_argument("--only", default="*", metavar="PATTERN", help="cases whose name contains or matches this")
    parser.add_argument("--write-docs", action="store_true", help=f"write the table to {DOCUMENT.name}")
    options = parser.parse_args(arguments)
    found = []
    for case in cases(options.only):
        for error in measure(case):
            print("  ".join(cells(error)), flush=True)
            found.append(error)
    if not found:
        print(f"No case matches {options.only!r}. There are: {', '.join(all_cases())}", file=sys.stderr)
        return 2
    if options.write_docs:
        write_section(DOCUMENT, "errors", markdown(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
