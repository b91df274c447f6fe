"""Named sizes of the two networks. `base` is the release's; `tiny` was chosen by measuring on a 2-core CPU.

Training presets (`pvdm_fast.training.presets`) have the same sizes, but for what their recipes change: what the
denoiser predicts, and the latent channels of `tiny`.
"""

from __future__ import annotations

from typing import Any

AUTOENCODER: dict[str, dict[str, Any]] = {
    "tiny": dict(
        frames=8, height=32, width=32, patch_size=4, channels=64, depth=1, num_heads=4, head_dim=16,
        latent_channels=4, projection_depth=1, projection_hidden=128,
    ),
    "small": dict(
        frames=16, height=64, width=64, patch_size=4, channels=192, depth=4, num_heads=6, head_dim=32,
        latent_channels=4, projection_depth=4, projection_hidden=512,
    ),
    "base": dict(
        frames=16, height=256, width=256, patch_size=8, channels=384, depth=8, num_heads=8, head_dim=64,
        latent_channels=4, projection_depth=4, projection_hidden=512,
    ),
}  # fmt: skip

DENOISER: dict[str, dict[str, Any]] = {
    "tiny": dict(
        time=8, height=8, width=8, latent_channels=4, model_channels=64, channel_mult=[1], num_res_blocks=1,
        attention_resolutions=[], num_heads=4, positions=True, prediction="v",
    ),
    "small": dict(
        time=16, height=16, width=16, model_channels=128, channel_mult=[1, 2, 3], num_res_blocks=2,
        attention_resolutions=[4, 2], num_heads=8, positions=False, prediction="noise",
    ),
    "base": dict(
        time=16, height=32, width=32, model_channels=256, channel_mult=[1, 2, 4, 4], num_res_blocks=2,
        attention_resolutions=[4, 2, 1], num_heads=8, positions=False, prediction="noise",
    ),
}  # fmt: skip


def preset(table: dict[str, dict[str, Any]], name: str, overrides: dict[str, Any]) -> dict[str, Any]:
    """The preset's values with `overrides` on top.

    Raises:
        ValueError: there is no such preset.
    """
    if name not in table:
        raise ValueError(f"There is no preset {name!r}: choose one of {', '.join(table)}.")
    return {**table[name], **overrides}
