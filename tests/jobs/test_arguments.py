"""What every command line says of a mistake: what is meant by other programs' names, choices, and missing values."""

from __future__ import annotations

import re
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from pvdm_fast import convert, distill, encode, estimate, evaluate, sample
from pvdm_fast.errors import UserError
from pvdm_fast.jobs.arguments import SYNONYMS, did_you_mean
from pvdm_fast.training.config import OPTIONS, flatten
from pvdm_fast.training.options import make_parser as train_parser

PARSERS: dict[str, Callable[[], Any]] = {
    "convert": convert.make_parser,
    "distill": distill.make_parser,
    "encode": encode.make_parser,
    "estimate": estimate.make_parser,
    "evaluate": evaluate.make_parser,
    "sample": sample.make_parser,
    "train": train_parser,
}


def options_of(name: str) -> list[str]:
    return [text for action in PARSERS[name]()._actions for text in action.option_strings]


@pytest.mark.parametrize(
    ("command", "word", "expected"),
    [
        (
            "train",
            "--lr",
            "'--autoencoder-learning-rate' or '--adversarial-learning-rate' or '--diffusion-learning-rate'",
        ),
        ("train", "--epochs", "'--autoencoder-steps' or '--diffusion-steps'"),
        ("train", "--batch", "'--autoencoder-batch-size' or '--diffusion-batch-size'"),
        ("train", "--gpu", "'--device'"),
        ("train", "--bf16", "'--mixed-precision'"),
        ("train", "--pretrained", "'--init-from'"),
        ("train", "--resolution", "'--height' or '--width'"),
        ("sample", "--num", "'--clips'"),
        ("sample", "--num_frames", "'--frames'"),
        ("sample", "--num-inference-steps", "'--steps'"),
        ("sample", "--fp16", "'--dtype'"),
        ("sample", "--cfg", "'--guidance'"),
        ("sample", "--output", "'--out'"),
        ("evaluate", "--num", "'--clips'"),
        ("encode", "--batch", "'--batch-size'"),
        ("estimate", "--batch", "'--batch-size'"),
        ("train", "--autoencoder-step", "'--autoencoder-steps'"),
    ],
)
def test_other_programs_names_are_known(command: str, word: str, expected: str) -> None:
    parser = PARSERS[command]()
    needed = {"sample": ["run"], "evaluate": ["run"], "encode": ["a", "b", "--autoencoder", "c"]}.get(command, [])
    with pytest.raises(UserError) as error:
        parser.parse_args([*needed, word, "3"])
    assert str(error.value) == f"there is no option {word}; did you mean {expected}?"


def test_every_synonym_leads_to_an_option() -> None:
    known = {re.sub("^--(autoencoder-|diffusion-)?", "", name) for command in PARSERS for name in options_of(command)}
    for word, ends in SYNONYMS.items():
        assert set(ends) <= known, word
        assert word not in {name for name in known if name in ends}


def test_config_files_know_them_too() -> None:
    with pytest.raises(UserError, match=r"no option 'autoencoder.lr'; did you mean 'autoencoder.learning_rate'\?"):
        flatten({"autoencoder": {"lr": 1e-4}}, "file.yaml")
    assert did_you_mean("lr", OPTIONS).count("learning_rate") == 3
    assert did_you_mean("zzzz", OPTIONS) == ""


@pytest.mark.parametrize("command", ["sample", "distill", "encode", "evaluate", "train"])
def test_devices_have_the_same_names(command: str) -> None:
    (action,) = [item for item in PARSERS[command]()._actions if "--device" in item.option_strings]
    assert action.metavar == "{auto,cpu,cuda,cuda:N}"
    assert "cuda:1 the second one" in action.help


def test_steps_have_one_default() -> None:
    from pvdm_fast.diffusion.sampling import SamplingOptions, fitting_steps
    from pvdm_fast.evaluation.protocol import Request

    asked = sample.make_parser().parse_args(["run"]).steps
    assert asked == Request.__dataclass_fields__["steps"].default == SamplingOptions(clips=1, frames=1).steps
    assert asked is None, "the denoiser decides"
    for config, steps in (({}, 50), ({"sampling_steps": 7}, 7), ({"distilled_steps": 4}, 4)):
        assert fitting_steps(SimpleNamespace(config=config), asked) == steps  # type: ignore[arg-type]


def test_a_choice_and_a_missing_value() -> None:
    from pvdm_fast.jobs.arguments import Parser

    parser = Parser(prog="x")
    parser.add_argument("--size", "-s", choices=("small", "large"))
    parser.add_argument("--many", nargs="+")
    for arguments, message in (
        (["--size", "huge"], "--size must be one of small, large, not 'huge'"),
        (["--size"], "--size needs one value"),
        (["--many"], "--many needs at least one value"),
    ):
        with pytest.raises(UserError) as error:
            parser.parse_args(arguments)
        assert str(error.value) == message
