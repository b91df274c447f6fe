"""`python -m benchmarks.first_contact`: the walk, its clocks and its page."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch
from first_contact_tools import context

from benchmarks.cases import all_cases
from benchmarks.first_contact import __main__ as command
from benchmarks.first_contact import child, page, plot, preparing, walk
from benchmarks.first_contact.context import Context, LeftOut, Wrong, read_json, write_json
from benchmarks.first_contact.parts import FUNCTIONS, PARTS, Part
from benchmarks.first_contact.walk import CUT, DONE, FAILED, LEFT, Outcome, Walk

ROOT = Path(__file__).resolve().parents[2]


# ---- the walk


SCRIPTS = {
    "good": "open('good.json', 'w').write('{\"rows\": []}'); print('all is well')",
    "missing": "import sys; open('missing.json', 'w').write('{\"left_out\": \"it needs a fish\"}'); sys.exit(3)",
    "crash": "import os, signal; print('at the brink', flush=True); os.kill(os.getpid(), signal.SIGSEGV)",
    "wrong": "import sys; print('2 of 3 are wrong'); sys.exit(1)",
    "hang": "import subprocess as s; p = s.Popen(['sleep', '600']); print(p.pid, flush=True); p.wait()",
    "last": "print('still here')",
}


@pytest.fixture
def walked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Walk, list[Outcome]]:
    """A walk whose parts end in every way there is."""
    monkeypatch.setattr(walk, "GRACE", 0.2)
    monkeypatch.setattr(walk, "ROOT", tmp_path)
    monkeypatch.setattr(Context, "command", lambda self, part, seconds: [sys.executable, "-c", SCRIPTS[part]])
    weights = {"hang": 0.001}
    parts = [Part(name, f"Part {name}", weights.get(name, 1), "a:b") for name in SCRIPTS]
    the_walk = Walk(tmp_path, "cpu", True, 200, parts)
    return the_walk, the_walk.run(lambda ended: page.write(the_walk, ended))


def ended(process: int) -> bool:
    """Whether a process is gone, or only waits to be counted, within 5 s."""
    for _ in range(50):
        state = Path(f"/proc/{process}/stat")
        if not state.exists() or state.read_text().rpartition(")")[2].split()[0] == "Z":
            return True
        time.sleep(0.1)
    return False


def test_a_part_that_fails_costs_only_itself(walked: tuple[Walk, list[Outcome]]) -> None:
    _, outcomes = walked
    assert {o.part: o.status for o in outcomes} == {
        "good": DONE, "missing": LEFT, "crash": FAILED, "wrong": FAILED, "hang": CUT, "last": DONE,
    }  # fmt: skip
    lines = {outcome.part: outcome.lines for outcome in outcomes}
    assert lines["missing"] == ["it needs a fish"]
    assert lines["crash"] == ["at the brink", "(ended by SIGSEGV)"]
    assert lines["wrong"] == ["2 of 3 are wrong", "(exit code 1)"]
    assert ended(int(lines["hang"][0]))  # what the part started ended with it
    with pytest.raises(command.Failed, match="3 of 6 parts failed: Part crash, Part wrong, Part hang") as failure:
        command.report(outcomes)
    assert failure.value.exit_code == 1


def test_the_page_says_what_failed(walked: tuple[Walk, list[Outcome]]) -> None:
    the_walk, _ = walked
    text = (the_walk.out / page.PAGE).read_text()
    for words in ("it needs a fish", "at the brink", "2 of 3 are wrong", "A dry walk", "| Part last | done |"):
        assert words in text
    stored = json.loads((the_walk.out / page.NUMBERS).read_text())
    assert [part["status"] for part in stored["parts"]] == [DONE, LEFT, FAILED, FAILED, CUT, DONE]
    assert stored["found"]["missing"] == {"left_out": "it needs a fish"}


def test_the_page_is_written_after_each_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And time that a part leaves goes to those after it."""
    shares: list[float] = []

    def run_part(self: Walk, part: Part, seconds: float) -> Outcome:
        shares.append(seconds)
        return Outcome(part.name, part.title, DONE, 0.0, [])

    monkeypatch.setattr(Walk, "run_part", run_part)
    the_walk, seen = Walk(tmp_path, "cpu", True, 92), []

    def after_each(ended: list[Outcome]) -> None:
        page.write(the_walk, ended)
        seen.append(len(json.loads((tmp_path / page.NUMBERS).read_text())["parts"]))

    the_walk.run(after_each)
    assert seen == list(range(1, len(PARTS) + 1))
    weights = [part.weight for part in PARTS]
    assert shares == pytest.approx([90 * w / sum(weights[i:]) for i, w in enumerate(weights)], rel=0.05)


def test_parts_are_found() -> None:
    names = [part.name for part in PARTS]
    assert names == list(dict.fromkeys(names))
    assert set(page.SECTIONS) == set(names)
    order = ["probe", "build", "self-test", "goldens", "sanitizer", "peaks", "operations", "networks"]
    assert names == [*order, "sampler-step", "training-step", "tune"]
    for function in FUNCTIONS.values():
        module, _, name = function.partition(":")
        assert callable(getattr(__import__(f"benchmarks.first_contact.{module}", fromlist=[name]), name))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--device", "cuda"], "run with --device cpu"),
        (["--minutes", "0"], "--minutes must be at least 0.5, not 0"),
        (["--colour"], "there is no option --colour"),
    ],
)
def test_wrong_options(tmp_path: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    if "cuda" in arguments and torch.cuda.is_available():
        pytest.skip("needs a machine without a GPU: run with CUDA_VISIBLE_DEVICES=")
    out = tmp_path / "out"
    assert command.main(["--out", str(out), *arguments]) == 2
    assert message in capsys.readouterr().err
    assert not out.exists()


@pytest.mark.slow
def test_the_whole_walk_on_the_cpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["--out", str(tmp_path), "--device", "cpu", "--dry", "--minutes", "120"]) == 0, (
        capsys.readouterr().out
    )
    stored = json.loads((tmp_path / page.NUMBERS).read_text())
    left_out = {part["part"] for part in stored["parts"] if part["status"] == LEFT}
    assert left_out == {"build", "sanitizer", "sampler-step", "tune"}
    found = stored["found"]
    assert len(found["self-test"]["results"]) == found["self-test"]["planned"] > 0
    assert [row["problem"] for row in found["goldens"]["results"]] == [""] * 6
    measured = {row["case"] for part in ("operations", "networks") for row in found[part]["rows"]}
    assert measured == set(all_cases())
    assert {row["network"] for row in found["training-step"]["rows"]} == {"denoiser", "autoencoder"}
    assert found["tune"]["planned"] > 10 and found["sampler-step"]["median"]["launched"] > 0
    text = (tmp_path / page.PAGE).read_text()
    for part in PARTS:
        if part.name not in ("build", "sanitizer"):
            assert f"## {part.title}" in text
    assert "no time for" not in text
    drawn = ElementTree.parse(tmp_path / page.PLOT).getroot()
    assert len(drawn.findall("{*}rect")) > len(measured)


# ---- what a part knows


def test_facts_are_whole_and_plain(tmp_path: Path) -> None:
    one = context(tmp_path)
    one.keep(error=math.inf, size=(1, 2))
    one.add("rows", {"x": math.nan})
    one.add("rows", {"x": 1.0})
    assert read_json(tmp_path / "part.json") == {"error": None, "size": [1, 2], "rows": [{"x": None}, {"x": 1.0}]}
    assert [path.name for path in tmp_path.iterdir()] == ["part.json"]


def test_time_is_asked_for_before_each_item(tmp_path: Path) -> None:
    one = context(tmp_path, seconds=1000)
    done = []
    for item in one.while_time(["a", "b", "c", "d"], least=10):
        done.append(item)
        if item == "b":
            one.seconds = 0
    assert done == ["a", "b"]
    assert read_json(tmp_path / "part.json") == {"no_time_for": ["c", "d"]}


@pytest.mark.parametrize(
    ("error", "code", "kept"),
    [(LeftOut("no fish"), 3, {"left_out": "no fish"}), (Wrong("1 is 2"), 1, {"wrong": "1 is 2"}), (None, 0, {})],
)
def test_how_a_child_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception | None, code: int, kept: dict[str, str]
) -> None:
    def probe(context: Context) -> None:
        assert (context.device, context.dry, context.seconds) == ("cpu", True, 50.0)
        if error:
            raise error

    alarms: list[int] = []
    monkeypatch.setattr(preparing, "probe", probe)
    monkeypatch.setattr(child.signal, "alarm", alarms.append)
    assert child.main(["probe", "--device", "cpu", "--dry", "--out", str(tmp_path), "--seconds", "50"]) == code
    assert read_json(tmp_path / "probe.json") == kept
    assert alarms == [60]


BARE = """
import sys
ABSENT = {"diffusers", "accelerate", "av", "PIL", "matplotlib", "yaml", "tqdm", "pynvml", "tensorboard", "transformers"}
class Without:
    def __init__(self, finder):
        self.finder = finder
    def find_spec(self, name, path=None, target=None):
        return None if name.partition(".")[0] in ABSENT else self.finder.find_spec(name, path, target)
installed = [finder for finder in sys.meta_path if getattr(finder, "__module__", "").startswith("__editable__")]
sys.meta_path[:] = [finder for finder in sys.meta_path if finder not in installed]
sys.meta_path[:] = [Without(finder) if hasattr(finder, "find_spec") else finder for finder in sys.meta_path]
from benchmarks.first_contact import child
from benchmarks.first_contact.context import importable
print("installed", importable("pvdm_fast.kernels"))
for part in ("probe", "sampler-step", "training-step"):
    code = child.main([part, "--device", "cpu", "--dry", "--out", sys.argv[1], "--seconds", "300"])
    print(part, code)
from benchmarks.first_contact import checking, page, speed, tuning, walk
from pvdm_fast.analysis import goldens
print(len(goldens.denoiser().state_dict()), len(goldens.autoencoder().state_dict()))
"""


@pytest.mark.slow
def test_without_any_other_package(tmp_path: Path) -> None:
    """PyTorch, Triton, numpy, safetensors and einops are enough, for the networks too; ours is not installed either."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    result = subprocess.run(
        [sys.executable, "-c", BARE, str(tmp_path)], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    assert "installed False" in result.stdout  # the source tree alone
    assert "probe 0" in result.stdout and "training-step 0" in result.stdout and "sampler-step 3" in result.stdout
    assert "diffusers" in read_json(tmp_path / "probe.json")["missing"]
    assert read_json(tmp_path / "training-step.json")["without_diffusers"] is True
    rows = read_json(tmp_path / "training-step.json")["rows"]
    assert [row["network"] for row in rows] == ["denoiser", "autoencoder"]


# ---- the page


def row(case: str, **ratio: float) -> dict[str, Any]:
    return {
        "case": case, "direction": "forward", "precision": "bfloat16", "median": {"ours": 0.002}, "ratio": ratio,
        "flops": 1e12, "bytes": 1e9, "memory": {"ours": 1 << 20, "eager": 3 << 20},
    }  # fmt: skip


def test_losses_and_shares_of_the_floor() -> None:
    peaks = {
        "products": [{"precision": "bfloat16", "flops_per_second": 1e15}],
        "memory": [{"bytes": 1, "bytes_per_second": 2e12}],
    }
    lines = page._speed({"rows": [row("a", eager=2.0, sdpa=0.5), row("b", eager=1.0)]}, {"peaks": peaks})
    assert (
        lines[0]
        == "| case | direction | dtype | ours, ms | eager / ours | sdpa / ours | of the floor | MiB, ours / eager |"
    )
    assert lines[2] == "| a | forward | bfloat16 | 2.000 | 2.00x | **0.50x** | 50 % | 1 / 3 |"
    assert lines[3] == "| b | forward | bfloat16 | 2.000 | 1.00x |  | 50 % | 1 / 3 |"


def test_the_page_of_a_card(tmp_path: Path) -> None:
    """Every section from what the parts write on a GPU; what is missing is named."""
    result = {"what": "plane_conv", "backend": "triton", "precision": "tf32", "error": None, "allowed": 1e-3}
    card = {"capability": "9.0", "memory": 80 << 30, "multiprocessors": 132}
    found: dict[str, dict[str, Any]] = {
        "probe": {"name": "NVIDIA H100", "card": card, "driver": {"driver_version": "580"}, "missing": ["av"]},
        "build": {"compiler": "nvcc 13.0", "targets": ["sm_90"]},
        "self-test": {"results": [{**result, "problem": "too far"}, {**result, "error": 0.0, "problem": ""}]},
        "goldens": {"results": [{**result, "error": 1e-6, "problem": ""}]},
        "sanitizer": {"runs": [{"tool": "memcheck", "backend": "cuda", "cases": [1], "status": "clean", "seconds": 3}]},
        "peaks": {"products": [{"precision": "bfloat16", "flops_per_second": 790e12}]},
        "operations": {"rows": [row("a", eager=2.0) | {"left_out": ["sdpa cudnn: no kernel"]}] * 2,
                       "no_time_for": [f"case {i}" for i in range(10)]},
        "networks": {"rows": [], "problems": [{"case": "denoiser", "problem": "no"}], "too_large": [{"case": "big"}]},
        "sampler-step": {"median": {"launched": 0.01, "graph": 0.002}, "errors": [0.0], "allowed": 0.012},
        "training-step": {"rows": [{
            "network": "denoiser", "clips": 4, "median": {"ours": 0.1, "sdpa": 0.3},
            "memory": {"ours": 1 << 30, "sdpa": 2 << 30}, "loss": {"ours": 1.0, "sdpa": 1.0},
        }]},
        "tune": {"planned": 9, "entries": [{"entry": "geglu", "config": "Config()", "problem": ""}]},
    }  # fmt: skip
    for name, content in found.items():
        write_json(tmp_path / f"{name}.json", content)
    the_walk = Walk(tmp_path, "cuda", False, 540)
    page.write(the_walk, [Outcome(part.name, part.title, DONE, 1.0, []) for part in PARTS])
    text = (tmp_path / page.PAGE).read_text()
    for words in (
        "# NVIDIA H100", "compute capability 9.0, 80 GiB, 132 multiprocessors", "nvcc 13.0 for sm_90",
        "1 of 2 comparisons are right", "| plane_conv | triton | tf32 | not finite | 1.0e-03 | too far |",
        "790.00 TFLOP/s", "case 7 and 2 more", "FAILED: denoiser: no", "does not fit in memory: big",
        "| graph | 2.000 |", "3.00x | 1.00 / 2.00", "1 of 9 entries timed", f"({page.PLOT})",
        "\n- sdpa cudnn: no kernel\n- no time for",
    ):  # fmt: skip
        assert words in text, words
    assert "dry walk" not in text


def test_the_plot() -> None:
    drawn = ElementTree.fromstring(
        plot.ratios([row("a < b", eager=2.0, sdpa=0.01), row("c", eager=100.0)], "Card & co")
    )
    bars = [rect for rect in drawn.findall("{*}rect") if rect.get("fill") != "white"]
    assert len(bars) == 3
    assert all(plot.LEFT <= float(bar.get("x", "0")) <= plot.LEFT + plot.WIDTH for bar in bars)
    assert "a < b, forward, bfloat16" in [text.text for text in drawn.findall("{*}text")]
    assert plot.ratios([], "Card") == ""
