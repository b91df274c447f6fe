"""Launch configurations: the order of a table's entries, the user's own table, and watched launches."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from pvdm_fast.errors import UserError
from pvdm_fast.kernels import configs
from pvdm_fast.kernels.configs import SHARED_MEMORY, TABLES, ConfigTable, assume
from pvdm_fast.kernels.launch import Config, launch, watch

CPU = torch.device("cpu")
ENTRIES = {
    ("*", "*", "*"): Config({"BLOCK": 1}),
    ("*", "*", "bfloat16"): Config({"BLOCK": 2}),
    ("*", "wide", "*"): Config({"BLOCK": 3}),
    ("sm90", "*", "*"): Config({"BLOCK": 4}),
    ("sm90", "wide", "bfloat16"): Config({"BLOCK": 5}, num_warps=8, num_stages=3),
}


@pytest.fixture
def table() -> Iterator[ConfigTable]:
    yield ConfigTable("test_kernel", ENTRIES)
    del TABLES["test_kernel"]


@pytest.fixture
def user_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty place for the user's table, on a machine that claims to be an H100."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    monkeypatch.setattr(configs, "architecture", lambda device: "sm90")
    configs._tuned.cache_clear()
    path = configs.user_table()
    path.parent.mkdir()
    yield path
    configs._tuned.cache_clear()


@pytest.mark.parametrize(
    ("architecture", "shape", "dtype", "block"),
    [
        ("sm80", "narrow", torch.float32, 1),
        ("sm80", "narrow", torch.bfloat16, 2),
        ("sm80", "wide", torch.bfloat16, 3),
        ("sm90", "narrow", torch.bfloat16, 4),
        ("sm90", "wide", torch.float32, 4),
        ("sm90", "wide", torch.bfloat16, 5),
    ],
)
def test_most_particular_entry(
    table: ConfigTable, architecture: str, shape: str, dtype: torch.dtype, block: int
) -> None:
    """The architecture counts most, then the shape class, then the dtype."""
    with assume(architecture):
        assert table(CPU, shape, dtype).blocks == {"BLOCK": block}


def test_assumption_ends(table: ConfigTable) -> None:
    table(CPU, "wide", torch.float32)
    before = dict(table.asked)
    with assume("sm90"):
        table(CPU, "wide", torch.bfloat16)
        assert list(table.asked) == [("sm90", "wide", "bfloat16")]
    assert table.asked == before == {("interpreter", "wide", "float32"): ENTRIES["*", "wide", "*"]}


def test_cpu_tensors_are_for_the_interpreter() -> None:
    assert configs.architecture(CPU) == "interpreter"


@pytest.mark.parametrize(
    ("capability", "hip", "expected"),
    [((8, 0), None, "sm80"), ((8, 6), None, "sm120"), ((8, 9), None, "sm120"), ((9, 0), None, "sm90"),
     ((10, 0), None, "sm100"), ((12, 0), None, "sm120"), ((9, 4), "6.4", "gfx942")],
)  # fmt: skip
def test_architecture_of_a_gpu(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], hip: str | None, expected: str
) -> None:
    """Ampere and Ada GPUs with less shared memory than an A100 use the entries of the smallest."""
    properties = type("Properties", (), {"major": capability[0], "minor": capability[1]})
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    monkeypatch.setattr(torch.version, "hip", hip)
    configs._present.cache_clear()
    assert configs.architecture(torch.device("cuda", 0)) == expected
    assert expected in SHARED_MEMORY
    configs._present.cache_clear()


def write(path: Path, **fields: Any) -> None:
    entry = {"blocks": {"BLOCK": 64}, "num_warps": 2, "num_stages": 5, **fields}
    path.write_text(json.dumps({"test_kernel": {"sm90/wide/float32": entry}}))


def test_user_table_comes_first(table: ConfigTable, user_table: Path) -> None:
    write(user_table)
    assert table(CPU, "wide", torch.float32) == Config({"BLOCK": 64}, num_warps=2, num_stages=5)
    assert table(CPU, "wide", torch.bfloat16).blocks == {"BLOCK": 5}


def test_user_table_is_not_used_ahead_of_time(table: ConfigTable, user_table: Path) -> None:
    write(user_table)
    with assume("sm90"):
        assert table(CPU, "wide", torch.float32).blocks == {"BLOCK": 4}


def test_no_user_table(table: ConfigTable, user_table: Path) -> None:
    assert table(CPU, "wide", torch.float32).blocks == {"BLOCK": 4}


@pytest.mark.parametrize("text", ['{"test_kernel": ', "[1, 2]", '{"test_kernel": 3}', "\x00"])
def test_damaged_user_table(table: ConfigTable, user_table: Path, text: str) -> None:
    user_table.write_text(text)
    with pytest.raises(UserError, match=r"triton\.json (can't be read as|does not hold) tuned .*: delete the file, or"):
        table(CPU, "wide", torch.float32)


@pytest.mark.parametrize(
    "stale", [{"blocks": {"BLOCK_M": 64}}, {"blocks": {}}, {"blocks": {"BLOCK": "64"}}, {"blocks": None}, {"stages": 2},
              {"num_warps": 4.0}],
)  # fmt: skip
def test_stale_user_table(table: ConfigTable, user_table: Path, stale: dict[str, Any]) -> None:
    write(user_table, **stale)
    with pytest.raises(UserError, match=r"triton\.json configures test_kernel for sm90/wide/float32 .*BLOCK.*: delete"):
        table(CPU, "wide", torch.float32)


def test_watched_launches_do_not_run() -> None:
    """Tensors may be on the meta device."""
    seen = []
    config = Config({"BLOCK": 8})
    with watch(lambda *launched: seen.append(launched)):
        launch("a kernel", (3,), torch.empty(4, device="meta"), 7, config=config, FLAG=True)
    ((kernel, grid, arguments, used, constants),) = seen
    assert (kernel, grid, arguments[1], used, constants) == ("a kernel", (3,), 7, config, {"FLAG": True})


def test_launch_hands_on_everything() -> None:
    class Kernel:
        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            return lambda *arguments, **options: calls.append((grid, arguments, options))

    calls: list[Any] = []
    x = torch.ones(2)
    launch(Kernel(), (3, 4), x, 7, config=Config({"BLOCK": 8}, 2, 5), FLAG=True)
    expected = {"FLAG": True, "BLOCK": 8, "num_warps": 2, "num_stages": 5, "enable_fp_fusion": True}
    assert calls == [((3, 4), (x, 7), expected)]
