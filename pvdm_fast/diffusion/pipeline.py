"""Sampling as a diffusers pipeline: ``PVDMPipeline.from_pretrained(run)(num_frames=128).frames``."""

# No `from __future__ import annotations`: diffusers reads the types of the pipeline's parts from its signature.
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from diffusers import DiffusionPipeline, SchedulerMixin
from diffusers.utils import BaseOutput
from diffusers.video_processor import VideoProcessor
from torch import Tensor

from pvdm_fast.data.continuation import fit_clip, last_clip, only_one
from pvdm_fast.diffusion.sampling import NoiseSource, SamplingOptions, check_pair, fitting_steps, passes, sample_video
from pvdm_fast.diffusion.schedulers import scheduler_of
from pvdm_fast.errors import UserError
from pvdm_fast.models import Autoencoder, Denoiser
from pvdm_fast.models.release import is_saved, load_model
from pvdm_fast.models.saving import check_folder

MODELS = ("autoencoder", "denoiser")
NO_CLASS = "none"
# diffusers' loading options that change nothing if the files are on this machine, as safetensors.
DOWNLOADING = {"cache_dir", "force_download", "local_files_only", "proxies", "revision", "token"}
DOWNLOADING |= {"low_cpu_mem_usage", "use_safetensors"}


@dataclass
class PVDMPipelineOutput(BaseOutput):
    """frames: the videos, (B, T, H, W, 3) in [0, 1] ("np"), (B, T, 3, H, W) ("pt"), or B lists of PIL pictures."""

    frames: Any


class PVDMPipeline(DiffusionPipeline):
    """Samples videos of any length: unconditionally, of a class, or as the continuation of a video that you give.

    Args:
        autoencoder, denoiser: two models that were trained together.
        scheduler: from `pvdm_fast.diffusion.schedulers.scheduler_of`. Other diffusers schedulers work if they take what
            the denoiser predicts and don't need scaled latents, but they don't clamp the clean latents.

    Raises:
        UserError: the models don't belong together.
    """

    model_cpu_offload_seq = "denoiser->autoencoder"
    _callback_tensor_inputs = ("latents",)

    def __init__(self, autoencoder: Autoencoder, denoiser: Denoiser, scheduler: SchedulerMixin) -> None:
        super().__init__()
        check_pair(autoencoder, denoiser)
        self.register_modules(autoencoder=autoencoder.eval(), denoiser=denoiser.eval(), scheduler=scheduler)
        self.video_processor = VideoProcessor(vae_scale_factor=1)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **options: Any) -> "PVDMPipeline":
        """The pipeline of a run's folder, with the scheduler "auto", or one that was saved with ``save_pretrained``.

        No hub is asked. ``options`` are diffusers'. For a run's folder they are ``torch_dtype`` (or ``dtype``) and the
        parts, for example ``scheduler=``. Options about downloading change nothing there. Raises UserError if there is
        no such folder, if a run lacks a model, or for an option that a run's folder doesn't take.
        """
        folder = Path(pretrained_model_name_or_path)
        check_folder(pretrained_model_name_or_path)
        if (folder / "model_index.json").is_file():
            if "dtype" in options and _diffusers_version() < (0, 41):  # which passes over this name of it
                options["torch_dtype"] = options.pop("dtype")
            return super().from_pretrained(pretrained_model_name_or_path, **options)
        parts = {name: options.pop(name, None) for name in (*MODELS, "scheduler")}
        dtypes = _dtypes(options)
        models = [parts[name] or load_part(folder, name, dtypes[name]) for name in MODELS]
        scheduler = scheduler_of(models[1], parts["scheduler"] or "auto")
        return cls(autoencoder=models[0], denoiser=models[1], scheduler=scheduler)

    @torch.no_grad()
    def __call__(
        self,
        num_frames: int | None = None,
        num_inference_steps: int | None = None,
        *,
        batch_size: int = 1,
        condition: Any = None,
        class_labels: int | str | Sequence[int | str] | None = None,
        guidance_scale: float | None = None,
        eta: float = 1.0,
        generator: torch.Generator | list[torch.Generator] | None = None,
        output_type: str = "np",
        return_dict: bool = True,
        callback_on_step_end: Callable[..., dict[str, Any]] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
    ) -> PVDMPipelineOutput | tuple[Any]:
        """Sample videos.

        Args:
            num_frames: per video. The default is one clip of the model. Longer videos are made clip after clip.
            num_inference_steps: denoising steps per clip. None: the denoiser's own, or as many as it was distilled for,
                else 50.
            batch_size: number of videos.
            condition: the video to continue. Either the path of a video file or folder of frames, or a video as
                diffusers' pipelines take them: PIL pictures, numpy (T, H, W, 3) or torch (T, 3, H, W) in [0, 1], or
                ``batch_size`` of those. Its last T frames are used, cropped at the centre and resized.
            class_labels: number or name of a class, or one per video; "none" for no class. None: each class in turn, if
                the denoiser was trained with classes.
            guidance_scale: 1 + w of `pvdm_fast.diffusion.guidance.guided_prediction`. No guidance at 1 or less. None:
                the denoiser's own.
            eta: DDIM's share of new noise. 1 is the release's choice, 0 is deterministic.
            generator: the source of all noise, or a list with one per video. The default is seeded by PyTorch's own.
            output_type: "np", "pt" or "pil".
            return_dict: pass False for a tuple instead of the output object.
            callback_on_step_end: called as ``f(pipeline, step, timestep, {"latents": ...})``. If it returns a
                dictionary with latents, sampling continues with these. ``step`` counts through all clips of a video.
            callback_on_step_end_tensor_inputs: "latents", or nothing.

        Returns:
            `PVDMPipelineOutput`, or ``(frames,)``.

        Raises:
            UserError: an argument is out of range, or the condition can't be used.
        """
        if output_type not in ("np", "pt", "pil"):
            raise UserError(f'output_type must be "np", "pt" or "pil", not {output_type!r}')
        unknown = set(callback_on_step_end_tensor_inputs) - set(self._callback_tensor_inputs)
        if unknown:
            raise UserError(f"callbacks can be given {self._callback_tensor_inputs}, not {', '.join(sorted(unknown))}")
        if generator is None:
            generator = torch.Generator().manual_seed(int(torch.randint(2**62, ())))

        def on_step(step: int, timestep: float, latents: Tensor) -> Tensor:
            bar.update()
            if callback_on_step_end is None:
                return latents
            shown = {"latents": latents} if callback_on_step_end_tensor_inputs else {}
            return (callback_on_step_end(self, step, timestep, shown) or {}).get("latents", latents)

        # From here on, names are this package's, not diffusers'.
        options = SamplingOptions(
            clips=batch_size,
            frames=self.denoiser.layout.time if num_frames is None else num_frames,
            steps=num_inference_steps,
            scheduler=self.scheduler,
            guidance=None if guidance_scale is None else _weight(guidance_scale),
            eta=eta,
            seed=NoiseSource(generator),
            condition=None if condition is None else self._condition(condition),
            labels=None if class_labels is None else class_numbers(self.denoiser, class_labels, batch_size),
        )
        rounds = math.ceil(options.frames / self.denoiser.layout.time)
        steps = fitting_steps(self.denoiser, options.steps)
        with self.progress_bar(total=passes(self.scheduler, steps) * rounds) as bar:
            video = sample_video(self.autoencoder, self.denoiser, options, on_step=on_step)
        self.maybe_free_model_hooks()
        result = self.video_processor.postprocess_video(video, output_type)
        return PVDMPipelineOutput(frames=result) if return_dict else (result,)

    def _condition(self, condition: Any) -> Tensor:
        """The last frames of the given video, (B, 3, T, H, W) in [-1, 1]."""
        config = self.autoencoder.config
        size = {"height": config["height"], "width": config["width"]}
        if isinstance(condition, (str, Path)):
            return last_clip(condition, frames=config["frames"], **size)
        try:
            videos = self.video_processor.preprocess_video(condition)
        except (ValueError, TypeError, IndexError) as error:
            raise UserError(f"the condition is not a video: {error}") from error
        if videos.shape[2] == 1 < config["frames"]:
            raise UserError(f"the condition is {only_one(config['frames'])}")
        if videos.shape[2] < config["frames"]:
            raise UserError(
                f"the condition has {videos.shape[2]} frames, but the model's clip takes {config['frames']}"
            )
        if not bool((videos.abs() <= 1 + 1e-3).all()):
            raise UserError("the condition's colours must be in [0, 1], all finite: divide 8-bit values by 255")
        pixels = ((videos[:, :, -config["frames"] :] + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
        clips = [np.array(clip.permute(1, 2, 3, 0).cpu()) for clip in pixels]
        return torch.cat([fit_clip(list(clip), **size) for clip in clips])


def _diffusers_version() -> tuple[int, ...]:
    return tuple(int(part) for part in diffusers.__version__.split(".")[:2])


def _dtypes(options: dict[str, Any]) -> dict[str, torch.dtype]:
    """The dtype of each model of a run's folder, from diffusers' loading options. UserError for other options."""
    given = options.pop("torch_dtype", None)
    given = options.pop("dtype", given)
    unknown = sorted(options.keys() - DOWNLOADING)
    if unknown:
        raise UserError(
            f"a run's folder is loaded without {', '.join(unknown)}: save the pipeline with save_pretrained first, and "
            "load that"
        )
    by_name = given if isinstance(given, dict) else {"default": given}
    found = {name: by_name.get(name, by_name.get("default")) or torch.float32 for name in MODELS}
    for dtype in found.values():
        if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
            raise UserError(f"torch_dtype must be one of PyTorch's floating dtypes, not {dtype!r}")
    return found


def load_part(folder: Path, name: str, torch_dtype: torch.dtype = torch.float32) -> Any:
    """A run's "autoencoder" or "denoiser". Raises UserError if it is missing or damaged."""
    if not is_saved(folder / name):
        raise UserError(f"there is no trained {name} in {folder / name}: train it, or finish with --resume {folder}")
    kind: Any = {"autoencoder": Autoencoder, "denoiser": Denoiser}[name]
    return load_model(kind, folder / name, torch_dtype)


def _weight(guidance_scale: float) -> float:
    return max(0.0, guidance_scale - 1) if math.isfinite(guidance_scale) else guidance_scale


def class_numbers(denoiser: Denoiser, classes: int | str | Sequence[int | str], clips: int) -> Tensor:
    """Class numbers (clips,) int64, from one class for all clips or one per clip. "none" is the number of no class.
    Raises UserError for unknown classes."""
    count, names = denoiser.config["num_classes"], list(denoiser.config["class_names"] or ())
    if count is None:
        raise UserError(
            "this model was trained without classes: leave the class out, or train with --diffusion-class-conditional"
        )
    given = [classes] * clips if isinstance(classes, (int, str)) else list(classes)
    numbers = []
    for item in given:
        number = names.index(item) if item in names else item
        if isinstance(number, str) and number.isdecimal():
            number = int(number)
        if number == NO_CLASS:
            number = count
        elif not isinstance(number, int) or not 0 <= number < count:
            known = f", and its names are {', '.join(names[:5])}{', ...' if len(names) > 5 else ''}" if names else ""
            raise UserError(f"there is no class {item!r}: its number is below {count}{known}")
        numbers.append(number)
    if len(numbers) != clips:
        raise UserError(f"there are {len(numbers)} classes for {clips} videos: give one, or one for each")
    return torch.tensor(numbers)
