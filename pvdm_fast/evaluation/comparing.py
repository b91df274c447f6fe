"""Evaluated runs side by side on one page: their scores in one table, what differs in the protocol, and all clips."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pvdm_fast.errors import UserError
from pvdm_fast.evaluation.curves import curves
from pvdm_fast.evaluation.report import (
    BUTTONS,
    bullets,
    escape,
    figures,
    flat,
    nearest_section,
    score_rows,
    section,
    table,
    video_figures,
    write_page,
)
from pvdm_fast.jobs.files import whole_file
from pvdm_fast.training.run_folder import RunFolder

KINDS = {"reconstruction": "Reconstructions", "samples": "Samples"}


def names(runs: Sequence[Path]) -> list[str]:
    """A name of each run: its folder's, or as much of the path before it as tells the runs apart."""
    paths = [run.resolve() for run in runs]
    for parts in range(1, max(len(path.parts) for path in paths) + 1):
        made = [str(Path(*path.parts[-parts:])) for path in paths]
        if len(set(made)) == len(made):
            return made
    raise UserError(f"the runs to compare must be different folders, not {', '.join(map(str, runs))}")


def write_comparison(path: Path, runs: Sequence[Path], folders: Sequence[Path]) -> list[tuple[str, ...]]:
    """Write the page from what evaluations have left in ``folders``, one for each of ``runs``.

    Returns:
        The table of scores: a header and rows, each (name, a value of each run, of what).

    Raises:
        UserError: the page cannot be written.
    """
    labels = names(runs)
    documents = [json.loads((folder / "evaluation.json").read_text(encoding="utf-8")) for folder in folders]
    scores = score_table(labels, [document["results"] for document in documents])
    differences = protocol_differences([document["protocol"] for document in documents])
    parts = [f"<h1>{escape(' and '.join(labels))}</h1>", BUTTONS, section("Scores", table(scores[1:], scores[0]))]
    for title in ("missing", "caveats"):
        lines = [
            f"{label}: {line}" for label, item in zip(labels, documents, strict=True) for line in item["results"][title]
        ]
        parts.append(section("Missing" if title == "missing" else "Beware", bullets(lines)) if lines else "")
    for kind, title in KINDS.items():
        shown = [
            f"<h3>{escape(label)}</h3>\n{video_figures(folder / document['videos'][kind])}"
            for label, folder, document in zip(labels, folders, documents, strict=True)
            if kind in document["videos"]
        ]
        parts.append(section(title, "\n".join(shown)) if shown else "")
    for label, folder, document in zip(labels, folders, documents, strict=True):
        place = folder / document["videos"].get("nearest", "")
        parts.append(nearest_section(document["results"]["nearest"], place, f" of {label}"))
    for label, run in zip(labels, runs, strict=True):
        records = RunFolder(run).read_metrics()
        parts.append(section(f"Training of {label}", figures(curves(records))) if records else "")
    protocol = table(differences, ("", *labels)) if differences else "<p>The same for all.</p>"
    parts.append(section("What differs in the protocol", f'<div id="protocol">{protocol}</div>'))
    try:
        with whole_file(path) as temporary:
            write_page(temporary, " and ".join(labels), parts)
    except OSError as error:
        raise UserError(f"cannot write {path}: {os.strerror(error.errno or 0)}") from error
    return scores


def score_table(labels: Sequence[str], results: Sequence[dict[str, Any]]) -> list[tuple[str, ...]]:
    """A header and the rows (name, a value of each run, of what). A run without a score has a dash."""
    found: dict[tuple[str, str], list[str]] = {}
    for number, result in enumerate(results):
        for name, value, of in score_rows(result):
            found.setdefault((name, of), ["-"] * len(labels))[number] = value
    return [("", *labels, "of"), *((name, *values, of) for (name, of), values in found.items())]


def protocol_differences(protocols: Sequence[dict[str, Any]]) -> list[tuple[str, ...]]:
    """(name, a value of each run) of everything in which the protocols differ."""
    rows = [dict(flat(protocol)) for protocol in protocols]
    keys = list(dict.fromkeys(key for row in rows for key in row))
    values = {key: [row.get(key, "none") for row in rows] for key in keys}
    return [(key, *given) for key, given in values.items() if len(set(given)) > 1]
