"""The command line of ``python -m pvdm_fast.train``, made from the configuration's dataclasses."""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from pvdm_fast.errors import UserError
from pvdm_fast.jobs.arguments import Parser
from pvdm_fast.training.config import (
    CLASS_GUIDANCE,
    GROUPS,
    OPTIONS,
    PRESETS,
    Option,
    TrainConfig,
    get,
    make_config,
    read_changes,
)

# Of options whose default follows from others.
DEFAULT_TEXTS = {
    "preset": "tiny",
    "diffusion.class_conditional": "on for rendered scenes, but not with the preset release",
    "diffusion.sampling_guidance": f"{CLASS_GUIDANCE:g} with classes, else 0",
}


@dataclass(frozen=True)
class Request:
    """What the command line asks for: the given options, and where the run is."""

    changes: dict[str, Any]
    run: Path | None
    resume: Path | None


def flag(option: Option) -> str:
    """``autoencoder.batch_size`` as ``--autoencoder-batch-size``. Video options have no prefix."""
    prefix = "" if option.group in ("", "video") else f"{option.group}-"
    return f"--{prefix}{option.name.replace('_', '-')}"


def _default_text(option: Option, presets: dict[str, TrainConfig]) -> str:
    values = {name: get(config, option.key) for name, config in presets.items()}
    if option.key in DEFAULT_TEXTS:
        return f"default: {DEFAULT_TEXTS[option.key]}"
    if all(value is None for value in values.values()):
        return "default: none"
    if len(set(map(str, values.values()))) == 1:
        return f"default: {_word(next(iter(values.values())))}"
    alike = groupby(values, lambda name: _word(values[name]))
    return "; ".join(f"{', '.join(names)}: {word}" for word, names in alike)


def _word(value: Any) -> str:
    if isinstance(value, tuple):
        return " ".join(map(str, value)) or "none"
    return {True: "on", False: "off"}[value] if isinstance(value, bool) else f"{value}"


def help_width() -> int:
    """Characters of a line of help: the terminal's, at most 110."""
    return min(110, shutil.get_terminal_size((110, 24)).columns - 2)


def make_parser() -> Parser:
    """The parser with one option for each hyper-parameter, in groups."""
    parser = Parser(
        prog="python -m pvdm_fast.train",
        usage="%(prog)s [options]",
        description="Trains PVDM: a video autoencoder, then a diffusion model of its latents. Without arguments it "
        "trains tiny models on made-up clips, in some minutes on two CPU cores.",
        epilog="Options on the command line go before those of the config file, and these before the preset's.",
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=34, width=help_width()),
    )
    presets = {name: make_config({"preset": name}) for name in PRESETS}
    run = parser.add_argument_group("the run")
    run.add_argument("--config", type=Path, metavar="FILE", help="a YAML file of options, such as a run's config.yaml")
    # torchrun takes --run anywhere for an abbreviation of its own --run-path
    text = "folder for the results (default: runs/DATE-TIME); after torchrun write --run-dir"
    run.add_argument("--run", "--run-dir", type=Path, metavar="DIR", help=text)
    text = "go on with a run that was interrupted, or whose steps you raise"
    run.add_argument("--resume", type=Path, metavar="RUN", help=text)
    groups = {"": run} | {
        name: parser.add_argument_group(str(owner.__doc__).strip(".").lower()) for name, owner in GROUPS.items()
    }
    for option in OPTIONS.values():
        text = f"{option.metadata['help']} ({_default_text(option, presets)})".replace("%", "%%")
        arguments: dict[str, Any] = {"dest": option.key, "default": argparse.SUPPRESS, "help": text}
        if option.kind is bool:
            arguments["action"] = argparse.BooleanOptionalAction
        elif get_origin(option.kind) is Literal:
            arguments["metavar"] = "{" + ",".join(get_args(option.kind)) + "}"
        elif get_origin(option.kind) is tuple:
            arguments.update(nargs="*", metavar="N")
        else:
            arguments["metavar"] = option.metadata["metavar"] or {int: "N", float: "X", str: "DIR"}[option.kind]
        groups[option.group].add_argument(flag(option), **arguments)
    return parser


def parse(arguments: Sequence[str] | None = None) -> Request:
    """Read the command line and the config file it names.

    Raises:
        UserError: an unknown option, a value of the wrong type or out of range, or an unreadable config file.
    """
    given = vars(make_parser().parse_args(arguments))
    config, run, resume = given.pop("config"), given.pop("run"), given.pop("resume")
    for key, value in given.items():
        try:
            given[key] = OPTIONS[key].convert(value)
        except UserError as error:
            raise UserError(str(error).replace(key, flag(OPTIONS[key]), 1)) from None
    if resume is not None and (run is not None or config is not None):
        raise UserError("--resume takes the folder and the configuration of the run: leave out --run and --config")
    changes = {**(read_changes(config) if config else {}), **given}
    return Request(changes, run, resume)
