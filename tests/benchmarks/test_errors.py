"""Errors of the CPU kernels against float64, per operation, block and network: float32, and bfloat16 with eager's."""

from __future__ import annotations

import math

import pytest
import torch
from instruction_sets import ISAS, using
from tolerances import BFLOAT16_FACTOR, FLOAT32_ERROR

from benchmarks.cases import all_cases
from benchmarks.errors import Error, cases, markdown, measure
from benchmarks.measure import Prepared
from benchmarks.registry import Case, Form, Setting, assemble
from pvdm_fast import use_backend
from pvdm_fast.backends import choice, extensions

pytestmark = pytest.mark.skipif(extensions.availability("cpu") is not None, reason=str(extensions.availability("cpu")))


def check(errors: list[Error]) -> None:
    for error in errors:
        where = f"{error.case}, {error.quantity}"
        assert error.float32["ours"] <= FLOAT32_ERROR, where
        assert math.isfinite(error.bfloat16["eager"]), where
        assert error.bfloat16["ours"] <= BFLOAT16_FACTOR * error.bfloat16["eager"], where


@pytest.mark.parametrize(
    "name",
    [pytest.param(case.name, marks=pytest.mark.slow if case.kind == "network" else ()) for case in cases()],
)
def test_errors(name: str) -> None:
    with use_backend("cpu"):
        errors = measure(all_cases()[name])
    assert errors[0].quantity == "result"
    assert all(set(error.bfloat16) == {"ours", "eager"} for error in errors)
    check(errors)


@pytest.mark.parametrize("isa", [isa for isa in ISAS if isa != extensions.extension("_cpu").isa()])
@pytest.mark.parametrize("name", [case.name for case in cases("*_attention/*")])
def test_attention_in_every_instruction_set(name: str, isa: str) -> None:
    """Attention's bf16 products differ between instruction sets. The automatic one is tested above."""
    with using(isa), use_backend("cpu"):
        check(measure(all_cases()[name]))


def test_every_operation_and_both_networks_are_measured() -> None:
    """But for what the CPU has no kernel for."""
    names = {case.name for case in cases()}
    expected = set(choice.OPERATIONS).difference(choice.PLAIN_ELSEWHERE)
    assert {name.partition("/")[0] for name in names} >= {*expected, "denoiser", "autoencoder"}


def test_what_is_wrong_is_seen() -> None:
    """A deliberate error shows with its size, in both dtypes and in the gradient."""

    def prepare(setting: Setting) -> Prepared:
        wrong = 1.0 if setting.dtype == torch.float64 else 1.01
        x = setting.draw(64)
        forms = {"ours": Form(lambda x: wrong * x * x, [x]), "eager": Form(lambda x: x * x, [x])}
        return assemble(setting, "64", forms, {}, 0)

    result, gradient = measure(Case("wrong", "operation", prepare))
    for error in (result, gradient):
        assert error.float32["ours"] == pytest.approx(0.01, rel=0.01)
        assert error.float32["eager"] < 1e-7
        assert error.bfloat16["ours"] == pytest.approx(0.01, rel=0.5)
    assert markdown([result]).count("\n") == 2
