"""The release's state dicts: in, out bit for bit, and everything that must be refused."""

from __future__ import annotations

import os
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from golden_tools import load_case
from torch import Tensor

from pvdm_fast import TriplaneLayout
from pvdm_fast.models import Autoencoder, Denoiser
from pvdm_fast.models.release import (
    CheckpointError,
    ReleaseState,
    load_release_autoencoder,
    load_release_denoiser,
    to_release,
)

LAYOUT = TriplaneLayout(16, 32, 32)
State = dict[str, Tensor]


def autoencoder_state() -> State:
    """With the buffers of the release's own state dict."""
    buffers = {
        "coords": torch.linspace(-1, 1, 16)[:, None],
        **{
            f"{half}.{name}": torch.rand(size)
            for half in ("encoder", "decoder")
            for name, size in (("frame_rot_emb.inv_freqs", 32), ("image_rot_emb.scales", 16))
        },
    }
    return load_case("autoencoder_small").parameters() | buffers


def denoiser_state() -> State:
    return load_case("unet_small").parameters() | {"zeros": torch.zeros(1, 4, 2048)}


def load_autoencoder(state: Any, **options: Any) -> Autoencoder:
    return load_release_autoencoder(state, **{"frames": 16, "resolution": 48, **options})


def load_denoiser(state: Any, **options: Any) -> Denoiser:
    return load_release_denoiser(state, **{"layout": LAYOUT, "num_heads": 4, **options})


KINDS: dict[str, tuple[Callable[[], State], Callable[..., Any]]] = {
    "autoencoder": (autoencoder_state, load_autoencoder),
    "denoiser": (denoiser_state, load_denoiser),
}
both = pytest.mark.parametrize("kind", KINDS)


@both
@pytest.mark.parametrize("prefix", ["", "module.", "module.diffusion_model."])
def test_there_and_back_bit_for_bit(kind: str, prefix: str, tmp_path: Path) -> None:
    make, load = KINDS[kind]
    state = {prefix + name: tensor for name, tensor in make().items()}
    torch.save(state, tmp_path / "model.pth")
    back = to_release(load(tmp_path / "model.pth"))
    assert back.keys() == state.keys()
    assert all(torch.equal(back[name], tensor) for name, tensor in state.items())


@both
def test_a_new_model_writes_all_that_the_release_expects(kind: str) -> None:
    make, _ = KINDS[kind]
    config = load_case("autoencoder_small" if kind == "autoencoder" else "unet_small").meta
    if kind == "autoencoder":
        model: Any = Autoencoder(height=config["ddconfig"]["resolution"], width=48, channels=64)
    else:
        keys = ("model_channels", "channel_mult", "num_res_blocks", "attention_resolutions", "num_heads")
        model = Denoiser(**{key: config["config"][key] for key in keys})
    written, expected = to_release(model), make()
    assert {name: t.shape for name, t in written.items()} == {name: t.shape for name, t in expected.items()}


def test_single_level_denoiser() -> None:
    model = Denoiser(time=2, height=3, width=5, model_channels=32, channel_mult=[1], num_res_blocks=2, num_heads=2)
    again = load_release_denoiser(to_release(model), layout=model.layout, num_heads=2)
    assert again.config.attention_resolutions == [1]
    assert (again.config.channel_mult, again.config.num_res_blocks) == ([1], 2)


@both
def test_missing_key(kind: str) -> None:
    make, load = KINDS[kind]
    state = make()
    name = next(n for n in state if n.endswith("norm.bias"))
    del state[name]
    with pytest.raises(CheckpointError, match=rf"missing: {re.escape(name)}"):
        load(state)


@both
def test_unknown_key(kind: str) -> None:
    make, load = KINDS[kind]
    with pytest.raises(CheckpointError, match=r"not known here: surplus.weight"):
        load(make() | {"surplus.weight": torch.zeros(3)})


def test_other_sizes_are_named() -> None:
    with pytest.raises(
        CheckpointError, match=r"of another shape: .*xt_pos_embedding \(file \(1, 7, 64\), model \(1, 33"
    ):
        load_autoencoder(autoencoder_state(), resolution=256)
    with pytest.raises(CheckpointError, match=r"zeros \(file \(1, 4, 2048\), model"):
        load_denoiser(denoiser_state(), layout=TriplaneLayout(8, 32, 32))


def test_the_other_kind() -> None:
    with pytest.raises(CheckpointError, match=r"lacks encoder.to_patch_embedding.weight.*begins with time_embed"):
        load_autoencoder(denoiser_state())
    with pytest.raises(CheckpointError, match=r"lacks input_blocks\.0\.0\.weight"):
        load_denoiser(autoencoder_state())


class Attack:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.target}",)


@both
def test_a_pickle_that_runs_code_is_refused(kind: str, tmp_path: Path) -> None:
    _, load = KINDS[kind]
    proof = tmp_path / "ran"
    for name, save in (("torch.pth", torch.save), ("plain.pth", lambda o, p: p.write_bytes(pickle.dumps(o)))):
        save({"weight": Attack(proof)}, tmp_path / name)
        with pytest.raises(CheckpointError, match=r"was refused|can't be read"):
            load(tmp_path / name)
    assert not proof.exists()


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", b"PK\x03\x04 cut off"])
def test_damaged_files(content: bytes, tmp_path: Path) -> None:
    for name in ("model.pth", "model.safetensors"):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(CheckpointError, match=name):
            load_denoiser(tmp_path / name)


def test_missing_file_and_wrong_content(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"is not a file"):
        load_denoiser(tmp_path / "nowhere.pth")
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(CheckpointError, match=r"doesn't hold a state dict"):
        load_denoiser(tmp_path / "list.pth")


@pytest.mark.parametrize("change", [{"positions": True}, {"prediction": "v"}, {"num_classes": 3}])
def test_what_the_release_does_not_have_is_refused(change: dict[str, Any]) -> None:
    model = Denoiser(time=2, height=2, width=2, model_channels=32, channel_mult=[1], num_heads=2, **change)
    with pytest.raises(CheckpointError, match="with learned positions, the prediction v or flow, or classes"):
        to_release(model)


@pytest.mark.slow
@pytest.mark.parametrize("entry", ["state_dict", "model", "ema"])
@both
def test_known_wrappers_are_opened(kind: str, entry: str) -> None:
    make, load = KINDS[kind]
    state = make()
    model = load({entry: {f"model.{name}": tensor for name, tensor in state.items()}, "step": 7})
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in state.items())


def test_averaged_weights_come_first() -> None:
    state = denoiser_state()
    model = load_denoiser({"model": state, "ema": {name: tensor + 1 for name, tensor in state.items()}})
    assert torch.equal(model.state_dict()["time_embed.0.bias"], state["time_embed.0.bias"] + 1)
    model = load_denoiser({"model": state, "ema": {"decay": 0.9999, "shadow_params": []}})
    assert torch.equal(model.state_dict()["time_embed.0.bias"], state["time_embed.0.bias"])


def test_what_was_found_is_named() -> None:
    with pytest.raises(CheckpointError, match=r"in one of ema, state_dict, model; found epoch, net\."):
        load_denoiser({"epoch": 3, "net": denoiser_state()})
    with pytest.raises(CheckpointError, match=r"neither network.*begins with a\.weight"):
        _ = ReleaseState({"a.weight": torch.zeros(2)}).kind
    with pytest.raises(CheckpointError, match=r"several models: .*begins with time_embed"):
        load_denoiser(
            {f"{prefix}{name}": tensor for prefix in ("", "model.") for name, tensor in denoiser_state().items()}
        )


@both
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_dtypes_come_back(kind: str, dtype: torch.dtype) -> None:
    make, load = KINDS[kind]
    state = {name: tensor.to(dtype if tensor.dim() > 1 else torch.float32) for name, tensor in make().items()}
    back = to_release(load(state))
    assert all(back[name].dtype == tensor.dtype and torch.equal(back[name], tensor) for name, tensor in state.items())


def test_sizes_follow_from_the_shapes() -> None:
    sizes = dict(frames=3, height=16, width=40, patch_size=8, channels=16, depth=1, num_heads=2, head_dim=8)
    model = load_release_autoencoder(to_release(Autoencoder(**sizes)), num_heads=2)
    assert {name: model.config[name] for name in sizes} == sizes


def test_heads() -> None:
    state = to_release(Denoiser(time=2, height=2, width=2, model_channels=32, channel_mult=[1, 1], num_heads=4))
    layout = TriplaneLayout(2, 2, 2)
    assert load_release_denoiser(state, layout=layout, num_head_channels=8).config.num_heads == 4
    with pytest.raises(CheckpointError, match="unequal numbers of heads"):
        load_release_denoiser(state, layout=layout, num_head_channels=5)
    with pytest.raises(CheckpointError, match="unequal numbers of heads"):
        load_denoiser(denoiser_state(), num_head_channels=8)
    with pytest.raises(CheckpointError, match="which 7 heads don't divide"):
        load_autoencoder(autoencoder_state(), num_heads=7)


def test_a_denoiser_without_a_condition_is_refused() -> None:
    state = denoiser_state()
    state["input_blocks.0.0.weight"] = state["input_blocks.0.0.weight"][:, :4]
    with pytest.raises(CheckpointError, match="trained with cond_model: False"):
        load_denoiser(state)
