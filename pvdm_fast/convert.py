"""`python -m pvdm_fast.convert IN.pth OUT_DIR`: a checkpoint of the authors' release becomes a model folder."""

from __future__ import annotations

import argparse
import sys

from pvdm_fast.errors import UserError


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m pvdm_fast.convert",
        description="Convert an autoencoder or diffusion checkpoint of the PVDM authors' release to a folder that "
        "from_pretrained loads. Which of the two it is follows from its tensors.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("input", metavar="IN.pth", help="the release's checkpoint (a state dict)")
    parser.add_argument("output", metavar="OUT_DIR", help="folder to write config.json and the weights to")
    parser.add_argument("--frames", type=int, default=16, help="frames of a clip")
    parser.add_argument("--resolution", type=int, default=256, help="height and width of the video in pixels")
    parser.add_argument("--patch-size", type=int, default=8, help="pixels a latent position (for a denoiser)")
    parser.add_argument("--num-heads", type=int, default=8, help="attention heads")
    return parser


def convert(source: str, output: str, *, frames: int, resolution: int, patch_size: int, num_heads: int) -> str:
    """Write the model of `source` to the folder `output`; returns one line that says what it was."""
    from pvdm_fast.layout import TriplaneLayout
    from pvdm_fast.models import Autoencoder, Denoiser, release

    state = release.read_state_dict(source)
    model: Autoencoder | Denoiser
    if any("to_patch_embedding" in name for name in state):
        model = release.load_release_autoencoder(state, frames=frames, resolution=resolution, num_heads=num_heads)
    else:
        side = resolution // patch_size
        model = release.load_release_denoiser(state, layout=TriplaneLayout(frames, side, side), num_heads=num_heads)
    model.save_pretrained(output)
    millions = sum(p.numel() for p in model.parameters()) / 1e6
    return f"{type(model).__name__}, {millions:.1f} M parameters, written to {output}"


def main(arguments: list[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    try:
        print(
            convert(
                options.input,
                options.output,
                frames=options.frames,
                resolution=options.resolution,
                patch_size=options.patch_size,
                num_heads=options.num_heads,
            )
        )
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
