"""The parser of every command line: its mistakes are one sentence, and every number in it has a range."""

from __future__ import annotations

import argparse
import difflib
import re
from collections.abc import Iterable
from typing import Any, NoReturn

from pvdm_fast.errors import UserError
from pvdm_fast.jobs.numbers import Number, WrongNumber

THREADS_HELP = "CPU threads (default: as many as are quickest, found by the job's pace, unless OMP_NUM_THREADS is set)"


class Parser(argparse.ArgumentParser):
    """Argparse, with errors as one UserError sentence and a suggestion for a misspelt option."""

    def error(self, message: str) -> NoReturn:
        unknown = re.fullmatch(r"unrecognized arguments: (.*)", message, re.DOTALL)
        if unknown:
            word = (unknown[1].split() or [""])[0].split("=")[0]
            suggestion = did_you_mean(word, [name for action in self._actions for name in action.option_strings])
            message = f"there is no option {word}{suggestion or '; --help lists them all'}"
        raise UserError(message)

    def _get_value(self, action: argparse.Action, arg_string: str) -> Any:
        kind = self._registry_get("type", action.type, action.type)
        if not isinstance(kind, Number):
            return super()._get_value(action, arg_string)
        try:
            return kind(arg_string)
        except WrongNumber as error:
            raise UserError(f"{next(iter(action.option_strings), action.dest)} {error}") from None


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """A suggestion to end an error message with, or nothing."""
    near = difflib.get_close_matches(word, list(known), n=1)
    return f"; did you mean {near[0]!r}?" if near else ""
