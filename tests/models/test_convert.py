"""The authors' checkpoints to a run's folder and back, by the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from golden_tools import load_case
from torch import Tensor

from pvdm_fast.convert import main as convert
from pvdm_fast.layout import TriplaneLayout
from pvdm_fast.models import Autoencoder, Denoiser
from pvdm_fast.models.release import to_release

State = dict[str, Tensor]
HEADS = ["--diffusion-num-heads", "4"]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """As people have them: an autoencoder as the release saves it, a denoiser in half precision among other things."""
    folder = tmp_path_factory.mktemp("release")
    torch.save(load_case("autoencoder_small").parameters(), folder / "ae.pth")
    state = {f"module.diffusion_model.{n}": t.half() for n, t in small_denoiser().items()}
    torch.save({"model": {}, "ema": state, "step": 5}, folder / "unet.pth")
    return folder / "ae.pth", folder / "unet.pth"


def small_denoiser() -> State:
    """For the golden autoencoder's latents, 16 x 6 x 6."""
    torch.manual_seed(0)
    sizes = dict(model_channels=32, channel_mult=[1, 2], num_res_blocks=1, attention_resolutions=[2], num_heads=4)
    return to_release(Denoiser(time=16, height=6, width=6, **sizes))


def same_file(first: Path, second: State) -> bool:
    state = torch.load(first, weights_only=True)
    return list(state) == list(second) and all(
        state[name].dtype == tensor.dtype and torch.equal(state[name], tensor) for name, tensor in second.items()
    )


def test_two_files_become_a_run_and_go_back(
    files: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, names = tmp_path / "run", [str(path) for path in files]
    assert convert([*names, str(run), *HEADS]) == 0
    said = capsys.readouterr().out
    assert "Autoencoder, 5.9 M parameters" in said and "16 frames of 48x48" in said
    assert "assumed, as in the release, since the shapes don't tell: --autoencoder-num-heads 8\n" in said
    assert "betas from 0.0015 to 0.0195 in 1000 steps" in said and "--diffusion-num-heads" not in said
    assert "unet.pth (ema in it)" in said
    assert Denoiser.from_pretrained(run / "denoiser").layout == TriplaneLayout(16, 6, 6)
    note = json.loads((run / "autoencoder" / "release.json").read_text())
    assert (note["file"], note["assumed"]) == ("ae.pth", {"autoencoder_num_heads": 8})
    back = [tmp_path / "back" / "ae.pth", tmp_path / "back" / "unet.pth"]
    assert convert(["--back", str(run), *map(str, back)]) == 0
    assert same_file(back[0], torch.load(files[0], weights_only=True))
    assert same_file(back[1], torch.load(files[1], weights_only=True)["ema"])


def test_their_order_is_free_and_one_of_each_is_needed(
    files: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert convert([str(files[1]), str(files[0]), str(tmp_path / "run"), *HEADS]) == 0
    assert (tmp_path / "run" / "autoencoder" / "config.json").exists()
    capsys.readouterr()
    assert convert([str(files[0]), str(files[0]), str(tmp_path / "other")]) == 2
    assert "name one of each network" in capsys.readouterr().err
    assert not (tmp_path / "other").exists()


def test_a_single_file_becomes_a_model_and_goes_back(files: tuple[Path, Path], tmp_path: Path) -> None:
    assert convert([str(files[0]), str(tmp_path / "ae")]) == 0
    sizes = ["--frames", "16", "--height", "48", "--width", "48"]
    assert convert([str(files[1]), str(tmp_path / "unet"), *HEADS, *sizes]) == 0
    original = torch.load(files[0], weights_only=True)
    loaded = Autoencoder.from_pretrained(tmp_path / "ae").state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in original.items())
    assert convert(["--back", str(tmp_path / "unet"), str(tmp_path / "back.pth")]) == 0
    assert same_file(tmp_path / "back.pth", torch.load(files[1], weights_only=True)["ema"])


def test_a_model_of_our_own_goes_out_by_the_releases_names(tmp_path: Path) -> None:
    """A run that was trained here: the denoiser's prefix is the release's."""
    state = small_denoiser()
    model = Denoiser(
        time=16,
        height=6,
        width=6,
        model_channels=32,
        channel_mult=[1, 2],
        num_res_blocks=1,
        attention_resolutions=[2],
        num_heads=4,
    )
    model.load_state_dict(state)
    model.save_pretrained(tmp_path / "denoiser")
    assert convert(["--back", str(tmp_path / "denoiser"), str(tmp_path / "unet.pth")]) == 0
    assert same_file(tmp_path / "unet.pth", {f"diffusion_model.{name}": tensor for name, tensor in state.items()})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{ae}"], "not 1 paths"),
        (["{missing}", "{out}"], "is not a file"),
        (["{ae}", "{unet}", "{full}", *HEADS], "already exists: name another place"),
        (["{ae}", "{full}/letter.txt"], "already exists"),
        (["{ae}", "{unet}", "{out}", "--autoencoder-num-heads", "7"], "which 7 heads don't divide"),
        (["{ae}", "{unet}", "{out}", "--frames", "8"], "--frames has nothing to say here, since the autoencoder's"),
        (["{ae}", "{out}", "--diffusion-num-heads", "8"], "--diffusion-num-heads has nothing to say here"),
        (["{unet}", "{out}", "--autoencoder-num-heads", "8"], "--autoencoder-num-heads has nothing to say here"),
        (["{unet}", "{out}", *HEADS], "zeros (file (1, 4, 228), model (1, 4, 2048))"),
        (["{unet}", "{out}", "--height", "30"], "--height 30 is not divisible by --patch-size 8"),
        (["{unet}", "{out}", *HEADS, "--diffusion-num-head-channels", "8"], "say the same: give one"),
        (["--back", "{full}", "{out}"], "neither a model's folder nor a run"),
        (["--back", "{ae}", "{out}", "--frames", "3"], "--frames doesn't go with --back"),
        (["{ae}", "{out}", "--num-heads", "8"], "no option --num-heads; did you mean"),
    ],
)
def test_mistakes_are_one_sentence_and_write_nothing(
    arguments: list[str],
    message: str,
    files: tuple[Path, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    full = tmp_path / "full"
    full.mkdir()
    (full / "letter.txt").write_text("dear")
    names = {"ae": files[0], "unet": files[1], "full": full, "out": tmp_path / "out", "missing": tmp_path / "none.pth"}
    assert convert([word.format(**names) for word in arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.startswith("error: ") and error.count("\n") == 1
    assert sorted(item.name for item in tmp_path.iterdir()) == ["full"]


def test_a_damaged_note_is_refused(
    files: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from pvdm_fast.jobs.checksums import write_checksums

    assert convert([str(files[0]), str(tmp_path / "ae")]) == 0
    for names in ({"to_pixel.1.bias": ["x", "int64"]}, {"unknown": ["x", "float32"]}, []):
        (tmp_path / "ae" / "release.json").write_text(json.dumps({"names": names}))
        write_checksums(tmp_path / "ae")
        assert convert(["--back", str(tmp_path / "ae"), str(tmp_path / "back.pth")]) == 2
        assert "release.json is damaged" in capsys.readouterr().err
