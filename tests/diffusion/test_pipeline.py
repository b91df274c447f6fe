"""PVDMPipeline: a run's folder as a diffusers pipeline."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from diffusers import DPMSolverMultistepScheduler
from diffusers.utils import export_to_video
from filling import randomised

from pvdm_fast import PVDMPipeline
from pvdm_fast.data import write_video
from pvdm_fast.data.continuation import last_clip
from pvdm_fast.diffusion.sampling import NoiseSource, sample_video
from pvdm_fast.diffusion.schedulers import OF_NOISE, make_scheduler
from pvdm_fast.errors import UserError
from pvdm_fast.models import Autoencoder, Denoiser

AUTOENCODER: dict[str, Any] = dict(
    frames=4, height=16, width=24, patch_size=8, channels=16, depth=1, num_heads=1, head_dim=8
)
DENOISER: dict[str, Any] = dict(
    time=4, height=2, width=3, model_channels=32, channel_mult=[1], num_heads=2, num_res_blocks=1
)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as training leaves it."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("run")
    randomised(Autoencoder(**AUTOENCODER)).save_pretrained(folder / "autoencoder")
    randomised(Denoiser(**DENOISER)).save_pretrained(folder / "denoiser")
    return folder


@pytest.fixture
def pipeline(run: Path) -> PVDMPipeline:
    return quiet(PVDMPipeline.from_pretrained(run))


@pytest.fixture(scope="module")
def classy() -> PVDMPipeline:
    torch.manual_seed(0)
    denoiser = randomised(Denoiser(**DENOISER, num_classes=3, class_names=["Archery", "Biking", "YoYo"])).eval()
    return quiet(PVDMPipeline(randomised(Autoencoder(**AUTOENCODER)).eval(), denoiser, make_scheduler("ddim")))


def quiet(pipeline: PVDMPipeline) -> PVDMPipeline:
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def test_it_is_sample_video(pipeline: PVDMPipeline) -> None:
    """The same noise gives the same videos both ways: longer than a clip, cut, and in all forms."""
    noise = NoiseSource(5)
    expected = sample_video(pipeline.autoencoder, pipeline.denoiser, clips=2, frames=6, steps=3, seed=noise)
    assert expected.shape == (2, 3, 6, 16, 24)
    arguments: dict[str, Any] = dict(num_frames=6, num_inference_steps=3, batch_size=2)
    as_torch = pipeline(**arguments, generator=seeded(5), output_type="pt").frames
    assert torch.equal(as_torch, (expected.transpose(1, 2) / 2 + 0.5).clamp(0, 1))
    as_numpy = pipeline(**arguments, generator=seeded(5)).frames
    assert np.array_equal(as_numpy, as_torch.permute(0, 1, 3, 4, 2).numpy())
    (as_pictures,) = pipeline(**arguments, generator=seeded(5), output_type="pil", return_dict=False)
    assert [len(video) for video in as_pictures] == [6, 6]
    assert np.array_equal(np.asarray(as_pictures[1][5]), (as_numpy[1, 5] * 255).round().astype(np.uint8))


@pytest.mark.parametrize("name", OF_NOISE)
def test_saved_and_loaded_it_samples_the_same(name: str, pipeline: PVDMPipeline, tmp_path: Path) -> None:
    pipeline.scheduler = make_scheduler(name)
    pipeline.save_pretrained(tmp_path / "saved")
    again = quiet(PVDMPipeline.from_pretrained(tmp_path / "saved"))
    assert type(again.scheduler) is type(pipeline.scheduler)
    results = [p(num_frames=6, num_inference_steps=4, generator=seeded(1)).frames for p in (pipeline, again)]
    assert np.array_equal(*results)


def test_a_list_of_generators_is_one_for_each_video(pipeline: PVDMPipeline) -> None:
    both = pipeline(num_inference_steps=2, batch_size=2, generator=[seeded(1), seeded(2)]).frames
    alone = pipeline(num_inference_steps=2, generator=[seeded(2)]).frames
    assert np.allclose(both[1:], alone, atol=1e-5)
    with pytest.raises(UserError, match="1 generators for 2 videos"):
        pipeline(num_inference_steps=2, batch_size=2, generator=[seeded(1)])


def test_without_a_generator_torch_s_seed_decides(pipeline: PVDMPipeline) -> None:
    videos = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        videos.append(pipeline(num_inference_steps=2).frames)
    assert np.array_equal(videos[0], videos[1]) and not np.array_equal(videos[0], videos[2])


def test_another_scheduler_of_diffusers(pipeline: PVDMPipeline) -> None:
    from diffusers import EulerDiscreteScheduler

    pipeline.scheduler = DPMSolverMultistepScheduler.from_config(pipeline.scheduler.config)
    assert np.isfinite(pipeline(num_inference_steps=3, generator=seeded(0)).frames).all()
    pipeline.scheduler = EulerDiscreteScheduler.from_config(pipeline.scheduler.config)
    with pytest.raises(UserError, match=r"EulerDiscreteScheduler scales its noise.*make_scheduler"):
        pipeline(num_inference_steps=3)


def test_callbacks_see_and_change_every_step(pipeline: PVDMPipeline) -> None:
    seen = []

    def zeros_at_the_end(pipe: PVDMPipeline, step: int, timestep: int, given: dict[str, Any]) -> dict[str, Any]:
        seen.append((step, timestep))
        return {"latents": torch.zeros_like(given["latents"])} if timestep == 499 else {}

    frames = pipeline(num_frames=8, num_inference_steps=2, eta=0.0, callback_on_step_end=zeros_at_the_end).frames
    assert seen == [(0, 999), (1, 499), (2, 999), (3, 499)]
    with torch.no_grad():
        flat = pipeline.autoencoder.decode(torch.zeros(1, 4, pipeline.denoiser.layout.num_tokens)).sample
    assert np.allclose(frames[0, :4], (flat[0] / 2 + 0.5).permute(1, 2, 3, 0).numpy(), atol=1e-6)
    with pytest.raises(UserError, match="not noise"):
        pipeline(callback_on_step_end=zeros_at_the_end, callback_on_step_end_tensor_inputs=["noise"])


def test_a_continued_video_in_every_form(pipeline: PVDMPipeline, tmp_path: Path) -> None:
    """A file, or its frames as numpy, torch or pictures, give the same continuation. Only the last T frames
    count."""
    film = np.random.default_rng(0).integers(0, 256, (7, 16, 24, 3), dtype=np.uint8)
    for number, frame in enumerate(film):
        write_png(tmp_path / f"film/{number}.png", frame)
    pictures = list_of_pictures(film)
    forms: list[Any] = [
        tmp_path / "film",
        film / np.float32(255),
        torch.from_numpy(film / np.float32(255)).permute(0, 3, 1, 2)[None],
        pictures,
        pictures[3:],
    ]
    videos = [
        pipeline(6, 2, condition=[form] if form is forms[1] else form, generator=seeded(0)).frames for form in forms
    ]
    assert all(np.array_equal(videos[0], video) for video in videos[1:])
    assert not np.array_equal(videos[0], pipeline(6, 2, generator=seeded(0)).frames)
    assert not np.array_equal(videos[0], pipeline(6, 2, condition=pictures[:4], generator=seeded(0)).frames)
    two = pipeline(6, 2, batch_size=2, condition=pictures, generator=[seeded(0), seeded(1)]).frames
    assert np.allclose(two[:1], pipeline(6, 2, condition=pictures, generator=[seeded(0)]).frames, atol=1e-5)


def write_png(path: Path, frame: np.ndarray) -> None:
    from PIL import Image

    path.parent.mkdir(exist_ok=True)
    Image.fromarray(frame).save(path)


def list_of_pictures(film: np.ndarray) -> list[Any]:
    from PIL import Image

    return [Image.fromarray(frame) for frame in film]


def test_a_condition_is_cropped_as_the_data_is(tmp_path: Path) -> None:
    """Uses the centre of a wide video, at half its size, and every second frame up to the last."""
    film = np.zeros((9, 32, 96, 3), np.uint8)
    film[:, :, 24:72] = np.arange(9, dtype=np.uint8)[:, None, None, None] * 20
    write_video(tmp_path / "film.mp4", film)
    clip = last_clip(tmp_path / "film.mp4", frames=4, height=16, width=24, stride=2)
    assert clip.shape == (1, 3, 4, 16, 24)
    expected = torch.tensor([2.0, 4, 6, 8]) * 20 / 127.5 - 1
    assert torch.allclose(clip[0, 0, :, 4:12, 6:18].mean(dim=(1, 2)), expected, atol=0.03)


def test_conditions_that_cannot_be_used(pipeline: PVDMPipeline, tmp_path: Path) -> None:
    write_video(tmp_path / "short.mp4", np.zeros((3, 16, 16, 3), np.uint8))
    (tmp_path / "broken.mp4").write_text("not a video")
    for name, message in (
        ("short.mp4", "cannot continue .*short.mp4: it has 3 frames, but the model's clip of 4 takes 4"),
        ("broken.mp4", "cannot continue .*broken.mp4: cannot be opened"),
        ("nowhere.mp4", "there is no video"),
    ):
        with pytest.raises(UserError, match=message):
            pipeline(condition=tmp_path / name)
    with pytest.raises(UserError, match="condition has 3 frames"):
        pipeline(condition=np.zeros((1, 3, 16, 24, 3), np.float32))
    with pytest.raises(UserError, match="not a video"):
        pipeline(condition=7)
    with pytest.raises(UserError, match=r"condition must be \(3, 3, 4, 16, 24\)"):
        pipeline(condition=np.zeros((2, 4, 16, 24, 3), np.float32), batch_size=3)


def test_classes_by_number_and_by_name(classy: PVDMPipeline) -> None:
    def videos(**arguments: Any) -> np.ndarray:
        return classy(num_inference_steps=2, generator=seeded(0), **arguments).frames

    biking = videos(class_labels="Biking")
    assert np.array_equal(biking, videos(class_labels=1))
    assert not np.array_equal(biking, videos(class_labels="YoYo"))
    assert not np.array_equal(biking, videos())
    mixed = classy(
        num_inference_steps=2, batch_size=2, class_labels=["YoYo", 1], generator=[seeded(1), seeded(0)]
    ).frames
    assert np.allclose(
        mixed[1], classy(num_inference_steps=2, class_labels=1, generator=[seeded(0)]).frames[0], atol=1e-5
    )


def test_without_a_class_each_is_sampled_in_turn(classy: PVDMPipeline) -> None:
    def videos(**arguments: Any) -> np.ndarray:
        frames = classy(num_frames=2, num_inference_steps=2, batch_size=4, generator=seeded(1), **arguments).frames
        return np.asarray(frames)

    assert np.array_equal(videos(), videos(class_labels=[0, 1, 2, 0]))
    assert not np.array_equal(videos(), videos(class_labels="none"))


def test_the_denoiser_s_own_guidance(classy: PVDMPipeline) -> None:
    """Counts where none is given."""
    arguments: dict[str, Any] = dict(num_frames=2, num_inference_steps=2, batch_size=2)
    plain, guided = (classy(**arguments, guidance_scale=g, generator=seeded(1)).frames for g in (None, 2.5))
    classy.denoiser.register_to_config(sampling_guidance=1.5)
    try:
        own, off = (classy(**arguments, guidance_scale=g, generator=seeded(1)).frames for g in (None, 1.0))
    finally:
        classy.denoiser.register_to_config(sampling_guidance=0.0)
    assert np.array_equal(own, guided) and np.array_equal(off, plain) and not np.array_equal(own, off)


def test_classes_are_guided_in_one_pass(classy: PVDMPipeline) -> None:
    """Every pass has twice the videos, including the first clip's. Scale 1 turns guidance off."""
    sizes: list[int] = []
    handle = classy.denoiser.register_forward_pre_hook(lambda module, arguments: sizes.append(len(arguments[0])))
    guided = classy(8, 2, class_labels=0, guidance_scale=3.0, generator=seeded(0)).frames
    plain = [classy(8, 2, class_labels=0, guidance_scale=scale, generator=seeded(0)).frames for scale in (1.0, 0.0)]
    handle.remove()
    assert sizes == [2] * 4 + [1] * 8
    assert np.array_equal(*plain) and not np.array_equal(guided, plain[0])


def test_wrong_classes(classy: PVDMPipeline, pipeline: PVDMPipeline) -> None:
    for label, message in (
        ("Bikin", "no class 'Bikin': .*below 3.*Archery, Biking"),
        (3, "no class 3"),
        (-1, "no class -1"),
    ):
        with pytest.raises(UserError, match=message):
            classy(class_labels=label)
    with pytest.raises(UserError, match="2 classes for 3 videos"):
        classy(class_labels=[0, 1], batch_size=3)
    with pytest.raises(UserError, match="trained without classes"):
        pipeline(class_labels=0)


def test_bfloat16(run: Path) -> None:
    exact = quiet(PVDMPipeline.from_pretrained(run))(num_inference_steps=2, generator=seeded(0)).frames
    low = quiet(PVDMPipeline.from_pretrained(run, torch_dtype=torch.bfloat16))
    assert low.denoiser.dtype == low.autoencoder.dtype == torch.bfloat16
    frames = low(num_inference_steps=2, generator=seeded(0)).frames
    assert frames.dtype == np.float32 and 0 < np.abs(frames - exact).mean() < 0.02


def test_export_to_video(pipeline: PVDMPipeline, tmp_path: Path) -> None:
    pytest.importorskip(
        "imageio_ffmpeg", reason="diffusers exports through imageio: pip install imageio imageio-ffmpeg"
    )
    frames = pipeline(num_frames=5, num_inference_steps=2, generator=seeded(0)).frames[0]
    export_to_video(frames, str(tmp_path / "video.mp4"), fps=8, macro_block_size=8)
    with av.open(str(tmp_path / "video.mp4")) as container:
        decoded = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])
    assert decoded.shape == (5, 16, 24, 3)
    assert np.abs(decoded.mean((1, 2, 3)) / 255 - frames.mean((1, 2, 3))).max() < 0.05


@pytest.mark.parametrize("saved", [False, True])
def test_options_of_loading(pipeline: PVDMPipeline, tmp_path: Path, saved: bool) -> None:
    """A run's folder takes diffusers' options like a saved pipeline, or says which one it doesn't take."""
    if saved:
        pipeline.save_pretrained(tmp_path)
    else:
        pipeline.autoencoder.save_pretrained(tmp_path / "autoencoder")
        pipeline.denoiser.save_pretrained(tmp_path / "denoiser")
    for options in ({"dtype": torch.bfloat16}, {"torch_dtype": torch.bfloat16}):
        assert PVDMPipeline.from_pretrained(tmp_path, **options).denoiser.dtype == torch.bfloat16
    assert PVDMPipeline.from_pretrained(tmp_path, local_files_only=True, use_safetensors=True).dtype == torch.float32
    if not saved:
        with pytest.raises(UserError, match="a run's folder is loaded without device_map"):
            PVDMPipeline.from_pretrained(tmp_path, device_map="balanced")
        with pytest.raises(UserError, match="torch_dtype must be one of PyTorch's floating dtypes"):
            PVDMPipeline.from_pretrained(tmp_path, dtype="half")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_inference_steps": 0}, "steps must be at least 1, not 0"),
        ({"num_inference_steps": 1001}, "steps must be at most 1000, not 1001"),
        ({"batch_size": 0}, "at least 1"),
        ({"num_frames": 0}, "at least 1"),
        ({"eta": float("nan")}, "eta must be a finite number"),
        ({"guidance_scale": float("nan")}, "guidance must be a finite number"),
        ({"guidance_scale": float("inf")}, "guidance must be a finite number"),
    ],
)
def test_numbers_out_of_range(pipeline: PVDMPipeline, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        pipeline(**options)


@pytest.mark.parametrize("kind", [PVDMPipeline, Autoencoder, Denoiser])
def test_a_misspelt_folder_says_so_and_asks_no_hub(kind: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def asked(*arguments: Any, **options: Any) -> None:
        pytest.fail("a hub was asked")

    monkeypatch.setattr("socket.socket.connect", asked)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "mine").mkdir(parents=True)
    with pytest.raises(UserError, match="there is no folder runs/mime; did you mean 'mine'"):
        kind.from_pretrained("runs/mime", torch_dtype=torch.bfloat16, local_files_only=True)
    with pytest.raises(UserError, match=r"fetched first, by huggingface_hub.snapshot_download\('somebody/model'\)"):
        kind.from_pretrained("somebody/model")


def test_a_folder_without_models(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no trained autoencoder"):
        PVDMPipeline.from_pretrained(tmp_path)
