"""Cases agree with the baseline, and reports say what was measured."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import floors, machine, plots, report, rows
from benchmarks.cases import all_cases
from benchmarks.measure import Disagreement, Timings, alternate, check_agreement, rounds_for, seconds
from benchmarks.memory import LiveMemory, saved_bytes, weigh, weigh_runner
from benchmarks.registry import Form, Setting, assemble
from benchmarks.session import DoesNotFit, devices, get_ready

TINY = Setting("tiny")
BFLOAT = replace(TINY, dtype=torch.bfloat16)
QUICK = [name for name, case in all_cases().items() if case.kind != "network"]


@pytest.fixture(autouse=True)
def _no_measuring_of_peaks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(floors, "gemm_peak", lambda dtype, device: 100e9)
    monkeypatch.setattr(floors, "bandwidth", lambda working_set, device: 10e9)


def slow(*values: object) -> Any:
    return pytest.param(*values, marks=pytest.mark.slow)


@pytest.mark.parametrize("setting", [TINY, slow(BFLOAT)], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", QUICK)
def test_agreement(name: str, setting: Setting) -> None:
    case = all_cases()[name]
    errors = check_agreement(case.prepare(setting), case.kind)
    assert {"result", "input"} <= set(errors["ours"])


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name, case in all_cases().items() if case.kind == "network"])
def test_networks_agree(name: str) -> None:
    case = all_cases()[name]
    check_agreement(case.prepare(TINY), case.kind, differentiate=case.directions != ("forward",))


def test_every_operation_and_direction_is_covered() -> None:
    from pvdm_fast.backends.choice import OPERATIONS

    names = {name.partition("/")[0] for name in all_cases()}
    assert set(OPERATIONS) | {"block", "denoiser", "sampler step", "autoencoder"} <= names
    assert {"autoencoder encode", "autoencoder decode"} <= names


def wrong_by(amount: float, dtype: torch.dtype) -> None:
    setting = replace(TINY, dtype=dtype)
    x = setting.draw(64, 32)
    forms = {"ours": Form(lambda t: t * t + amount, [x]), "eager": Form(lambda t: t * t, [x])}
    check_agreement(assemble(setting, "64 x 32", forms, {}, 0), "operation")


def test_a_wrong_result_is_not_timed() -> None:
    wrong_by(0.0, torch.float32)
    with pytest.raises(Disagreement, match="result: ours differs by"):
        wrong_by(1e-3, torch.float32)
    wrong_by(1e-3, torch.bfloat16)
    with pytest.raises(Disagreement):
        wrong_by(float("nan"), torch.bfloat16)


def test_a_wrong_gradient_is_not_timed() -> None:
    x = TINY.draw(64, 32)
    forms = {"ours": Form(lambda t: t.detach() * t, [x]), "eager": Form(lambda t: t * t, [x])}
    with pytest.raises(Disagreement, match="input: ours differs"):
        check_agreement(assemble(TINY, "64 x 32", forms, {}, 0), "operation")


def test_ratio_is_of_paired_rounds() -> None:
    timings = Timings({"ours": [1.0, 2.0, 4.0], "eager": [2.0, 4.0, 8.0], "sdpa": [1.0, 1.0, 1.0]})
    assert timings.ratio("eager") == (2.0, 2.0, 2.0)
    assert timings.ratio("sdpa")[1] == 0.5
    assert timings.spread("ours") == (1.5, 3.0)
    assert timings.spread("eager") == (3.0, 6.0)


def test_rounds() -> None:
    assert rounds_for(0.1, 1.0) == 10
    assert rounds_for(10.0, 1.0) == 3
    assert rounds_for(1e-6, 1.0) == 50


def test_forward_is_timed_without_a_graph_and_backward_without_the_forward() -> None:
    calls: list[bool] = []

    def function(t: Tensor) -> Tensor:
        calls.append(torch.is_grad_enabled())
        return t * 2

    prepared = assemble(TINY, "8", {"ours": Form(function, [torch.ones(8)])}, {}, 0)
    runner = prepared.runners["ours"]
    assert seconds(runner, "forward", "cpu") > 0
    assert calls == [False]
    runner.gradients = [torch.ones(8)]
    step = runner.step("backward")
    assert calls == [False, True]
    assert [gradient.tolist() for gradient in step()] == [[2.0] * 8]  # type: ignore[attr-defined]
    assert calls == [False, True]


def test_a_gpu_is_timed_by_its_own_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """The cache is overwritten, then events surround the work alone, then there is one wait."""
    log: list[str] = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            log.append("record")

        def elapsed_time(self, end: Event) -> float:
            return 2.5  # ms

    class Scratch:
        def zero_(self) -> None:
            log.append("overwrite")

    def function(t: Tensor) -> Tensor:
        log.append("forward")
        return t * 2

    runner = assemble(TINY, "8", {"ours": Form(function, [torch.ones(8)])}, {}, 0).runners["ours"]
    runner.gradients = [torch.ones(8)]
    real = runner.differentiate
    monkeypatch.setattr(runner, "differentiate", lambda results: log.append("backward") or real(results))
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: log.append("wait"))
    monkeypatch.setattr(torch, "empty", lambda *size, **options: Scratch())
    assert seconds(runner, "backward", "cuda") == 0.0025
    assert log == ["forward", "overwrite", "record", "backward", "record", "wait"]


def test_a_gpu_is_measured_where_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    for there, expected in ((True, ["cpu", "cuda"]), (False, ["cpu"])):
        monkeypatch.setattr(torch.cuda, "is_available", lambda there=there: there)
        assert devices() == expected


def test_runners_alternate() -> None:
    order: list[str] = []

    def form(name: str) -> Form:
        def function(t: Tensor) -> Tensor:
            order.append(name)
            return t + 1

        return Form(function, [torch.ones(2)])

    runners = assemble(TINY, "2", {name: form(name) for name in ("ours", "eager")}, {}, 0).runners
    timings = alternate(runners, "forward", "cpu", rounds=2)
    assert order == ["ours", "eager", "ours", "eager", "eager", "ours"]
    assert [len(found) for found in timings.seconds.values()] == [2, 2]


def test_saved_bytes_counts_each_storage_once_and_no_parameters() -> None:
    weight, x = torch.ones(4, requires_grad=True), torch.ones(8, 4, requires_grad=True)

    def run() -> Sequence[Tensor]:
        y = x * weight  # saves x and the weight
        return [y * y.view(-1).view(8, 4)]  # saves y, twice

    assert saved_bytes(run, [weight]) == x.nbytes * 2
    assert saved_bytes(run, []) == x.nbytes * 2 + weight.nbytes


def test_live_memory() -> None:
    with LiveMemory() as live:
        a = torch.ones(256)
        b = a + 1
        c = b.view(16, 16)
        del b
        assert live.now == 2048
        del a, c
    assert (live.now, live.peak) == (0, 2048)


@pytest.mark.parametrize("name", ["plane_conv/3x3", "block/cross-plane attention", slow("autoencoder")])
def test_weighing_shapes_equals_weighing_a_run(name: str) -> None:
    case = all_cases()[name]
    weights = weigh(case, TINY, "both")
    prepared = case.prepare(TINY)
    for runner in ("ours", "eager"):
        weighed, run = weights[runner], weigh_runner(prepared.runners[runner], "both")
        # By shapes each network makes rotation tables of its own. A run shares them: 7 KB of 11 MB here.
        assert weighed.saved == pytest.approx(run.saved, rel=1e-3)
        assert weighed.peak == pytest.approx(run.peak, rel=1e-3)
    if case.kind == "network":
        assert weights["ours, recomputing"].saved < weights["ours"].saved


@pytest.mark.parametrize("name", [slow(name) if case.kind == "network" else name for name, case in all_cases().items()])
def test_every_case_can_be_weighed(name: str) -> None:
    case = all_cases()[name]
    for direction in case.directions:
        for runner, weight in weigh(case, TINY, direction).items():
            assert weight.peak > 0 and (weight.saved == 0 or direction != "forward"), runner


@pytest.mark.slow
def test_what_does_not_fit_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    case = all_cases()["block/TimeSformer layer"]
    weights = weigh(case, TINY, "both")
    between = (weights["sdpa"].peak + weights["eager"].peak) // 2
    monkeypatch.setattr("benchmarks.session.available", lambda device: between)
    ready = get_ready(case, TINY)
    assert set(ready.prepared.runners) == {"ours", "sdpa"}
    assert len(ready.left_out) == 1
    assert ready.left_out[0].startswith("eager needs")
    monkeypatch.setattr("benchmarks.session.available", lambda device: 1024)
    with pytest.raises(DoesNotFit, match="ours needs"):
        get_ready(case, TINY)


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> list[rows.Row]:
    """Rows of two cases: made, written and read back."""
    target = tmp_path_factory.mktemp("results") / "machine.jsonl"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(floors, "gemm_peak", lambda dtype, device: 100e9)
        patch.setattr(floors, "bandwidth", lambda working_set, device: 10e9)
        for name in ("plane_conv/3x3", "plane_norm/joint"):
            ready = get_ready(all_cases()[name], BFLOAT)
            for direction in ("forward", "both"):
                timings = alternate(ready.prepared.runners, direction, "cpu", rounds=3)
                rows.append(ready.row(direction, timings), target)
    return rows.read(target)


def test_row_says_everything(stored: list[rows.Row]) -> None:
    row = stored[1]
    assert (row["case"], row["direction"], row["dtype"], row["size"], row["rounds"]) == (
        "plane_conv/3x3", "both", "bf16", "tiny", 3,
    )  # fmt: skip
    assert set(row["ratio"]) == {"eager", "eager fp32"}
    for low, median, high in [*row["seconds"].values(), *row["ratio"].values()]:
        assert 0 < low <= median <= high
    from pvdm_fast.backends import choice

    assert row["backends"] == {"plane_conv": choice.automatic("plane_conv", "cpu", torch.bfloat16)}
    assert row["floor"]["share"] == pytest.approx(row["floor"]["seconds"] / row["seconds"]["ours"][1])
    assert row["saved"]["ours"] > 0
    assert set(row["errors"]["ours"]) == {"result", "input", "weights"}
    assert {"cpu", "flags", "threads", "torch", "commit", "isa"} <= set(row["machine"])


def test_newest_row_wins(stored: list[rows.Row]) -> None:
    again = json.loads(json.dumps(stored[0]))
    again["rounds"] = 99
    assert [row["rounds"] for row in rows.newest([*stored, again])] == [99, 3, 3, 3]


def test_tables(stored: list[rows.Row]) -> None:
    slow = json.loads(json.dumps(stored[0]))
    slow["ratio"]["eager"] = [0.4, 0.5, 0.6]
    text = rows.aligned([slow])
    assert "slower" in text
    assert "0.50x" in text
    assert max(map(len, text.splitlines())) <= rows.WIDTH
    lines = rows.markdown(stored).splitlines()
    assert len(lines) == 2 + len(stored)
    assert {line.count("|") for line in lines} == {len(rows.COLUMNS) + 1}


def test_a_row_of_a_busy_machine_is_marked(stored: list[rows.Row]) -> None:
    fair, over, busy = (json.loads(json.dumps(stored[0])) for _ in range(3))
    fair |= {"busy": 0.1, "case": "segment_attention/across planes", "seconds": {"ours": [9, 99.9, 999]}}
    for row, share in ((fair, 0.5), (over, 1.13), (busy, 0.5)):
        row["floor"]["share"] = share
    over["busy"], busy["busy"] = 0.0, 0.3
    assert [rows.doubtful(row) for row in (fair, over, busy)] == [False, True, True]
    text = rows.aligned([fair, over, busy])
    assert "113 % !" in text and "50 % !" in text and text.endswith(rows.DOUBTFUL)
    assert max(map(len, text.splitlines())) <= rows.WIDTH
    assert rows.DOUBTFUL not in rows.aligned([fair])
    assert ["!" in line for line in rows.markdown([fair, over, busy]).splitlines()[2:]] == [False, True, True]


def test_others_are_counted_without_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    clocks = {"perf_counter": 0.0, "process_time": 0.0}
    for name in clocks:
        monkeypatch.setattr(machine.time, name, lambda name=name: clocks[name])
    busy = [100.0]
    monkeypatch.setattr(machine, "busy_time", lambda: busy[0])
    others = machine.Others()
    clocks.update(perf_counter=2.0, process_time=2.5)
    busy[0] += 4.0
    assert others.cores() == 0.75
    assert machine.Others().cores() == 0.0


def test_every_column_of_the_terminal_fits() -> None:
    """The longest case, and the widest number that a column is made for."""
    assert set(rows.TERMINAL) - {""} <= set(rows.COLUMNS)
    assert len(rows.line()) <= rows.WIDTH
    assert max(len(name) for name in all_cases()) <= rows.TERMINAL["case"]


def test_plots(stored: list[rows.Row], tmp_path: Path) -> None:
    drawn = [plots.ratio_bars(stored, tmp_path / "a.png"), plots.roofline(stored, tmp_path / "b.png")]
    assert all(figure.stat().st_size > 5000 for figure in drawn)


def test_documents_are_written_between_markers(stored: list[rows.Row]) -> None:
    text = "before\n<!-- tiny -->\nold\n<!-- /tiny -->\nafter\n"
    other = json.loads(json.dumps(stored))
    for row in other:
        row["machine"]["cpu"] = "another"
    sections = report.sections([stored, other])
    written = report.write_between(text, "tiny", sections["tiny"])
    assert written.startswith("before\n<!-- tiny -->\n" + report.title(stored[0]))
    assert written.endswith("|\n<!-- /tiny -->\nafter\n")
    assert written.count("| case |") == 2
    assert [line.startswith("- **another") for line in sections["machine"].splitlines()] == [False, True]
    with pytest.raises(ValueError, match="no lines <!-- small -->"):
        report.write_between(text, "small", "")


def test_a_page_is_the_old_one_or_the_whole_new_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = tmp_path / "page.md"
    page.write_text("é\n<!-- tiny -->\n<!-- /tiny -->\n", encoding="utf-8")
    report.write_section(page, "tiny", "table")
    written = page.read_text(encoding="utf-8")
    assert written == "é\n<!-- tiny -->\ntable\n<!-- /tiny -->\n"

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pvdm_fast.jobs.files.flush", full)
    with pytest.raises(OSError, match="No space left"):
        report.write_section(page, "tiny", "another")
    assert page.read_text(encoding="utf-8") == written
    assert [item.name for item in tmp_path.iterdir()] == ["page.md"]


def test_unknown_case_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert report.main(["--only", "no such case", "--no-store"]) == 2
    assert "plane_conv/3x3" in capsys.readouterr().err


def test_machine_name_is_not_the_hosts() -> None:
    import platform

    assert machine.name("cpu")
    assert platform.node().lower() not in machine.name("cpu")
