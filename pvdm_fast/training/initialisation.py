"""Trained weights to start from (`--init-from`): which models there are, what fits, and positions of another size."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

from pvdm_fast.errors import UserError
from pvdm_fast.jobs.files import expect_folder
from pvdm_fast.jobs.reading import UnreadableFile, read_json_object
from pvdm_fast.layout import PLANE_NAMES
from pvdm_fast.training.config import OPTIONS, STAGES, TrainConfig, get, given, make_config
from pvdm_fast.training.distilling import check_distillation
from pvdm_fast.training.options import flag
from pvdm_fast.training.presets import VIDEO_SIZES, autoencoder_sizes, denoiser_sizes

if TYPE_CHECKING:
    from pvdm_fast.models import Autoencoder, Denoiser

HEADS = {"autoencoder": "autoencoder.num_heads", "denoiser": "diffusion.num_heads"}
RELEASE_HEADS = 8


@dataclass(frozen=True)
class Source:
    """The trained models of a place; ``assumed``: what a checkpoint of the release doesn't tell, as text."""

    place: Path
    autoencoder: Autoencoder | None = None
    denoiser: Denoiser | None = None
    assumed: str = ""

    def sizes(self) -> dict[str, Any]:
        """The options that name the sizes of these models."""
        found: dict[str, Any] = {}
        if self.autoencoder is not None:
            found |= autoencoder_sizes(self.autoencoder.config)
        if self.denoiser is not None:
            found |= denoiser_sizes(self.denoiser.config)
        return found

    def of_stage(self, stage: str) -> Autoencoder | Denoiser | None:
        """The model that a stage trains."""
        return self.autoencoder if stage == "autoencoder" else self.denoiser


def read_source(place: Path, heads: Mapping[str, int | None], stage: str | None = None) -> Source:
    """The models of a run, of a model folder, or of a checkpoint of the authors' release.

    Args:
        heads: for a checkpoint: by option key, the number of attention heads, which its shapes don't tell.
        stage: of a run, read only the model that this stage trains. None: both.

    Raises:
        UserError: there is nothing of that kind, or it is damaged.
    """
    from pvdm_fast.models import Autoencoder, Denoiser
    from pvdm_fast.models.release import CONFIG, CONFIG_BYTES, load_model

    if place.is_file():
        return _read_checkpoint(place, heads)
    if (place / CONFIG).is_file():
        try:
            kind = read_json_object(place / CONFIG, CONFIG_BYTES).get("_class_name")
        except (OSError, UnreadableFile) as error:
            raise UserError(f"{place / CONFIG} can't be read: {getattr(error, 'strerror', None) or error}") from error
        if kind == "Autoencoder":
            return Source(place, autoencoder=load_model(Autoencoder, place))
        return Source(place, denoiser=load_model(Denoiser, place))
    kinds: dict[str, Any] = {"autoencoder": Autoencoder, "denoiser": Denoiser}
    names = [name for name in kinds if (place / name / CONFIG).is_file()]
    if not names:
        raise UserError(
            f"--init-from {place} is neither a run with a trained model, a model's folder, nor a checkpoint: "
            + ("finish a stage of the run first" if place.is_dir() else "there is nothing of that name")
        )
    wanted = {None: names, "autoencoder": ["autoencoder"], "diffusion": ["denoiser"]}[stage]
    return Source(place, **{name: load_model(kinds[name], place / name) for name in names if name in wanted})


def _read_checkpoint(place: Path, heads: Mapping[str, int | None]) -> Source:
    from pvdm_fast.models import Autoencoder
    from pvdm_fast.models.release import ReleaseState, load_release_autoencoder, load_release_denoiser

    state = ReleaseState(place)
    name = "autoencoder" if state.kind is Autoencoder else "denoiser"
    count = heads.get(HEADS[name])
    assumed = "" if count else f", with the release's {RELEASE_HEADS} attention heads ({flag(OPTIONS[HEADS[name]])})"
    load: Any = load_release_autoencoder if name == "autoencoder" else load_release_denoiser
    if name == "denoiser" and "zeros" in state.tensors:
        del state.tensors["zeros"], state.original_names["zeros"]  # of a layout that the new run need not have
    return Source(place, assumed=assumed, **{name: load(state, num_heads=count or RELEASE_HEADS)})


def initial_config(changes: Mapping[str, Any]) -> tuple[TrainConfig, Source | None]:
    """The configuration of a new run, and what it starts from. Sizes are those of these models, then the preset's.

    Raises:
        UserError: a value is wrong, or an option asks for another size than those models have.
    """
    changes = given(changes)
    config = make_config(changes)
    source, sizes, own_place = None, {}, changes.get("autoencoder_from")
    if config.init_from is not None:
        heads = {key: get(config, key) if key in changes else None for key in HEADS.values()}
        source = read_source(Path(config.init_from), heads)
        check_used(source, config)
        if config.stage == "diffusion" and config.autoencoder_from is None and source.autoencoder is not None:
            changes["autoencoder_from"] = config.init_from
        sizes = source.sizes()
        _check_sizes(sizes, changes, source.place, () if config.stage == "diffusion" else VIDEO_SIZES)
    if config.stage == "diffusion" and own_place is not None:
        place = Path(own_place)
        own = autoencoder_sizes(find_autoencoder(place).config)
        _check_sizes(own, changes, place, ())
        sizes |= own
    config = make_config({**sizes, **changes})
    if source is not None and source.denoiser is not None:
        have, want = source.denoiser.config["latent_channels"], config.autoencoder.latent_channels
        if have != want:
            raise UserError(
                f"the denoiser in {source.place} was made for latents of {have} channels, but the autoencoder's have "
                f"{want}: choose --autoencoder-latent-channels {have}, or another --init-from"
            )
    check_distillation(config, None if source is None else source.denoiser)
    return config, source


def find_autoencoder(place: Path, option: str = "--autoencoder-from") -> Autoencoder:
    """The autoencoder of a run, or of its own folder; raises UserError, which names ``option``, where there is none."""
    from pvdm_fast.models import Autoencoder
    from pvdm_fast.models.release import is_saved, load_model

    expect_folder(place)
    path = place / "autoencoder" if (place / "autoencoder").is_dir() else place
    if not is_saved(path):
        raise UserError(f"there is no autoencoder in {path}: train one first, or name one with {option}")
    return load_model(Autoencoder, path)


def find_denoiser(folder: Path) -> Denoiser:
    """The denoiser in a folder of its own; raises UserError where there is none."""
    from pvdm_fast.models import Denoiser
    from pvdm_fast.models.release import is_saved, load_model

    if not is_saved(folder):
        raise UserError(f"there is no denoiser in {folder}: put it back, or start a new run")
    return load_model(Denoiser, folder)


def check_used(source: Source, config: TrainConfig) -> None:
    """Raises UserError where no stage trains any of the models."""
    stages = STAGES if config.stage == "all" else (config.stage,)
    if all(source.of_stage(stage) is None for stage in stages):
        held = "a denoiser" if source.autoencoder is None else "an autoencoder"
        remedy = "name it with --autoencoder-from" if config.stage == "diffusion" else "choose --stage diffusion"
        raise UserError(
            f"--init-from {source.place} holds {held} only, which --stage {config.stage} doesn't train: {remedy}"
        )


def _check_sizes(sizes: Mapping[str, Any], changes: Mapping[str, Any], place: Path, free: tuple[str, ...]) -> None:
    """Raises UserError for an option that differs from the trained models and isn't ``free``."""
    wanted = make_config(changes)
    have = make_config(sizes)
    for key in sizes:
        want, there = get(wanted, key), get(have, key)
        same = sorted(want) == sorted(there) if key == "diffusion.attention_resolutions" else want == there
        if key in changes and key not in free and not same:
            remedy = "leave it out" if key not in VIDEO_SIZES else "leave it out, or train the autoencoder too"
            raise UserError(
                f"{flag(OPTIONS[key])} is {want}, but the models in {place} were made with {there}: {remedy}"
            )


def differences(model: Autoencoder | Denoiser, trained: Autoencoder | Denoiser) -> str:
    """What `initialise` will not just copy, as text; "" where there is nothing."""
    parts = []
    here, there = model.layout, trained.layout
    if here != there and trained.config.get("positions", True):  # the autoencoder always has them
        sizes = [f"{item.time} x {item.height} x {item.width}" for item in (there, here)]
        parts.append(f"positions interpolated from {sizes[0]} to {sizes[1]}")
    if "num_classes" in model.config:
        parts += _class_note(model, trained)
    return ", ".join(parts)


def _class_note(model: Any, trained: Any) -> list[str]:
    before, now = trained.config["num_classes"], model.config["num_classes"]
    if before == now is None:
        return []
    if now is None:
        return ["its classes left out"]
    kept = len(_shared_classes(model, trained))
    return [f"{kept} of {now} classes known"]


def initialise(model: Autoencoder | Denoiser, trained: Autoencoder | Denoiser) -> None:
    """Copy trained weights into a model that differs from it in its layout and its classes at most.

    Positions of another length are interpolated linearly between the same ends; the autoencoder's last one, the
    appended token's, stays. A class is known by its name; a new one begins as no class. Without classes, what no class
    added to the embedding of the time stays in its bias. The statistics of the latents are the trained ones.
    """
    state = dict(trained.state_dict())
    own = model.state_dict()
    buffers = {name for name, _ in model.named_buffers()}
    for plane in PLANE_NAMES:
        name = f"{plane}_pos_embedding"
        if name in own:
            places, token = state[name][0, :-1], state[name][:, -1:]
            state[name] = torch.cat([interpolated(places, own[name].shape[1] - 1)[None], token], dim=1)
    for axis in ("time", "height", "width"):
        name = f"position_vectors.{axis}"
        if name in own:
            state[name] = interpolated(state[name], own[name].shape[0])
    embedding = state.pop("class_embed.weight", None)
    if "class_embed.weight" in own:
        state["class_embed.weight"] = _class_rows(model, trained, embedding)
    elif embedding is not None:
        state["time_embed.2.bias"] = state["time_embed.2.bias"] + embedding[-1]
    state = {name: own[name] if name in buffers else tensor for name, tensor in state.items()}
    model.load_state_dict(state, strict=True)
    if trained.config.get("latent_mean") is not None:  # what its weights were trained on
        model.register_to_config(**{name: trained.config[name] for name in ("latent_mean", "latent_std")})


def interpolated(positions: Tensor, length: int) -> Tensor:
    """Positions (L, C) at ``length`` places between the same ends."""
    if len(positions) == length:
        return positions
    return F.interpolate(positions.t()[None], size=length, mode="linear", align_corners=True)[0].t()


def _shared_classes(model: Any, trained: Any) -> dict[int, int]:
    """Numbers of classes in the model: in the trained one. Without names they are the same where there are as many."""
    before, now = trained.config["class_names"], model.config["class_names"]
    if trained.config["num_classes"] is None:
        return {}
    if before is None or now is None:
        same = trained.config["num_classes"] == model.config["num_classes"]
        return {number: number for number in range(model.config["num_classes"])} if same else {}
    return {number: list(before).index(name) for number, name in enumerate(now) if name in before}


def _class_rows(model: Any, trained: Any, embedding: Tensor | None) -> Tensor:
    """The class embedding (classes + 1, width) of the model; the last row is that of no class."""
    count, width = model.config["num_classes"] + 1, model.class_embed.weight.shape[1]
    if embedding is None:
        return torch.zeros(count, width)
    rows = embedding[-1].repeat(count, 1)
    for here, there in _shared_classes(model, trained).items():
        rows[here] = embedding[there]
    return rows
