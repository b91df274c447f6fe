"""`python -m pvdm_fast.convert AE.pth UNET.pth RUN`: the authors' checkpoints become a run's folder, and back."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pvdm_fast.errors import UserError, printable
from pvdm_fast.jobs import numbers
from pvdm_fast.jobs.arguments import Parser
from pvdm_fast.jobs.command import run_command

if TYPE_CHECKING:
    from torch import Tensor

    from pvdm_fast.layout import TriplaneLayout
    from pvdm_fast.models import Autoencoder, Denoiser
    from pvdm_fast.models.release import ReleaseState

FORM = "release.json"  # beside a converted model: where it came from, what was assumed, how to write it back
FORM_BYTES = 1 << 20
NUM_HEADS = 8
SIZES = {"frames": 16, "height": 256, "width": 256, "patch_size": 8}
PREFIX = "diffusion_model."  # of the release's denoisers


def make_parser() -> Parser:
    parser = Parser(
        prog="python -m pvdm_fast.convert",
        usage="%(prog)s [options] AE.pth UNET.pth RUN | IN.pth MODEL_FOLDER | --back RUN AE.pth UNET.pth | "
        "--back MODEL_FOLDER OUT.pth",
        description="Converts checkpoints of the PVDM authors' release. Two of them, the autoencoder's and the "
        "denoiser's, become a run's folder for sample, evaluate and train --init-from; a single one becomes a model's "
        "folder for from_pretrained. Which is which follows from the tensors. --back writes the release's files. What "
        "exists is never written over.",
        epilog="The tensors' shapes tell all sizes but those below. Each default is the release's, is said, and is "
        f"noted in {FORM} of the model's folder.",
    )
    add = parser.add_argument
    add("paths", nargs="+", type=Path, metavar="PATH", help="the files to read, then what to write")
    add("--back", action="store_true", help="from a run or a model's folder to files in the release's form")
    heads, sizes = "attention heads of the {}, which the shapes don't tell (default: 8)", "of a denoiser alone: "
    add("--autoencoder-num-heads", type=numbers.HEADS, metavar="N", help=heads.format("autoencoder"))
    add("--diffusion-num-heads", type=numbers.HEADS, metavar="N", help=heads.format("denoiser"))
    text = "channels of each of its heads, in place of their number"
    add("--diffusion-num-head-channels", type=numbers.HEADS, metavar="N", help=text)
    add("--frames", type=numbers.CLIP_FRAMES, metavar="N", help=f"{sizes}frames of a clip (default: 16)")
    add("--height", type=numbers.SIDE, metavar="N", help=f"{sizes}height of a frame in pixels (default: 256)")
    add("--width", type=numbers.SIDE, metavar="N", help=f"{sizes}width of a frame in pixels (default: 256)")
    text = f"{sizes}pixels along a side of a latent position (default: 8)"
    add("--patch-size", type=numbers.whole(1, 1024), metavar="N", help=text)
    return parser


def convert(options: argparse.Namespace) -> None:
    """Read one or two checkpoints of the release, and write a model's or a run's folder.

    Raises:
        UserError: an option or a file doesn't fit, or the folder exists.
    """
    from pvdm_fast.jobs.files import whole_folder
    from pvdm_fast.models import Autoencoder, Denoiser
    from pvdm_fast.models.release import ReleaseState

    *sources, target = options.paths
    check_unused(target)
    states = {path: ReleaseState(path) for path in sources}
    kinds = {state.kind: path for path, state in states.items()}
    if len(kinds) < len(sources):
        (kind,) = kinds
        raise UserError(f"{sources[0]} and {sources[-1]} are both of a {kind.__name__}: name one of each network")
    check_options(options, alone=kinds.keys() == {Denoiser}, denoiser=Denoiser in kinds)
    made: dict[str, tuple[Any, dict[str, Any]]] = {}
    layout = None
    for kind, name in ((Autoencoder, "autoencoder"), (Denoiser, "denoiser")):
        if kind in kinds:
            path = kinds[kind]
            made[name] = load(path, states.pop(path), options, layout)
            layout = made[name][0].layout
    if len(made) == 2:
        from pvdm_fast.diffusion.sampling import check_pair

        check_pair(made["autoencoder"][0], made["denoiser"][0])
    try:
        with whole_folder(target) as temporary:
            for name, (model, form) in made.items():
                save(model, form, temporary / name if len(made) == 2 else temporary)
    except OSError as error:
        raise UserError(f"cannot write {target}: {error.strerror or error}") from error
    if len(made) == 2:
        print(printable(f"written to {target}; sample with: python -m pvdm_fast.sample {target}"))
    else:
        print(printable(f"written to {target}"))


def check_options(options: argparse.Namespace, *, alone: bool, denoiser: bool) -> None:
    """Raises UserError for options that this conversion would not use.

    Args:
        denoiser: whether there is one. alone: whether it comes without an autoencoder.
    """
    if not denoiser:
        unused = [name for name in ("diffusion_num_heads", "diffusion_num_head_channels") if getattr(options, name)]
    else:
        unused = ["autoencoder_num_heads"] if alone and options.autoencoder_num_heads else []
    if not alone:
        unused += [name for name in SIZES if getattr(options, name)]
    if unused:
        known = "the autoencoder's tensors tell it" if unused[0] in SIZES else "there is no such network in the files"
        raise UserError(f"--{unused[0].replace('_', '-')} has nothing to say here, since {known}: leave it out")
    if options.diffusion_num_heads and options.diffusion_num_head_channels:
        raise UserError("--diffusion-num-heads and --diffusion-num-head-channels say the same: give one of them")


def check_unused(path: Path) -> None:
    """Raises UserError for a place that holds something."""
    if path.is_symlink() or path.is_file() or (path.is_dir() and any(path.iterdir())) or path.is_fifo():
        raise UserError(f"{path} already exists: name another place, or remove it first")


def load(
    path: Path, state: ReleaseState, options: argparse.Namespace, layout: TriplaneLayout | None
) -> tuple[Autoencoder | Denoiser, dict[str, Any]]:
    """A model of a checkpoint, and what its folder will note of it; says what was assumed."""
    from pvdm_fast.jobs.checksums import sha256
    from pvdm_fast.models import Autoencoder
    from pvdm_fast.models.noise_schedule import BETA_END, BETA_START, TRAIN_STEPS
    from pvdm_fast.models.release import load_release_autoencoder, load_release_denoiser

    assumed: dict[str, Any] = {}

    def asked(name: str, default: int) -> int:
        if getattr(options, name) is None:
            assumed[name] = default
        return int(getattr(options, name) or default)

    model: Autoencoder | Denoiser
    if state.kind is Autoencoder:
        model = load_release_autoencoder(state, num_heads=asked("autoencoder_num_heads", NUM_HEADS))
        size = "{frames} frames of {height}x{width}".format(**model.config)
    else:
        channels = options.diffusion_num_head_channels
        heads = NUM_HEADS if channels else asked("diffusion_num_heads", NUM_HEADS)
        layout = layout or make_layout({name: asked(name, default) for name, default in SIZES.items()})
        model = load_release_denoiser(state, layout=layout, num_heads=heads, num_head_channels=channels)
        assumed["betas"] = [BETA_START, BETA_END, TRAIN_STEPS]
        size = f"latents of {layout.time} x {layout.height} x {layout.width}"
    millions = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    entry = f" ({state.entry} in it)" if state.entry else ""
    print(printable(f"{type(model).__name__}, {millions:.1f} M parameters, {size}, from {path}{entry}"))
    said = [f"--{name.replace('_', '-')} {value}" for name, value in assumed.items() if name != "betas"]
    if "betas" in assumed:
        said.append("betas from {} to {} in {} steps (others can't be sampled)".format(*assumed["betas"]))
    if said:
        print(f"  assumed, as in the release, since the shapes don't tell: {', '.join(said)}")
    form = {"file": path.name, "sha256": sha256(path), "entry": state.entry, "assumed": assumed}
    return model, {**form, "names": model.release_form}


def make_layout(sizes: dict[str, int]) -> TriplaneLayout:
    """The latent's layout; raises UserError where the patches don't divide a frame."""
    from pvdm_fast.layout import TriplaneLayout

    patch = sizes["patch_size"]
    for name in ("height", "width"):
        if sizes[name] % patch:
            raise UserError(f"--{name} {sizes[name]} is not divisible by --patch-size {patch}")
    return TriplaneLayout(sizes["frames"], sizes["height"] // patch, sizes["width"] // patch)


def save(model: Autoencoder | Denoiser, form: dict[str, Any], folder: Path) -> None:
    from pvdm_fast.jobs.checksums import write_checksums

    model.save_pretrained(folder)
    (folder / FORM).write_text(json.dumps(form, indent=1) + "\n", encoding="utf-8")
    write_checksums(folder)


def convert_back(options: argparse.Namespace) -> None:
    """Write the models of a folder as files in the release's form.

    Raises:
        UserError: an option or a folder doesn't fit, the release has no such model, or a file exists.
    """
    import torch

    from pvdm_fast.jobs.files import whole_file

    source, *targets = options.paths
    given = [name for name in vars(options) if name not in ("paths", "back") and getattr(options, name) is not None]
    if given:
        raise UserError(f"--{given[0].replace('_', '-')} doesn't go with --back: the folder says it")
    folders = [source] if (source / "config.json").is_file() else [source / "autoencoder", source / "denoiser"]
    if not all((folder / "config.json").is_file() for folder in folders):
        raise UserError(f"{source} is neither a model's folder nor a run with autoencoder/ and denoiser/")
    if len(targets) != len(folders):
        places = "one file, for its model" if len(folders) == 1 else "two files, the autoencoder's and the denoiser's"
        raise UserError(f"{source} goes back to {places}, but {len(targets)} were named")
    for target in targets:
        check_unused(target)
    for folder, target in zip(folders, targets, strict=True):
        state = release_state(folder)
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            with whole_file(target) as temporary:
                torch.save(state, temporary)
        except OSError as error:
            raise UserError(f"cannot write {target}: {error.strerror or error}") from error
        print(printable(f"{folder} written to {target}, {len(state)} tensors, the first of them {next(iter(state))}"))


def release_state(folder: Path) -> dict[str, Tensor]:
    """The release's state dict of a model's folder: as it came where it was converted from one, else by the release's
    own names in float32; raises UserError where the folder or its note is damaged."""
    from pvdm_fast.jobs.reading import UnreadableFile, read_json_object
    from pvdm_fast.models import Autoencoder, Denoiser
    from pvdm_fast.models.release import CONFIG, CONFIG_BYTES, load_model, to_release

    try:
        kind = read_json_object(folder / CONFIG, CONFIG_BYTES).get("_class_name")
        form = read_json_object(folder / FORM, FORM_BYTES).get("names") if (folder / FORM).exists() else None
    except (OSError, UnreadableFile) as error:
        raise UserError(f"{folder} can't be read: {getattr(error, 'strerror', None) or error}") from error
    loader: Any = Autoencoder if kind == "Autoencoder" else Denoiser
    model = load_model(loader, folder)
    names = model.state_dict().keys()
    if form is None:
        prefix = "" if kind == "Autoencoder" else PREFIX
        form = {name: (prefix + name, "float32") for name in names}
    elif not is_form(form) or not form.keys() <= names:
        raise UserError(f"{folder / FORM} is damaged: remove it, and the names are the release's own")
    model.release_form = form
    return to_release(model)


def is_form(form: Any) -> bool:
    """Whether this is {our name: [the release's, dtype]}."""
    dtypes = ("float64", "float32", "float16", "bfloat16")
    return isinstance(form, dict) and all(
        isinstance(pair, list) and len(pair) == 2 and isinstance(pair[0], str) and pair[1] in dtypes
        for pair in form.values()
    )


def run(arguments: Sequence[str] | None = None) -> None:
    """Parse, convert, say what was done."""
    options = make_parser().parse_args(arguments)
    if not 2 <= len(options.paths) <= 3:
        raise UserError(
            "name AE.pth UNET.pth RUN (or IN.pth MODEL_FOLDER; with --back RUN AE.pth UNET.pth), "
            f"not {len(options.paths)} paths"
        )
    from pvdm_fast.jobs.environment import plain_torch

    with plain_torch():
        (convert_back if options.back else convert)(options)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    return run_command(lambda: run(arguments))


if __name__ == "__main__":
    sys.exit(main())
