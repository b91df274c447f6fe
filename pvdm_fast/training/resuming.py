"""Going on with a run: what may change, what is recorded of it, and stages that are given more steps."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pvdm_fast.errors import UserError
from pvdm_fast.jobs.environment import starts_again
from pvdm_fast.jobs.files import whole_file
from pvdm_fast.training import checkpoint
from pvdm_fast.training.config import (
    OPTIONS,
    STAGES,
    TrainConfig,
    given,
    make_config,
    read_changes,
    values_of,
    with_absolute_places,
)
from pvdm_fast.training.distilling import check_distillation
from pvdm_fast.training.initialisation import find_autoencoder, find_denoiser
from pvdm_fast.training.options import Request, flag
from pvdm_fast.training.presets import SIZES, autoencoder_sizes
from pvdm_fast.training.run_folder import RunFolder

# Options whose new values are kept for later commands even where nothing is left to train.
KEPT_WHEN_FINISHED = ("data", "stage", "device")
DISCRIMINATORS = ("adversarial.norm", "adversarial.channels")  # free until there are any
UNRECORDED = ("stage", "device")
GROUP_STAGE = {
    "autoencoder": "autoencoder",
    "adversarial": "autoencoder",
    "diffusion": "diffusion",
    "distillation": "diffusion",
}


@dataclass(frozen=True)
class Resumption:
    """How a run goes on.

    Attributes:
        path: the run's folder.
        config: what to train with.
        changed: by option key, the value that was in use at the newest checkpoint, and the one from now on.
        asked: the keys of options on the command line that change something.
    """

    path: Path
    config: TrainConfig
    changed: dict[str, tuple[Any, Any]] = field(default_factory=dict)
    asked: tuple[str, ...] = ()


def resumed_folder(request: Request) -> Path | None:
    """The folder of the run to continue; None for a new run.

    A job that torchrun starts again after a failure has the same command line as before: its --run is continued.

    Raises:
        UserError: such a job doesn't name its folder.
    """
    if request.resume is not None or not starts_again():
        return request.resume
    if request.run is None:
        raise UserError("a job that is started again after a failure must know its folder: name it with --run-dir")
    return request.run if RunFolder(request.run).config.exists() else None


def resumption(resume: Path, request: Request) -> Resumption:
    """The run's own configuration with the command line's changes; raises UserError for those that cannot be."""
    run = RunFolder.existing(resume)
    values = values_of(make_config(_own_values(run)))
    changes = given(request.changes)
    if "data" not in changes and with_absolute_places(values)["data"] != os.path.normpath(values["data"]):
        raise UserError(
            f"the run names its data from the folder that it was started in, as {values['data']}: give the whole path "
            "with --data"
        )
    asked = tuple(key for key, value in changes.items() if OPTIONS[key].convert(value) != values[key])
    config = make_config({**values, **changes})
    used, now = {**values, **_values_at_checkpoint(run)}, values_of(config)
    changed = {key: (used[key], value) for key, value in now.items() if used[key] != value and key not in UNRECORDED}
    open_yet = DISCRIMINATORS if used["adversarial.start"] is None else ()
    for key in changed:
        if not OPTIONS[key].metadata["resumable"] and key not in open_yet:
            what = flag(OPTIONS[key]) if key in asked else f"{key} in {run.config}, which was {used[key]},"
            raise UserError(
                f"{what} cannot change when a run is resumed; start a new run for that, with --init-from {resume} if "
                "its weights should be kept"
            )
    if changed:
        check_distillation(config, find_denoiser(run.teacher) if config.distillation.steps else None)
    return Resumption(resume, config, changed, asked)


def _own_values(run: RunFolder) -> dict[str, Any]:
    """What config.yaml says. Earlier versions left sizes open: those of the run's own autoencoder fill them."""
    values = _with_method(given(read_changes(run.config)))
    if not values.keys() >= SIZES and (run.autoencoder / "config.json").is_file():
        values = {**autoencoder_sizes(find_autoencoder(run.autoencoder).config), **values}
    return values


def _with_method(values: dict[str, Any]) -> dict[str, Any]:
    """A run's options. Earlier versions distilled by one method, and didn't name it."""
    if values.get("distillation.steps") is None:
        return values
    return {"distillation.method": "path", **values}


def _values_at_checkpoint(run: RunFolder) -> dict[str, Any]:
    """Every option as it was at the newest checkpoint; nothing where none says it."""
    for place in reversed(checkpoint.found(run.checkpoints)):
        with suppress(UserError):  # an earlier version's, which has none, or a damaged one
            return values_of(make_config(_with_method(read_changes(place.path / checkpoint.CONFIG))))
    return {}


def reopen(run: RunFolder, resumed: Resumption) -> None:
    """Check what is left to train, give finished stages the steps that they now have, and record what changed.

    Raises:
        UserError: an option would be without effect, or a finished stage cannot go on.
    """
    config, results = resumed.config, run.results()
    stages = STAGES if config.stage == "all" else (config.stage,)
    longer = [stage for stage in stages if stage in results and _goes_on(run, stage, config, results)]
    for place in checkpoint.found(run.checkpoints):
        stage, wanted = place.stage_name, getattr(config, place.stage_name).steps
        if stage not in results and wanted < place.step:
            raise UserError(f"--{stage}-steps {wanted} is less than the {place.step} steps that the run has taken")
    left = [stage for stage in stages if stage not in results or stage in longer]
    for key in resumed.asked:
        own = GROUP_STAGE.get(OPTIONS[key].group)
        if own in results and own not in longer:
            raise UserError(
                f"{flag(OPTIONS[key])} would do nothing: the {own} stage is finished after {results[own]['steps']} "
                f"steps; raise --{own}-steps to go on with it"
            )
        if not left and key not in KEPT_WHEN_FINISHED:
            remedy = f"raise --{stages[-1]}-steps to go on with it"
            raise UserError(f"{flag(OPTIONS[key])} would do nothing: the run is finished; {remedy}")
    record_changes(run, resumed.changed)
    for stage in longer:
        run.forget_result(stage)


def _goes_on(run: RunFolder, stage: str, config: TrainConfig, results: Mapping[str, Any]) -> bool:
    """Whether a finished stage now has more steps to take; raises UserError where it cannot take them.

    One that --early-stop ended goes on if that is now larger, or none.
    """
    result, wanted = results[stage], getattr(config, stage).steps
    taken, waited = result["steps"], result.get("scores_waited")
    if wanted < taken:
        raise UserError(f"--{stage}-steps {wanted} is less than the {taken} steps that the finished stage has taken")
    more_steps = wanted > result.get("planned_steps", taken)
    if wanted == taken or not (more_steps or (waited is not None and wanted > taken)):
        return False
    kept = [place.stage_name for place in checkpoint.found(run.checkpoints)]
    followed = stage == "autoencoder" and ("diffusion" in results or "diffusion" in kept)
    if waited is not None and config.early_stop is not None and config.early_stop <= waited:
        if more_steps:
            raise UserError(
                f"--{stage}-steps {wanted} would do nothing: the stage ended after {taken} steps, with {waited} "
                f"held-out scores without a new best; say --early-stop none, or more than {waited}"
            )
        return False
    if not more_steps and followed:
        return False  # the new --early-stop is for the denoiser
    again = f"start a new run with --init-from {run.path}"
    if followed:
        raise UserError(
            f"--autoencoder-steps {wanted}: the autoencoder stage is finished, and the denoiser was trained on its "
            f"latents, so that it cannot go on; {again}"
        )
    if stage not in kept:
        raise UserError(f"--{stage}-steps {wanted}: no checkpoint of the finished {stage} stage is left; {again}")
    return True


def record_changes(run: RunFolder, changed: Mapping[str, tuple[Any, Any]]) -> None:
    """Add each change to changes.jsonl with the step that it holds from, and say it.

    Raises:
        UserError: the file cannot be written.
    """
    places = checkpoint.found(run.checkpoints)
    stage, step = (places[-1].stage_name, places[-1].step) if places else (STAGES[0], 0)
    try:
        before = run.changes.read_text(encoding="utf-8") if run.changes.exists() else ""
        lines = []
        for key, (old, new) in changed.items():
            line = json.dumps({"stage": stage, "step": step, "option": key, "from": old, "to": new})
            if line not in before.splitlines():
                lines.append(line)
                print(
                    f"changed    {key}: {old} until step {step} of the {stage} stage, {new} from there on", flush=True
                )
        if lines:
            with whole_file(run.changes) as temporary:
                temporary.write_text(before + "".join(f"{line}\n" for line in lines), encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot write {run.changes}: {getattr(error, 'strerror', None) or error}") from error
