"""The parser of every command line: a mistake gives one sentence, and every number has a range."""

from __future__ import annotations

import argparse
import difflib
import re
from collections.abc import Iterable
from typing import Any, NoReturn

from pvdm_fast.errors import UserError
from pvdm_fast.jobs.devices import DeviceName
from pvdm_fast.jobs.numbers import Number, WrongNumber

THREADS_HELP = "CPU threads (default: as many as are quickest, found by the job's pace, unless OMP_NUM_THREADS is set)"

# What other programs call an option: the names that ours have, without a stage's before them.
SYNONYMS = {
    "amp": ("mixed-precision", "dtype"),
    "autoencoder": ("from",),
    "batch": ("batch-size",),
    "bf16": ("mixed-precision", "dtype"),
    "bs": ("batch-size",),
    "cfg": ("guidance",),
    "cfg-scale": ("guidance",),
    "checkpoint": ("resume", "init-from"),
    "ckpt": ("resume", "init-from"),
    "cuda": ("device",),
    "dataset": ("data",),
    "ddim-steps": ("steps",),
    "ema": ("ema-decay",),
    "epochs": ("steps",),
    "finetune": ("init-from",),
    "force": ("overwrite",),
    "fp16": ("mixed-precision", "dtype"),
    "frame-rate": ("fps",),
    "gpu": ("device",),
    "grad-accum": ("accumulate",),
    "gradient-accumulation-steps": ("accumulate",),
    "gradient-checkpointing": ("checkpointing",),
    "guidance-scale": ("guidance",),
    "half": ("mixed-precision", "dtype"),
    "image-size": ("height", "width"),
    "init": ("init-from",),
    "iterations": ("steps",),
    "iters": ("steps",),
    "label": ("class",),
    "length": ("frames",),
    "load": ("init-from", "resume"),
    "lr": ("learning-rate",),
    "max-steps": ("steps",),
    "n": ("clips",),
    "n-samples": ("clips",),
    "name": ("run", "out"),
    "num": ("clips",),
    "num-clips": ("clips",),
    "num-epochs": ("steps",),
    "num-frames": ("frames",),
    "num-inference-steps": ("steps",),
    "num-samples": ("clips",),
    "num-videos": ("clips",),
    "num-workers": ("workers",),
    "output": ("out", "run"),
    "output-dir": ("out", "run"),
    "precision": ("mixed-precision", "dtype"),
    "pretrained": ("init-from",),
    "resolution": ("height", "width"),
    "sampler": ("scheduler",),
    "samples": ("clips",),
    "save-dir": ("run", "out"),
    "size": ("preset", "height", "width"),
    "videos": ("clips",),
    "wd": ("weight-decay",),
}


class Parser(argparse.ArgumentParser):
    """Argparse, with errors as one UserError sentence, a suggestion for a misspelt option, and no abbreviations: they
    would be other options once there are more."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**{"allow_abbrev": False, **settings})

    def error(self, message: str) -> NoReturn:
        unknown = re.fullmatch(r"unrecognized arguments: (.*)", message, re.DOTALL)
        choice = re.fullmatch(
            r"argument (\S+?)(?:/\S+)?: invalid choice: (.*) \(choose from (.*)\)", message, re.DOTALL
        )
        other = re.fullmatch(r"argument (\S+?)(?:/\S+)?: expected (.*)", message)
        if unknown:
            word = (unknown[1].split() or [""])[0].split("=")[0]
            known = [name for action in self._actions for name in action.option_strings]
            message = f"there is no option {word}{did_you_mean(word, known) or '; --help lists them all'}"
        elif choice:
            message = f"{choice[1]} must be one of {choice[3].replace(chr(39), '')}, not {choice[2]}"
        elif other:
            message = f"{other[1]} needs {other[2].replace('argument', 'value')}"
        raise UserError(message)

    def _get_value(self, action: argparse.Action, arg_string: str) -> Any:
        kind = self._registry_get("type", action.type, action.type)
        if not isinstance(kind, (Number, DeviceName)):
            return super()._get_value(action, arg_string)
        try:
            return kind(arg_string)
        except WrongNumber as error:
            raise UserError(f"{next(iter(action.option_strings), action.dest)} {error}") from None


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """A suggestion to end an error message with, or nothing: what other programs call so, else what is spelt alike.

    Args:
        word: an option as it was written, such as "--lr" or "autoencoder.lr".
        known: the options that there are, written in the same way.
    """
    names = list(known)
    group, plain = re.fullmatch(r"(.*\.|-*)(.*)", word.lower().replace("_", "-"), re.DOTALL).groups()  # type: ignore[union-attr]
    meant = [
        name
        for end in SYNONYMS.get(plain, ())
        for name in names
        if re.fullmatch(rf"(--)?((autoencoder|adversarial|diffusion|video)[-.])?{end}", name.replace("_", "-"))
        and name.startswith(group)
    ]
    near = meant or difflib.get_close_matches(word, names, n=1)
    return f"; did you mean {' or '.join(map(repr, near))}?" if near else ""
