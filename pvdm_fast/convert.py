"""`python -m pvdm_fast.convert IN.pth OUT_DIR`: turns a checkpoint of the authors' release into a model folder."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from pvdm_fast.errors import UserError
from pvdm_fast.jobs import numbers
from pvdm_fast.jobs.arguments import Parser
from pvdm_fast.jobs.command import run_command


def make_parser() -> Parser:
    parser = Parser(
        prog="python -m pvdm_fast.convert",
        description="Convert an autoencoder or diffusion checkpoint of the PVDM authors' release to a folder that "
        "from_pretrained loads. Which of the two it is follows from its tensors.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("input", metavar="IN.pth", help="the release's checkpoint (a state dict)")
    parser.add_argument("output", metavar="OUT_DIR", help="folder to write config.json and the weights to")
    add = parser.add_argument
    add("--frames", type=numbers.CLIP_FRAMES, default=16, metavar="N", help="frames of a clip")
    add("--resolution", type=numbers.SIDE, default=256, metavar="N", help="height and width of the video in pixels")
    add(
        "--patch-size",
        type=numbers.whole(1, 1024),
        default=8,
        metavar="N",
        help="pixels a latent position (for a denoiser)",
    )
    add("--num-heads", type=numbers.HEADS, default=8, metavar="N", help="attention heads")
    return parser


def convert(source: str, output: str, *, frames: int, resolution: int, patch_size: int, num_heads: int) -> str:
    """Write the model of `source` to the folder `output`. Returns one line that says what it was."""
    from pvdm_fast.layout import TriplaneLayout
    from pvdm_fast.models import Autoencoder, Denoiser, release

    state = release.read_state_dict(source)
    model: Autoencoder | Denoiser
    if any("to_patch_embedding" in name for name in state):
        model = release.load_release_autoencoder(state, frames=frames, resolution=resolution, num_heads=num_heads)
    else:
        if resolution % patch_size:
            raise UserError(f"--resolution {resolution} is not divisible by --patch-size {patch_size}")
        side = resolution // patch_size
        model = release.load_release_denoiser(state, layout=TriplaneLayout(frames, side, side), num_heads=num_heads)
    model.save_pretrained(output)
    millions = sum(p.numel() for p in model.parameters()) / 1e6
    return f"{type(model).__name__}, {millions:.1f} M parameters, written to {output}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""

    def run() -> None:
        options = vars(make_parser().parse_args(arguments))
        print(convert(options.pop("input"), options.pop("output"), **options))

    return run_command(run)


if __name__ == "__main__":
    sys.exit(main())
