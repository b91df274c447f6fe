"""`python -m pvdm_fast.info`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pvdm_fast import info
from pvdm_fast.analysis import machine
from pvdm_fast.backends import choice, extensions


def test_json_has_every_operation_and_backend(capsys: pytest.CaptureFixture[str]) -> None:
    info.main(["--json"])
    facts = json.loads(capsys.readouterr().out)
    assert set(facts["operations"]) == {*choice.OPERATIONS, *choice.FUSED_PROJECTION}
    for row in facts["operations"].values():
        assert set(row) == {"auto", *choice.BACKENDS}
        assert row["reference"] is None
        assert row[row["auto"]] is None, "the automatic choice must be one that serves"
    assert facts["versions"]["torch"]
    assert facts["cpu"]["threads"] >= 1


def test_text_says_why_not(capsys: pytest.CaptureFixture[str]) -> None:
    info.main([])
    text = capsys.readouterr().out
    for op in choice.OPERATIONS:
        assert op in text
    for backend in choice.BACKENDS:
        reason = choice.unavailable(backend)
        assert reason is None or reason in text
    assert "chosen automatically" in text


def test_triton(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its version, whether it interprets, and the file of measured configurations."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    monkeypatch.setattr(machine, "installed_version", lambda name: "3.9.0" if name == "triton" else None)
    table = tmp_path / "pvdm_fast" / "triton.json"
    info.main([])
    text = capsys.readouterr().out
    assert "Triton\n  3.9.0\n  TRITON_INTERPRET is set" in text
    assert f"measured here: none, python -m pvdm_fast.tune would write {table}" in text
    table.parent.mkdir()
    table.write_text("{}")
    monkeypatch.delenv("TRITON_INTERPRET")
    info.main([])
    text = capsys.readouterr().out
    assert "TRITON_INTERPRET" not in text.partition("Triton\n")[2].partition("Build")[0]
    assert f"measured here: {table}" in text
    assert machine.triton_facts() == {"interpreter": False, "user_table": str(table), "user_table_present": True}


def test_build_facts() -> None:
    """What was left out is named with its reason, and a source tree where nothing was built says what to do."""
    lines = machine._build_lines({"_cpu": {"built": False, "reason": "no C++ compiler found"}})
    assert lines[0].endswith("left out: no C++ compiler found")
    assert extensions.REINSTALL in machine._build_lines({})[0]


def test_gpus_without_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "pynvml", None)
    assert "nvidia-ml-py is not installed" in machine.gpu_facts()["reason"]


@pytest.mark.parametrize(
    ("fields", "name"),
    [
        ({"model name": "AMD EPYC", "cpu family": "25", "model": "17"}, "AMD EPYC (family/model 25/17)"),
        ({"model name": "AMD EPYC", "cpu family": "26", "model": "2"}, "AMD EPYC (family/model 26/2)"),
        ({"model name": "Neoverse"}, "Neoverse"),
    ],
)
def test_a_cpu_is_named_with_its_generation(fields: dict[str, str], name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Clouds give a Zen 4 and a Zen 5 one name."""
    monkeypatch.setattr(machine, "cpu_fields", lambda: fields)
    assert machine.cpu_name() == machine.cpu_facts()["name"] == name
