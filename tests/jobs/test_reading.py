"""Readers of small files: whatever a stranger put there ends in a reason, at once, and in nothing else."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from pvdm_fast.errors import UserError, printable
from pvdm_fast.evaluate import main as evaluate
from pvdm_fast.jobs import checksums
from pvdm_fast.jobs.reading import (
    UnreadableFile,
    open_regular,
    read_json,
    read_json_lines,
    read_json_object,
    read_text,
    read_yaml,
    time_limit,
)
from pvdm_fast.training.config import read_changes
from pvdm_fast.training.run_folder import RunFolder

ALIASES = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{new}: &{new} [{', '.join([f'*{old}'] * 9)}]\n" for old, new in zip("abcdefgh", "bcdefghi", strict=True)
)
BROKEN = {
    "aliases": ALIASES,
    "deep": "[" * 20_000,
    "deep mapping": "".join(" " * level + "a:\n" for level in range(600)),
    "a date that is none": "a: 2021-99-99",
    "a number without end": "a: " + "9" * 200_000,
    "large": "a: 1\n" + "#" * (1 << 20),
    "not text": "\udce9",
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_yaml_is_a_reason(name: str, tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_bytes(BROKEN[name].encode("utf-8", "surrogateescape"))
    started = time.monotonic()
    with pytest.raises(UnreadableFile):
        read_yaml(path)
    with pytest.raises(UserError, match=r"the config file .*config\.yaml"):
        read_changes(path)
    assert time.monotonic() - started < 30


def test_plain_yaml_and_json_are_read(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("a: {b: [1, 2.5, true, x]}\n")
    assert read_yaml(tmp_path / "a") == {"a": {"b": [1, 2.5, True, "x"]}}
    (tmp_path / "a").write_text('{"a": [1, null]}')
    assert read_json(tmp_path / "a") == read_yaml(tmp_path / "a") == {"a": [1, None]}


@pytest.mark.parametrize(
    "read", [read_text, read_json, read_json_object, read_yaml, lambda p: list(read_json_lines(p))]
)
def test_pipes_devices_and_folders_are_refused_at_once(read: Callable[[Path], object], tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "zero").symlink_to("/dev/zero")
    started = time.monotonic()
    for name in ("pipe", "zero", "."):
        with pytest.raises((UnreadableFile, IsADirectoryError)):
            read(tmp_path / name)
    assert time.monotonic() - started < 5


@pytest.mark.parametrize("text", ["[" * 100_000, "", "{", "9" * 10_000, "\ud800"])
def test_broken_json_is_a_reason(text: str, tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(text.encode("utf-8", "surrogatepass"))
    with pytest.raises(UnreadableFile):
        read_json(tmp_path / "a")
    (tmp_path / "a").write_text("[]")
    with pytest.raises(UnreadableFile, match="object"):
        read_json_object(tmp_path / "a")


def test_a_file_is_measured_before_it_is_read(tmp_path: Path) -> None:
    with open(tmp_path / "a", "wb") as file:
        file.truncate(1 << 40)  # sparse, so it takes no space
    with pytest.raises(UnreadableFile, match="1099511627776 bytes"):
        read_json(tmp_path / "a")


def test_lines_that_are_damaged_or_endless_are_left_out(tmp_path: Path) -> None:
    lines = [b'{"a": 1}', b"{broken", b'"' + b"x" * (3 << 20) + b'"', b"[" * 5000, b"\xff", b'{"a": 2}', b'{"cut']
    (tmp_path / "a").write_bytes(b"\n".join(lines))
    assert list(read_json_lines(tmp_path / "a")) == [{"a": 1}, {"a": 2}]
    (tmp_path / "a").write_bytes(b'{"a": 3}')
    assert list(read_json_lines(tmp_path / "a")) == [{"a": 3}]


def test_the_clock_interrupts_and_is_put_back(tmp_path: Path) -> None:
    with pytest.raises(UnreadableFile, match="slow"), time_limit(0.1, lambda: UnreadableFile("slow")):
        time.sleep(20)
    with time_limit(0.1, lambda: UnreadableFile("slow")):
        pass
    time.sleep(0.2)


def test_an_open_file_is_read_from_its_start(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"abc")
    with open_regular(tmp_path / "a") as file:
        assert file.read() == b"abc"


RECORD = {"stage": "autoencoder", "step": 1, "loss": 0.5}


@pytest.mark.parametrize(
    "change", [{"loss": "a"}, {"loss": 10**400}, {"step": 1.5}, {"step": True}, {"stage": "x"}, {"psnr": [1]}]
)
def test_records_that_cannot_be_drawn_are_left_out(change: dict[str, object], tmp_path: Path) -> None:
    lines = [
        RECORD,
        {**RECORD, **change},
        {**RECORD, "step": 2, "skipped": "a loss of nan", "clips": ["a"], "loss": None},
    ]
    run = RunFolder(tmp_path)
    run.metrics.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert [record["step"] for record in run.records()] == [1, 2]


def test_metrics_that_are_a_pipe_are_found_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "metrics.jsonl")
    with pytest.raises(UserError, match=r"metrics\.jsonl is not a file"):
        RunFolder(tmp_path).read_metrics()


GOOD = {"steps": 1, "seconds": 0.5, "psnr": 20.0, "unreadable_files": {}}


@pytest.mark.parametrize(
    "content",
    ["[]", "{", '{"x": {}}', '{"autoencoder": 1}', '{"autoencoder": {}}']
    + [json.dumps({"autoencoder": {**GOOD, name: []}}) for name in GOOD],
)
def test_results_that_are_none_are_found_before_the_work(content: str, tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    run.results_file.write_text(content)
    with pytest.raises(UserError, match=r"results\.json is damaged"):
        run.results()
    run.results_file.write_text(json.dumps({"autoencoder": GOOD}))
    assert run.results() == {"autoencoder": GOOD}


@pytest.mark.parametrize(
    "sums",
    [
        {"../secret": 1},
        {"/dev/zero": 1},
        {"": 1},
        {"..": 1},
        {"a/b": 1},
        {"a\0b": 1},
        {"weights": "1"},
        {"weights": True},
        [],
    ],
)
def test_checksums_name_files_of_their_folder_only(sums: object, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "weights").write_bytes(b"x")
    (folder / checksums.NAME).write_text(json.dumps(sums))
    problem = checksums.find_damage(folder)
    assert problem is not None and ("other things" in problem or "can't be read" in problem)


def test_checksums_of_pipes_links_and_many_names(tmp_path: Path) -> None:
    (tmp_path / "weights").write_bytes(b"x")
    checksums.write_checksums(tmp_path)
    assert checksums.find_damage(tmp_path) is None
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "endless").symlink_to("/dev/zero")
    for name in ("pipe", "endless"):
        (tmp_path / checksums.NAME).write_text(json.dumps({name: 1}))
        assert "is not a file" in str(checksums.find_damage(tmp_path))
    for number in range(300):
        (tmp_path / f"f{number}").touch()
    (tmp_path / checksums.NAME).write_text(json.dumps({f"f{number}": 1 for number in range(300)}))
    problem = checksums.find_damage(tmp_path)
    assert problem is not None and "and 295 more" in problem and len(problem) < 300


def test_names_are_shown_on_one_line() -> None:
    assert printable("a\x1b[2Jb\nc\u202ed\udce9é\x85") == "a\\x1b[2Jb\\nc\\u202ed\\xe9é\\x85"
    assert str(UserError("no \x1b[31mfile\n")) == "no \\x1b[31mfile\\n"
    printable("\udce9").encode("utf-8")


def test_a_config_that_is_a_pipe_ends_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    os.mkfifo(tmp_path / "config.yaml")
    (tmp_path / "config.yaml").chmod(0o600)
    assert evaluate([str(tmp_path), "--data", "synthetic:shapes"]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    from pvdm_fast.train import main as train

    assert train(["--config", str(tmp_path / "config.yaml")]) == 2
    assert "is not a file but" in capsys.readouterr().err
