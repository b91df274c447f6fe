"""A whole evaluation: its numbers by hand, its protocol, interruptions, several processes, and refusals."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from evaluation.published import by_scipy
from safetensors.torch import load_file, save_file
from tolerances import FRECHET, SUM_ORDER

from pvdm_fast.data import ClipDataset, Item, open_dataset, write_video
from pvdm_fast.data.clips import ClipSpec
from pvdm_fast.data.shapes import KINDS, draw_scene
from pvdm_fast.evaluate import main, parse
from pvdm_fast.evaluation import clip_network, distances, passes, session
from pvdm_fast.evaluation.clip_network import ClipFeatures
from pvdm_fast.evaluation.clips import BothSplits, open_clips, read_batches
from pvdm_fast.evaluation.features import I3D_SHA256, FeatureNetwork
from pvdm_fast.evaluation.scene_judge import load_judge, see
from pvdm_fast.evaluation.scenes import judge_clips, of_class
from pvdm_fast.evaluation.ssim import ssim
from pvdm_fast.evaluation.subject import load_subject
from pvdm_fast.jobs.checksums import sha256
from pvdm_fast.losses.psnr import psnr
from pvdm_fast.models import Denoiser

CPU = torch.device("cpu")
QUICK = shlex.split(
    "--clips 18 --samples 10 --frames 4 6 --steps 2 --batch-size 4 --save-every 4 --nearest-among 24 --device cpu"
)


def results(folder: Path) -> dict[str, Any]:
    """Everything in evaluation.json except the time."""
    document = json.loads((folder / "evaluation.json").read_text())
    del document["results"]["seconds_since_last_start"]
    return document


@pytest.fixture(scope="session")
def whole(run: Path, network: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One uninterrupted evaluation with features, by one process."""
    out = tmp_path_factory.mktemp("whole") / "evaluation"
    assert main([str(run), *QUICK, *network, "--out", str(out)]) == 0
    return out


def clips(frames: int, count: int) -> torch.Tensor:
    dataset = open_dataset("synthetic:shapes", frames=frames, height=16, width=24, split="test")
    return torch.stack([dataset[draw]["video"] for draw in range(count)])


def test_its_numbers_are_those_computed_by_hand(whole: Path, run: Path, network: list[str]) -> None:
    subject, extract = load_subject(run, CPU, "fp32"), FeatureNetwork(Path(network[1]), network[3], CPU)
    original = clips(4, 18)
    result = torch.cat([subject.reconstruct(batch) for batch in original.split(4)])

    def features(videos: torch.Tensor) -> np.ndarray:
        return torch.cat([extract(batch) for batch in videos.split(4)]).numpy()

    found = results(whole)["results"]
    reconstruction = found["reconstruction"]
    for name, values in (("psnr", psnr(result, original).double()), ("ssim", ssim(result, original))):
        assert reconstruction[name]["mean"] == pytest.approx(float(values.mean()), rel=SUM_ORDER)
        assert reconstruction[name]["standard_error"] == pytest.approx(float(values.std() / 18**0.5))
    distance = by_scipy(features(original), features(result))
    assert reconstruction["frechet_distance"] == pytest.approx(distance, rel=FRECHET)
    options = json.loads((whole / "evaluation.json").read_text())["protocol"]["sampling"]
    batches = [range(first, min(first + 4, 10)) for first in range(0, 10, 4)]
    samples = torch.cat([passes.sample_batch(subject, batch, 6, options) for batch in batches])
    for frames in (4, 6):
        distance = by_scipy(features(clips(frames, 18)), features(samples[:, :, :frames]))
        assert found["generation"][str(frames)]["frechet_distance"] == pytest.approx(distance, rel=FRECHET)


def test_the_protocol_is_written_with_the_numbers(whole: Path, run: Path, network: list[str]) -> None:
    protocol = results(whole)["protocol"]
    assert {key: protocol["data"][key] for key in ("source", "split", "clips", "stride", "height", "width")} == {
        "source": "synthetic:shapes",
        "split": "test",
        "clips": 18,
        "stride": 1,
        "height": 16,
        "width": 24,
    }
    assert "bicubic" in protocol["data"]["resizing"] and "centre crop" in protocol["data"]["view"]
    assert protocol["features"]["sha256"] == network[3] and "bilinear to 224" in protocol["features"]["input"]
    sampling = protocol["sampling"]
    assert (sampling["scheduler"], sampling["steps"], sampling["eta"], sampling["guidance"]) == ("ddim", 2, 1.0, 0.0)
    assert (sampling["samples"], sampling["frames"], sampling["seed"], sampling["batch_size"]) == (10, [4, 6], 0, 4)
    assert protocol["model"]["denoiser"]["ema"] == {"decay": 0.9999}
    assert len(protocol["model"]["autoencoder"]["sha256"]["diffusion_pytorch_model.safetensors"]) == 64
    assert protocol["environment"]["versions"]["torch"] and protocol["environment"]["device"]
    of_scenes = {"kinds_right", "named", "of_class", "path", "scene_frechet_distance"}
    assert set(protocol["metrics"]) == {"psnr", "ssim", "frechet_distance", "pvdm_fast_features"} | of_scenes
    assert protocol["pvdm_fast_features"]["sha256"] == sha256(clip_network.WEIGHTS)
    assert protocol["judge"]["file"] == "scene_judge.safetensors" and len(protocol["judge"]["sha256"]) == 64


def test_another_network_s_distance_is_never_called_fvd(whole: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = results(whole)["results"]
    assert found["reconstruction"]["fvd"] is None and found["generation"]["4"]["fvd"] is None
    assert any("not the I3D network" in line and I3D_SHA256 in line for line in found["missing"])
    page = (whole / "report.html").read_text()
    assert "<td>R-FVD" not in page and "<td>FVD" not in page and "Fréchet distance of other features" in page


def test_without_a_network_the_rest_is_computed(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(run), *QUICK, "--out", str(tmp_path)]) == 0
    found = results(tmp_path)["results"]
    assert found["reconstruction"]["psnr"]["mean"] > 0 and "frechet_distance" not in found["reconstruction"]
    few = {"samples": 10, "real_clips": 18, "pvdm_fast_features": None}
    assert found["generation"] == {"4": few, "6": few} and found["reconstruction"]["pvdm_fast_features"] is None
    said = capsys.readouterr().out
    assert (
        I3D_SHA256 in said and "18 clips and 10 samples are too few" in said and f"{distances.FEWEST} of each" in said
    )


def test_our_distances_are_those_of_the_features_in_order(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(distances, "REPLICATES", 5)
    for module in (distances, session):
        monkeypatch.setattr(module, "FEWEST", 10)
    assert main([str(run), *QUICK, "--out", str(tmp_path)]) == 0
    found = results(tmp_path)["results"]
    subject, features = load_subject(run, CPU, "fp32"), ClipFeatures(CPU)
    original = clips(4, 18)
    result = torch.cat([subject.reconstruct(batch) for batch in original.split(4)])
    options = json.loads((tmp_path / "evaluation.json").read_text())["protocol"]["sampling"]
    batches = [range(first, min(first + 4, 10)) for first in range(0, 10, 4)]
    samples = torch.cat([passes.sample_batch(subject, batch, 6, options) for batch in batches])
    pairs = [(original, result, found["reconstruction"]), (original, samples[:, :, :4], found["generation"]["4"])]
    for real, made, scores in (*pairs, (clips(6, 18), samples, found["generation"]["6"])):
        for name, distance in (("frechet_distance", distances.frechet), ("kernel_distance", distances.kernel)):
            expected = distance(features(real), features(made))
            assert scores["pvdm_fast_features"][name] == pytest.approx(dataclasses.asdict(expected), rel=1e-3, abs=1e-4)
    said = capsys.readouterr().out
    assert "samples, Fréchet distance, our features" in said and "kernel distance, our features" in said
    assert not re.search(r"^(R-)?FVD", said, re.M), "nothing is called FVD"


def test_lengths_that_no_video_has_are_told(run: Path, tmp_path: Path) -> None:
    films = tmp_path / "films"
    films.mkdir()
    for number in range(2):
        write_video(films / f"{number}.mp4", np.full((5, 30, 60, 3), 90 * number, np.uint8))
    arguments = ["--data", str(films), "--split", "all", "--clips", "2", "--samples", "2", "--stride", "1"]
    assert main([str(run), *QUICK, *arguments, "--out", str(tmp_path / "out")]) == 0
    found = results(tmp_path / "out")["results"]
    assert found["generation"]["6"] == {"samples": 2} and found["generation"]["4"]["real_clips"] == 2
    assert any("distances at 6 frames: no video is that long" in line for line in found["missing"])


def test_rendered_scenes_are_judged(whole: Path, run: Path) -> None:
    """The scores of reconstructions and samples made again by hand, which an untrained model makes bad."""
    subject, found = load_subject(run, CPU, "fp32"), results(whole)["results"]["scenes"]
    original = clips(4, 18)
    result = torch.cat([subject.reconstruct(batch) for batch in original.split(4)])
    options = json.loads((whole / "evaluation.json").read_text())["protocol"]["sampling"]
    batches = [range(first, min(first + 4, 10)) for first in range(0, 10, 4)]
    samples = torch.cat([passes.sample_batch(subject, batch, 8, options) for batch in batches])
    wanted = judge_clips(samples, length=4, real=original)
    assert found["kinds_right"] == pytest.approx(judge_clips(result, originals=original)["kinds_right"])
    for name in ("named", "path", "second_named", "second_path"):
        assert found[name]["mean"] == pytest.approx(wanted[name])
    assert found["frechet_distance"] == pytest.approx(wanted["frechet_distance"], rel=FRECHET)
    assert found["of_class"] is None, "the run has no classes"
    assert found["samples"] == 10 and 18 * 4 / 2 <= found["objects"] <= 18 * 4 * 2
    text = (whole / "report.html").read_text()
    assert "all paths unbroken, two clips" in text and "objects with the right name" in text
    assert any("30 features" in line for line in results(whole)["results"]["caveats"])


class Crash(BaseException):
    """Nothing catches this, so everything in memory is lost."""


@pytest.mark.slow
@pytest.mark.parametrize("calls", [7, 18])
def test_a_crash_anywhere_changes_no_bit(
    calls: int, whole: Path, run: Path, network: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = [str(run), *QUICK, *network, "--out", str(tmp_path)]
    computed = FeatureNetwork.__call__
    count = 0

    def failing(self: FeatureNetwork, video: torch.Tensor) -> torch.Tensor:
        nonlocal count
        count += 1
        if count == calls:
            raise Crash
        return computed(self, video)

    monkeypatch.setattr(FeatureNetwork, "__call__", failing)
    with pytest.raises(Crash):
        main(arguments)
    assert not (tmp_path / "evaluation.json").exists()
    monkeypatch.setattr(FeatureNetwork, "__call__", computed)
    assert main([*arguments, "--workers", "1"]) == 0
    assert results(tmp_path) == results(whole)


def start(arguments: list[str], **environment: str) -> subprocess.Popen[str]:
    """``python -m pvdm_fast.evaluate`` in a separate process."""
    return subprocess.Popen(
        [sys.executable, "-m", "pvdm_fast.evaluate", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, **environment},
    )


@pytest.mark.slow
def test_a_killed_evaluation_goes_on(whole: Path, run: Path, network: list[str], tmp_path: Path) -> None:
    arguments = [str(run), *QUICK, *network, "--out", str(tmp_path)]
    process = start(arguments, OMP_NUM_THREADS=str(torch.get_num_threads()))
    while process.poll() is None and not list(tmp_path.glob("statistics/*/part-0.safetensors")):
        time.sleep(0.01)
    process.kill()
    process.communicate()
    assert main(arguments) == 0
    assert results(tmp_path) == results(whole)


@pytest.mark.slow
def test_ctrl_c_saves_and_says_how_to_go_on(
    whole: Path, run: Path, network: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    arguments = [str(run), *QUICK, *network, "--out", str(tmp_path), "--save-every", "1000"]
    sample, made = passes.sample_batch, []

    def interrupted(*options: Any) -> torch.Tensor:
        made.append(options[1])
        if len(made) == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return sample(*options)

    monkeypatch.setattr(passes, "sample_batch", interrupted)
    assert main(arguments) == 130
    assert "the same command goes on" in capsys.readouterr().out
    assert main(arguments) == 0
    assert made == [range(0, 4), range(4, 8), range(8, 10)], "no batch was sampled again"
    assert results(tmp_path) == results(whole)


@pytest.mark.slow
def test_two_processes_give_what_one_gives(whole: Path, run: Path, network: list[str], tmp_path: Path) -> None:
    arguments = [str(run), *QUICK, *network, "--out", str(tmp_path)]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    processes = []
    for rank in ("0", "1"):  # what torchrun sets, without the seconds that torchrun takes to start
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
        place |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": str(torch.get_num_threads())}
        processes.append(start(arguments, **place))
    spoken = [process.communicate(timeout=300)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], spoken
    assert "written:" in spoken[0] and "written:" not in spoken[1], "one process speaks"
    assert len(list(tmp_path.glob("statistics/*/part-1.safetensors"))) == 3, "both had a share of each pass"
    two, one = results(tmp_path), results(whole)
    assert two["protocol"]["environment"].pop("processes") == 2
    assert one["protocol"]["environment"].pop("processes") == 1
    assert two["protocol"] == one["protocol"]
    for name in ("psnr", "ssim"):
        assert two["results"]["reconstruction"][name]["mean"] == pytest.approx(
            one["results"]["reconstruction"][name]["mean"], rel=SUM_ORDER
        )
    for first, second in (
        (two["results"]["reconstruction"], one["results"]["reconstruction"]),
        *((two["results"]["generation"][n], one["results"]["generation"][n]) for n in ("4", "6")),
    ):
        assert first["frechet_distance"] == pytest.approx(second["frechet_distance"], rel=FRECHET)
    part = next(tmp_path.glob("statistics/samples-*/part-1.safetensors"))
    part.unlink()  # as if this process had died before its first save: one process does its share
    assert main(arguments) == 0
    assert results(tmp_path)["results"]["generation"]["6"]["frechet_distance"] == pytest.approx(
        one["results"]["generation"]["6"]["frechet_distance"], rel=FRECHET
    )


def test_a_finished_evaluation_is_only_written_again(
    whole: Path, run: Path, network: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "again"
    shutil.copytree(whole / "statistics", out / "statistics")
    monkeypatch.setattr(FeatureNetwork, "__call__", lambda *arguments: pytest.fail("computed again"))
    assert main([str(run), *QUICK, *network, "--out", str(out)]) == 0
    assert results(out) == results(whole)
    with pytest.raises(pytest.fail.Exception):  # other samples are measured anew
        main([str(run), *QUICK, *network, "--out", str(out), "--eta", "0.5"])


def test_a_second_evaluation_of_the_folder_is_refused(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    holder = "import fcntl, sys; f = open(sys.argv[1], 'a'); fcntl.lockf(f, fcntl.LOCK_EX); print('held', flush=True)"
    process = subprocess.Popen(
        [sys.executable, "-c", f"{holder}; sys.stdin.read()", str(tmp_path / "evaluation.lock")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    assert main([str(run), *QUICK, "--out", str(tmp_path)]) == 2
    assert "another evaluation" in capsys.readouterr().err
    process.communicate("")


def test_damaged_statistics_are_refused(
    whole: Path, run: Path, network: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(whole / "statistics", tmp_path / "statistics")
    (part,) = tmp_path.glob("statistics/samples-*/part-0.safetensors")
    part.write_bytes(part.read_bytes()[:100])
    assert main([str(run), *QUICK, *network, "--out", str(tmp_path)]) == 2
    assert "remove the folder" in capsys.readouterr().err


def test_samples_of_each_class_in_turn_are_told(run: Path, tmp_path: Path) -> None:
    known = tmp_path / "run"
    shutil.copytree(run, known)
    denoiser = Denoiser.from_pretrained(known / "denoiser")
    config = {key: value for key, value in denoiser.config.items() if not key.startswith("_")}
    Denoiser(**{**config, "num_classes": 2, "class_names": ["a", "b"]}).save_pretrained(known / "denoiser")
    assert main([str(known), *QUICK, "--clips", "4", "--samples", "1", "--out", str(tmp_path / "out")]) == 0
    assert any("samples are of each class in turn" in line for line in results(tmp_path / "out")["results"]["caveats"])


def test_samples_of_rendered_scenes_are_compared_with_their_classes(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rendered scenes in place of samples, the last of which is of another class than was asked for."""
    known = tmp_path / "run"
    shutil.copytree(run, known)
    denoiser = Denoiser.from_pretrained(known / "denoiser")
    config = {key: value for key, value in denoiser.config.items() if not key.startswith("_")}
    of_kinds = Denoiser(**{**config, "num_classes": len(KINDS), "class_names": sorted(KINDS)})
    of_kinds.save_pretrained(known / "denoiser")
    assert passes.kinds_asked_for(of_kinds, range(4, 7)) == ["triangle", "diamond", "disc"]
    assert passes.kinds_asked_for(denoiser, range(4, 7)) == []
    names = [*sorted(KINDS), "disc"]

    def rendered(subject: object, numbers: range, frames: int, sampling: object) -> torch.Tensor:
        scenes = [draw_scene(np.random.default_rng(number), 1.5) for number in numbers]
        kinds = [
            np.full(len(scene.kind), KINDS.index(names[number])) for number, scene in zip(numbers, scenes, strict=True)
        ]
        clips = [dataclasses.replace(s, kind=k).render(frames, 16, 24) for s, k in zip(scenes, kinds, strict=True)]
        return torch.from_numpy(np.stack(clips)).permute(0, 4, 1, 2, 3) / 127.5 - 1

    monkeypatch.setattr(passes, "sample_batch", rendered)
    assert main([str(known), *QUICK, "--clips", "4", "--samples", "6", "--out", str(tmp_path / "out")]) == 0
    found = results(tmp_path / "out")["results"]["scenes"]
    videos = torch.cat([rendered(None, numbers, 8, None) for numbers in (range(4), range(4, 6))])
    counts = of_class(see(load_judge(), videos), [*sorted(KINDS), "diamond"])
    assert counts[:, 1].min() >= 4 and counts[5, 0] <= 1
    right, objects = counts.sum(0).tolist()
    assert found["of_class"] == pytest.approx(right / objects) and 0.5 < found["of_class"] < 0.95
    assert "objects of the class asked for" in (tmp_path / "out" / "report.html").read_text()


@pytest.mark.parametrize("model", ["autoencoder", "denoiser"])
def test_a_model_that_lacks_weights_is_refused(
    model: str, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """diffusers would initialise them randomly."""
    damaged = tmp_path / "run"
    shutil.copytree(run, damaged)
    (file,) = (damaged / model).glob("*.safetensors")
    weights = load_file(file)
    del weights[next(iter(weights))]
    save_file(weights, file)
    assert main([str(damaged), *QUICK]) == 2
    assert "damaged or of another model" in capsys.readouterr().err


def test_videos_that_cannot_be_used_are_passed_over_and_named(run: Path, network: list[str], tmp_path: Path) -> None:
    films = tmp_path / "films"
    films.mkdir()
    for number, length in enumerate((9, 5, 12)):
        noise = np.random.default_rng(number).integers(0, 256, (length, 30, 60, 3), dtype=np.uint8)
        write_video(films / f"{number}.mp4", noise)
    (films / "3.mp4").write_bytes(b"no video")
    arguments = ["--data", str(films), "--split", "all", "--clips", "4", "--samples", "2", "--stride", "1"]
    assert main([str(run), *QUICK, *network, *arguments, "--out", str(tmp_path / "out")]) == 0
    found = results(tmp_path / "out")["results"]
    reasons = {Path(path).name: reason for path, reason in found["unreadable_files"].items()}
    assert set(reasons) == {"1.mp4", "3.mp4"}, reasons
    assert "5 frames, a clip needs 6" in reasons["1.mp4"] and "cannot be opened" in reasons["3.mp4"]
    assert found["generation"]["6"]["real_clips"] == 4
    assert found["scenes"] is None and any("rendered scenes" in line and "films" in line for line in found["missing"])
    assert any("trained on" in line for line in found["caveats"])


def test_training_videos_are_cropped_at_the_centre(tmp_path: Path) -> None:
    """They are black left of the centre and white right of it. Any other crop would be mostly one of these."""
    halves = np.zeros((4, 16, 128, 3), np.uint8)
    halves[:, :, 64:] = 255
    for name in ("a", "b"):
        write_video(tmp_path / f"{name}.mp4", halves)
    dataset = open_clips(tmp_path, "train", frames=2, size=(16, 16), stride=1, seed=0)
    for draw in range(6):
        video = dataset[draw]["video"]
        assert video[..., :6].max() < -0.8 and video[..., 10:].min() > 0.8


def test_a_run_without_a_denoiser_is_reconstructed_only(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "denoiser")
    assert main([str(tmp_path / "run"), *QUICK, "--clips", "3"]) == 0
    found = results(tmp_path / "run" / "evaluation")["results"]
    assert found["generation"] == {} and any("no denoiser" in line for line in found["missing"])
    assert found["reconstruction"]["clips"] == 3


class Numbered(ClipDataset):
    """So many videos. A clip is named after its draw, because a dataset's windows differ between draws."""

    def __init__(self, name: str, videos: int) -> None:
        self.name, self.videos, self.spec, self.description = name, videos, ClipSpec(2, 4, 4, seed=4), name

    def __len__(self) -> int:
        return self.videos

    def __getitem__(self, draw: int) -> Item:
        return {"video": torch.zeros(3, 2, 4, 4), "name": f"{self.name} {draw}", "label": None, "skipped": []}


def test_all_clips_are_those_of_both_splits_once() -> None:
    both = BothSplits(Numbered("test", 3), Numbered("train", 5))
    names = [name for batch in read_batches(both, [range(0, 4), range(4, 16)], 0) for name in batch["names"]]
    assert sorted(names[:8]) == [f"test {n}" for n in range(3)] + [f"train {n}" for n in range(5)]
    assert sorted(names[8:]) == [f"test {n}" for n in range(3, 6)] + [f"train {n}" for n in range(5, 10)]
    assert names[:8] != sorted(names[:8]), "in an order of their own"


def test_all_clips_can_be_opened() -> None:
    both = open_clips("synthetic:shapes", "all", frames=2, size=(8, 8), stride=1, seed=0)
    assert len(both) == 4096 + 256 and "train split" in both.description and "test split" in both.description


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--features", "i3d.pt"], "--features and --features-sha256 go together"),
        (["--scheduler", "euler"], "the scheduler euler doesn't go with this denoiser"),
        (["--split", "dev"], "--split must be one of test, train, all"),
        (["--frames", "4", "4"], "--frames must be different numbers"),
        (["--clips", "0"], "--clips must be at least 1"),
        (["--data", "nowhere"], "nowhere"),
        (["--step", "4"], "--steps"),
    ],
)
def test_what_does_not_fit_is_one_sentence(
    options: list[str], sentence: str, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(run), *QUICK, "--out", str(tmp_path / "out"), *options]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and sentence in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_no_run_is_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path)]) == 2
    assert "name the clips with --data" in capsys.readouterr().err
    assert main([str(tmp_path), "--data", "synthetic:shapes", "--device", "cpu"]) == 2
    assert "no trained autoencoder" in capsys.readouterr().err


def test_what_was_trained_on_is_the_default(run: Path, tmp_path: Path) -> None:
    (request,) = parse([str(run)])
    assert (request.data, request.stride, request.split) == ("synthetic:shapes", 1, "test")
    shutil.copytree(run, tmp_path / "run")
    config = tmp_path / "run" / "config.yaml"
    config.write_text(config.read_text().replace("stride: 1", "stride: 3").replace("fold: 1", "fold: 2"))
    (request,) = parse([str(tmp_path / "run")])
    assert (request.stride, request.fold) == (3, 2), "the first fold's test videos trained this run"
    assert parse([str(tmp_path / "run"), "--stride", "2", "--data", "films"])[0].data == "films"


def test_small_numbers_are_warned_of(whole: Path) -> None:
    caveats = " ".join(results(whole)["results"]["caveats"])
    assert "10 clips: a Fréchet distance falls as clips are added" in caveats
    assert "2,048" in caveats
