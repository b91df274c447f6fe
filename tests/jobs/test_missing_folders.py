"""A run's folder that isn't there: every command says so in one sentence, before any work."""

from __future__ import annotations

from pathlib import Path

import pytest

from pvdm_fast import distill, encode, evaluate, sample, train
from pvdm_fast.errors import UserError
from pvdm_fast.jobs.files import expect_folder


@pytest.mark.parametrize(
    ("command", "arguments"),
    [
        (sample, ["RUN"]),
        (evaluate, ["RUN"]),
        (evaluate, ["RUN", "--data", "synthetic:shapes"]),
        (distill, ["RUN", "--out", "new"]),
        (encode, ["--autoencoder", "RUN", "synthetic:shapes", "new"]),
        (train, ["--resume", "RUN"]),
        (train, ["--stage", "diffusion", "--autoencoder-from", "RUN", "--run", "new"]),
    ],
)
def test_the_folder_is_missed_by_name(
    command: object,
    arguments: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "mine").mkdir(parents=True)
    given = [argument.replace("RUN", "runs/mime") for argument in arguments]
    assert command.main(given) == 2  # type: ignore[attr-defined]
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "there is no folder" in error and error.endswith("runs/mime; did you mean 'mine'?\n")
    assert not (tmp_path / "new").exists()


def test_a_file_is_no_folder(tmp_path: Path) -> None:
    expect_folder(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"there is no folder .*file/run$"):
        expect_folder(tmp_path / "file" / "run")
    (tmp_path / "files").mkdir()
    with pytest.raises(UserError, match=r"there is no folder .*file; did you mean 'files'"):
        expect_folder(tmp_path / "file")
