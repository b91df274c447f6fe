"""Choosing a backend by name, by environment or automatically, and the refusals."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from pvdm_fast import TriplaneLayout, ops, use_backend
from pvdm_fast.backends import choice, extensions
from pvdm_fast.backends.choice import BACKENDS, OPERATIONS, SERVED, BackendError

LAYOUT = TriplaneLayout(2, 3, 4)


def expand(dtype: torch.dtype = torch.float32) -> torch.Tensor:
    planes = torch.randn(1, LAYOUT.num_tokens, 2, dtype=dtype)
    return ops.triplane_expand(planes, LAYOUT, torch.randn(3, 4, 2, dtype=dtype), torch.randn(3, 4, dtype=dtype))


def test_context_manager_and_function_restore() -> None:
    assert choice.requested() == "auto"
    with use_backend("reference"):
        assert choice.requested() == "reference"
        with use_backend("auto"):
            assert choice.requested() == "auto"
        assert choice.requested() == "reference"
    assert choice.requested() == "auto"
    use_backend("reference")
    assert choice.requested() == "reference"
    use_backend("auto")


def test_restored_after_an_error() -> None:
    with pytest.raises(KeyError), use_backend("reference"):
        raise KeyError
    assert choice.requested() == "auto"


def test_blocks_of_two_threads_may_end_in_any_order() -> None:
    """The latest request counts in all threads. When all blocks have ended, the request before them counts again."""
    use_backend("auto")
    first, second = use_backend("reference"), use_backend("cpu")
    first.__enter__()
    second.__enter__()
    assert choice.requested() == "cpu"
    first.__exit__(None, None, None)
    assert choice.requested() == "cpu"
    second.__exit__(None, None, None)
    assert choice.requested() == "auto"


def test_many_threads_leave_nothing_behind() -> None:
    use_backend("auto")

    def work(index: int) -> None:
        for _ in range(50):
            with use_backend("reference" if index % 2 else "cpu"):
                assert choice.requested() in ("reference", "cpu")

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(8)))
    assert choice.requested() == "auto"


def test_request_without_a_block_is_replaced_by_the_next() -> None:
    for name in ("reference", "cpu", "auto"):
        use_backend(name)
        assert choice.requested() == name
    with use_backend("reference"):
        use_backend("cpu")
        assert choice.requested() == "cpu"
    assert choice.requested() == "cpu"
    use_backend("auto")
    assert len(choice._requests) <= 2


def test_unknown_name() -> None:
    with pytest.raises(ValueError, match=r"Unknown backend 'gpu': choose one of reference, cpu, triton, cuda"):
        use_backend("gpu")


@pytest.fixture
def fresh_reasons() -> Iterator[None]:
    """The reasons why backends can't run are cached per process. Clears them for this test, and again after it."""
    for found in (choice.unavailable, choice.ranking):
        found.cache_clear()
    yield
    for found in (choice.unavailable, choice.ranking):
        found.cache_clear()


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU: run with CUDA_VISIBLE_DEVICES=")
@pytest.mark.parametrize("name", ["cuda", "triton"])
def test_backend_by_name_that_cannot_run_raises(
    name: str, fresh_reasons: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TRITON_INTERPRET")
    with pytest.raises(BackendError, match=rf"Backend '{name}' cannot run here: .*"):
        use_backend(name)
    assert choice.requested() == "auto"


def test_triton_not_installed(fresh_reasons: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choice, "find_spec", lambda name: None)
    with pytest.raises(BackendError, match=r"Backend 'triton' cannot run here: triton is not installed: pip install"):
        use_backend("triton")
    report = choice.report("cpu")
    assert all("not installed" in str(report[op]["triton"]) for op in SERVED["triton"] if op in report)


@pytest.mark.slow
def test_everything_else_works_without_triton() -> None:
    """If `import triton` fails, the package, the choice of backends and the operations still work."""
    code = """
import sys
sys.modules["triton"] = None  # what makes `import triton` an ImportError
import torch, pvdm_fast
from pvdm_fast import info, ops, tune
print(ops.geglu(torch.ones(1, 4)).shape)
info.main([])
"""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    found = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    assert found.stdout.startswith("torch.Size([1, 2])")


def test_backend_by_name_does_not_fall_back() -> None:
    """If there is no kernel for this dtype, it is a clear refusal, not the reference's result."""
    if choice.unavailable("cpu"):
        pytest.skip("the CPU extension was not built: install g++, and pvdm_fast again")
    with use_backend("cpu"):
        expand()
        with pytest.raises(BackendError, match=r"cannot serve triplane_expand: .*float64"):
            expand(torch.float64)


def test_backward_asks_for_the_backend_of_the_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = []
    choose = choice.choose
    monkeypatch.setattr(choice, "choose", lambda op, name, i: (chosen.append((op, name)), choose(op, name, i))[1])
    x = torch.randn(2, 6, requires_grad=True)
    with use_backend("reference"):
        y = ops.geglu(x)
    y.sum().backward()
    assert chosen == [("geglu", "reference"), ("geglu", "reference")]


def test_compiled_code_follows_the_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = []
    choose = choice.choose
    monkeypatch.setattr(choice, "choose", lambda op, name, i: (chosen.append(name), choose(op, name, i))[1])
    torch._dynamo.reset()
    compiled = torch.compile(ops.geglu, fullgraph=True, backend="aot_eager")
    x = torch.randn(2, 6)
    compiled(x)
    with use_backend("reference"):
        compiled(x)
    compiled(x)
    assert chosen == ["auto", "reference", "auto"]


def test_automatic_choice_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    choice._log_choice.cache_clear()
    with caplog.at_level(logging.INFO, logger="pvdm_fast"):
        expand()
        expand()
    assert [r.message for r in caplog.records if "triplane_expand" in r.message] == [
        f"triplane_expand on cpu, float32: backend {choice.automatic('triplane_expand', 'cpu', torch.float32)}"
    ]


@pytest.mark.slow
def test_environment_variable() -> None:
    code = "from pvdm_fast.backends import choice; print(choice.requested())"
    found = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PVDM_FAST_BACKEND": "reference"},
        capture_output=True,
        text=True,
    )
    assert found.stdout.strip() == "reference"
    wrong = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | {"PVDM_FAST_BACKEND": "fast"}, capture_output=True, text=True
    )
    assert "Unknown backend 'fast'" in wrong.stderr


def test_report_covers_everything() -> None:
    report = choice.report("cpu")
    assert set(report) == {*OPERATIONS, *choice.FUSED_PROJECTION}
    for op, row in report.items():
        assert set(row) == {"auto", *BACKENDS}
        assert row["reference"] is None
        for backend in BACKENDS:
            if op not in SERVED[backend]:
                assert "no kernel" in str(row[backend])


def test_served_operations_exist() -> None:
    known = (*OPERATIONS, *choice.FUSED, *choice.FUSED_PROJECTION)
    assert all(op in known for served in SERVED.values() for op in served)


@pytest.mark.parametrize(
    ("op", "dtype", "capability", "tf32", "first"),
    [
        ("segment_attention", torch.bfloat16, (8, 0), False, "cuda"),
        ("segment_attention", torch.bfloat16, (9, 0), False, "triton"),
        ("axial_attention", torch.float16, (10, 0), False, "triton"),
        ("axial_attention", torch.float16, (12, 0), False, "cuda"),
        ("segment_attention", torch.float32, (8, 6), False, "cuda"),
        ("segment_attention", torch.float32, (8, 6), True, "triton"),
        ("plane_norm", torch.float32, (8, 0), False, "triton"),
        ("triplane_expand", torch.float32, (9, 0), True, "cuda"),
        ("triplane_project", torch.bfloat16, (8, 6), False, "triton"),
        ("geglu", torch.float32, (8, 0), False, "triton"),
    ],
)
def test_choice_between_the_gpu_backends(
    monkeypatch: pytest.MonkeyPatch,
    op: str,
    dtype: torch.dtype,
    capability: tuple[int, int],
    tf32: bool,
    first: str,
) -> None:
    monkeypatch.setattr(choice, "why_not", lambda backend, op, _: None if op in SERVED[backend] else "no kernel")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch, "empty", lambda *size, **options: None)
    assert choice.ranking.__wrapped__(op, torch.device("cuda"), dtype, tf32)[0] == first


def test_targets_that_run_on_a_gpu() -> None:
    targets = ["sm_80", "sm_86", "sm_90a", "sm_120f", "ptx_80"]
    assert extensions.runs_on(targets, (8, 0)) and extensions.runs_on(targets, (8, 9))
    assert extensions.runs_on(["sm_86"], (8, 9)) and not extensions.runs_on(["sm_86"], (8, 0))
    assert extensions.runs_on(["sm_90a"], (9, 0)) and not extensions.runs_on(["sm_90"], (10, 0))
    assert extensions.runs_on(["sm_120f"], (12, 1)) and not extensions.runs_on(["sm_120a"], (12, 1))
    assert extensions.runs_on(["ptx_90"], (10, 0)) and not extensions.runs_on(["ptx_90"], (8, 9))
    assert not extensions.runs_on(["ptx_90a"], (10, 0)) and not extensions.runs_on([], (9, 0))
    assert not extensions.runs_on(targets, (7, 5))


def test_gpu_that_the_extension_was_not_built_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    message = extensions._gpu_reason(["sm_80", "ptx_80"])
    assert message is not None
    assert "built for sm_80, ptx_80" in message and "7.5" in message and "TORCH_CUDA_ARCH_LIST" in message
    assert extensions._gpu_reason(["sm_75"]) is None
