"""SIGKILL at random moments of training, saving and sampling: files are complete, and the run continues exactly."""

from __future__ import annotations

import json
import random
from pathlib import Path

import av
import PIL.Image
import pytest
import yaml
from training.lives import Life, Moment, live
from training.small import SMALL, losses, same_weights, steps

from pvdm_fast.jobs import checksums
from pvdm_fast.models import Autoencoder, Denoiser
from pvdm_fast.models.release import load_model
from pvdm_fast.training import checkpoint

OFTEN = [*SMALL, *steps(6), "--save-every", "2", "--preview-every", "100"]
KILLED = -9


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Life]:
    """An undisturbed run. Its CPU time and changes to files give the range of moments."""
    run = tmp_path_factory.mktemp("undisturbed") / "run"
    life = live("train", [*OFTEN, "--run", str(run)], run)
    assert life.code == 0, life.output
    return run, life


def assert_whole(run: Path) -> None:
    """Every file in a run's folder that has its final name is complete and readable."""
    for item in run.rglob("*"):
        if any(part.startswith(".") for part in item.relative_to(run).parts) or item.is_dir():
            continue
        if item.suffix == ".yaml":
            assert yaml.safe_load(item.read_text())["preset"] == "tiny"
        elif item.suffix == ".json":
            json.loads(item.read_text())
        elif item.suffix == ".jsonl":
            *lines, _cut = item.read_text().split("\n")
            assert all("stage" in json.loads(line) for line in lines)
        elif item.suffix == ".png":
            PIL.Image.open(item).load()
        elif item.suffix == ".mp4":
            with av.open(str(item)) as film:
                assert sum(1 for _ in film.decode(video=0)) == film.streams.video[0].frames > 0
        else:
            assert item.suffix in (".safetensors", ".pt", ".lock"), f"{item} is not known to be whole"
    for found in checkpoint.found(run / "checkpoints"):
        assert checkpoint.damage(found) is None, found
        assert checkpoint.load(found)["progress"]["step"] == found.step
    for kind, name in ((Autoencoder, "autoencoder"), (Denoiser, "denoiser")):
        if (run / name).exists():
            assert (run / name / checksums.NAME).exists()
            load_model(kind, run / name)


def moments(generator: random.Random, life: Life) -> Moment:
    """Alternately after some CPU time, and just before some change to a file."""
    if generator.random() < 0.5:
        return Moment(cpu=generator.uniform(0, life.cpu))
    return Moment(change=generator.randrange(life.changes))


def kill_training(kills: int, seed: int, folder: Path, reference: Path, life: Life) -> dict[str, int]:
    """Starts and resumes a run, killed each time at a random moment, until all kills are used. Then lets it end."""
    generator, counts = random.Random(seed), {"kills": 0, "runs": 0, "kills with temporary files left": 0}
    while counts["kills"] < kills:
        run = folder / f"run{counts['runs']}"
        counts["runs"] += 1
        code = KILLED
        while code == KILLED:
            begun = (run / "config.yaml").exists()
            arguments = ["--resume", str(run)] if begun else [*OFTEN, "--run", str(run)]
            moment = moments(generator, life) if counts["kills"] < kills else Moment()
            ended = live("train", arguments, run, moment)
            code = ended.code
            assert code in (0, KILLED), (moment, ended.output)
            counts["kills"] += code == KILLED
            if run.exists():
                counts["kills with temporary files left"] += any(run.rglob(".*"))
                assert_whole(run)
        for stage in ("autoencoder", "diffusion"):
            assert losses(run, stage) == losses(reference, stage)
        assert same_weights(run, reference, "autoencoder")
        assert same_weights(run, reference, "denoiser")
        assert not list(run.rglob(".*")), "temporary files are left"
    return counts


def kill_sampling(kills: int, seed: int, folder: Path, run: Path) -> dict[str, int]:
    """The file is absent, or has the bytes of an undisturbed one. The next sampling succeeds."""
    generator, outputs = random.Random(seed), folder / "samples"
    outputs.mkdir()

    def arguments(name: str) -> list[str]:
        return [str(run), "--out", str(outputs / name), "--steps", "4", "--clips", "1", "--device", "cpu"]

    counts = {"kills": 0, "kills after the file was there": 0}
    expected = {}
    for suffix in (".mp4", ".npy"):
        life = live("sample", arguments(f"whole{suffix}"), outputs)
        assert life.code == 0, life.output
        expected[suffix] = (outputs / f"whole{suffix}").read_bytes()
    while counts["kills"] < kills:
        suffix = generator.choice((".mp4", ".npy"))
        out = outputs / f"again{suffix}"
        ended = live("sample", arguments(out.name), outputs, moments(generator, life))
        assert ended.code in (0, KILLED), ended.output
        counts["kills"] += ended.code == KILLED
        if out.exists():
            assert out.read_bytes() == expected[suffix]
            counts["kills after the file was there"] += ended.code == KILLED
            out.unlink()
    assert live("sample", arguments("last.mp4"), outputs).code == 0
    assert (outputs / "last.mp4").read_bytes() == expected[".mp4"]
    return counts


@pytest.mark.slow
def test_a_few_kills(undisturbed: tuple[Path, Life], tmp_path: Path) -> None:
    run, life = undisturbed
    kill_training(3, 1, tmp_path, run, life)
    kill_sampling(1, 2, tmp_path, run)


@pytest.mark.exhaustive
def test_fifty_kills(undisturbed: tuple[Path, Life], tmp_path: Path) -> None:
    run, life = undisturbed
    print(kill_training(50, 3, tmp_path, run, life))
    print(kill_sampling(20, 4, tmp_path, run))


@pytest.mark.exhaustive
def test_a_kill_before_every_change_to_a_file(undisturbed: tuple[Path, Life], tmp_path: Path) -> None:
    """One run for each change, then resumed to its end."""
    run, life = undisturbed
    for change in range(life.changes):
        again = tmp_path / f"run{change}"
        ended = live("train", [*OFTEN, "--run", str(again)], again, Moment(change=change))
        assert ended.code == KILLED, (change, ended.output)
        assert_whole(again)
        begun = (again / "config.yaml").exists()
        ended = live("train", ["--resume", str(again)] if begun else [*OFTEN, "--run", str(again)], again)
        assert ended.code == 0, (change, ended.output)
        assert same_weights(again, run, "denoiser")
    print(f"killed before each of {life.changes} changes")
