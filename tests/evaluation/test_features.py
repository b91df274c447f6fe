"""The feature network is opened only with the right hash, gets what the protocol says, and agrees with cd-fvd."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from comparison import assert_close
from evaluation.networks import WIDTH, Interface
from tolerances import FLOAT32_ERROR, FLOAT32_PIXELS, FRECHET, I3D_COVARIANCE

from pvdm_fast.errors import UserError
from pvdm_fast.evaluation.features import I3D_SHA256, FeatureNetwork, prepare
from pvdm_fast.evaluation.moments import Gaussian, frechet_distance, moments
from pvdm_fast.jobs.checksums import sha256

CPU = torch.device("cpu")


def load(options: list[str]) -> FeatureNetwork:
    return FeatureNetwork(Path(options[1]), options[3], CPU)


def test_another_file_is_refused_unopened(tmp_path: Path, network: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    changed = tmp_path / "changed.pt"
    data = bytearray(Path(network[1]).read_bytes())
    data[len(data) // 2] ^= 1
    changed.write_bytes(data)
    monkeypatch.setattr(torch.jit, "load", lambda *a, **k: pytest.fail("it was opened"))
    with pytest.raises(UserError, match=rf"the sha256 of .*changed.pt is {sha256(changed)}, not {network[3]}"):
        FeatureNetwork(changed, network[3], CPU)
    with pytest.raises(UserError, match=f"no feature network.*fetch.*{I3D_SHA256}"):
        FeatureNetwork(tmp_path / "none.pt", network[3], CPU)


def test_what_is_no_torchscript_is_said_to_be_none(tmp_path: Path) -> None:
    path = tmp_path / "weights.pt"
    path.write_bytes(b"not TorchScript")
    with pytest.raises(UserError, match="no TorchScript"):
        FeatureNetwork(path, sha256(path), CPU)


def test_frames_are_prepared_as_stated() -> None:
    exact = torch.randint(0, 256, (1, 3, 2, 224, 224)) / 127.5 - 1
    assert torch.allclose(prepare(exact), exact, atol=FLOAT32_PIXELS), "8-bit frames of 224 x 224 stay what they are"
    assert torch.allclose(prepare(exact + 0.003), prepare(exact)), "other values are rounded to 8 bits"
    small = torch.zeros(1, 3, 2, 2, 2)
    small[:, :, 1, :, 1] = 1.0
    row = prepare(small)[0, 0, 1, 100]
    places = (np.arange(224) + 0.5) * 2 / 224 - 0.5  # in source pixels: half-pixel centres
    low, high = 128 / 127.5 - 1, 1.0  # 0 lies between two 8-bit values, and rounds to the even one, 128
    expected = low + (high - low) * np.clip(places, 0, 1)
    assert np.allclose(row, expected, atol=FLOAT32_PIXELS), "bilinear between centres, constant outside"
    assert torch.allclose(prepare(small)[0, 1, 0], torch.tensor(low, dtype=torch.float32), atol=FLOAT32_PIXELS)


def test_features_do_not_depend_on_the_batch(network: list[str]) -> None:
    extract = load(network)
    video = torch.rand(5, 3, 60, 8, 8) * 2 - 1  # the network takes two videos of 60 frames at once
    together = extract(video)
    assert together.shape == (5, WIDTH) and together.dtype == torch.float64
    assert torch.allclose(together, torch.cat([extract(clip[None]) for clip in video]), atol=FLOAT32_PIXELS)


def test_clips_too_short_for_the_network_are_a_sentence(network: list[str]) -> None:
    with pytest.raises(UserError, match=r"cannot take clips of 1 frames.*--frames"):
        load(network)(torch.zeros(1, 3, 1, 8, 8))


def test_values_that_are_not_finite_are_refused(network: list[str]) -> None:
    with pytest.raises(UserError, match="not finite"):
        load(network)(torch.full((1, 3, 2, 8, 8), torch.nan))


def test_it_agrees_with_cd_fvd_given_the_same_network(
    network: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """cd-fvd's whole computation, from 8-bit videos to the distance, with its I3D replaced by ours."""
    cdfvd = pytest.importorskip("cdfvd.fvd", reason="cd-fvd is not installed: pip install cd-fvd")
    extract = load(network)

    def same_network(video: torch.Tensor) -> torch.Tensor:
        return extract.network(video, rescale=False, resize=False, return_features=True)

    class Loaded(torch.nn.Module):
        def forward(self, video: torch.Tensor) -> torch.Tensor:
            return same_network(video)

    monkeypatch.setattr(cdfvd, "load_i3d_model", lambda *arguments: Loaded())
    generator = torch.Generator().manual_seed(1)
    real = torch.randint(0, 256, (20, 3, 3, 20, 28), generator=generator)
    made = (real[:16] * 0.7).long() + torch.randint(0, 60, (16, 3, 3, 20, 28), generator=generator)
    theirs = cdfvd.cdfvd("i3d", device="cpu").compute_fvd(
        *(videos.permute(0, 2, 3, 4, 1).to(torch.uint8).numpy() for videos in (real, made))
    )
    ours = frechet_distance(*(Gaussian.of(moments(extract(videos / 127.5 - 1))) for videos in (real, made)))
    assert ours > 1e-4, "they differ, so that there is something to agree on"
    assert ours == pytest.approx(float(theirs), rel=FRECHET)


@pytest.mark.exhaustive
def test_cd_fvd_s_own_i3d_gives_the_same_statistics(tmp_path: Path) -> None:
    """Its network with random weights: loaded by itself from a file, and by us as TorchScript."""
    cdfvd = pytest.importorskip("cdfvd.fvd", reason="cd-fvd is not installed: pip install cd-fvd")
    from cdfvd.third_party.i3d.pytorch_i3d import InceptionI3d

    weights, scripted = tmp_path / "i3d.pt", tmp_path / "i3d_torchscript.pt"
    i3d = InceptionI3d(400, in_channels=3).eval()
    torch.save(i3d.state_dict(), weights)
    traced = torch.jit.trace(i3d, torch.zeros(1, 3, 16, 224, 224))
    torch.jit.save(torch.jit.script(Interface(traced)), scripted)
    videos = torch.randint(0, 256, (3, 3, 16, 40, 60))
    theirs = cdfvd.cdfvd("i3d", device="cpu", ckpt_path=str(weights))
    theirs.add_real_stats(videos.permute(0, 2, 3, 4, 1).to(torch.uint8).numpy())
    mean, covariance = theirs.real_stats.get_mean_cov()
    ours = Gaussian.of(moments(FeatureNetwork(scripted, sha256(scripted), CPU)(videos / 127.5 - 1)))
    assert_close(ours.mean, torch.from_numpy(mean), FLOAT32_ERROR, "mean")
    assert_close(ours.covariance, torch.from_numpy(covariance), I3D_COVARIANCE, "covariance")
