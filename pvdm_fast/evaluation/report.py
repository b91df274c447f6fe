"""The readable report: one HTML file with everything in it, including videos. It needs no network."""

from __future__ import annotations

import base64
import html
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from pvdm_fast.errors import printable
from pvdm_fast.evaluation.curves import curves

NAMED_FILES = 20
SCENE_LABELS = {
    "named": "all objects named and kept, first clip",
    "path": "all paths unbroken, first clip",
    "second_named": "all objects named and kept, two clips",
    "second_path": "all paths unbroken, two clips",
}

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 68rem; margin: 2rem auto; padding: 0 1rem; color: #1c1e21; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.2rem; margin-top: 2.2rem; border-bottom: 1px solid #d5d8dc; }
table { border-collapse: collapse; } td, th { text-align: left; vertical-align: top; padding: .2rem 1.2rem .2rem 0; }
tr + tr td { border-top: 1px solid #eceef0; } td.number { font-variant-numeric: tabular-nums; }
#protocol td { font-size: .85rem; overflow-wrap: anywhere; } #protocol td:first-child { white-space: nowrap; }
.row { display: flex; flex-wrap: wrap; gap: .8rem; } figure { margin: 0; } video { max-width: 100%; display: block; }
figcaption { font-size: .8rem; color: #5a6068; } .failed { color: #b00020; } li { margin: .2rem 0; }
svg { max-width: 100%; height: auto; }
"""

BUTTONS = (
    '<p>All videos: <button id="play">play</button> <button id="pause">pause</button> '
    '<button id="restart">from the start</button></p>'
)

# Tells the reader, and the test, whether this browser really decodes the videos.
SCRIPT = """
const videos = [...document.querySelectorAll("video")];
let ready = 0, failed = 0;
window.addEventListener("error", event => { if (event.message) document.body.dataset.error = event.message; });
function tell() { document.body.dataset.videos = `${ready} ready, ${failed} failed, ${videos.length} in all`; }
for (const video of videos) {
  const caption = video.parentElement.querySelector("figcaption");
  const loaded = () => {
    if (video.dataset.state || !(video.readyState >= 2 && video.duration > 0 && video.videoWidth > 0)) return;
    ready += 1; video.dataset.state = "ready"; video.dataset.duration = video.duration; tell();
  };
  video.addEventListener("loadeddata", loaded);
  const broken = () => {
    if (video.dataset.state === "failed") return;
    if (video.dataset.state === "ready") ready -= 1;
    failed += 1; video.dataset.state = "failed"; caption.classList.add("failed");
    caption.textContent += ": this browser cannot play it (" + (video.error ? video.error.message : "unknown") + ")";
    tell();
  };
  video.addEventListener("error", broken);
  if (video.error) broken(); else loaded();
}
tell();
const onClick = (id, action) => { document.getElementById(id).onclick = () => videos.forEach(action); };
onClick("play", video => video.play());
onClick("pause", video => video.pause());
onClick("restart", video => { video.currentTime = 0; video.play(); });
"""


def escape(text: str) -> str:
    """A text for the page, through `printable`: file names may hold bytes that aren't UTF-8."""
    return html.escape(printable(text))


def write_report(path: Path, document: dict[str, Any], videos: dict[str, Path], records: list[dict[str, Any]]) -> None:
    """Write the page.

    Args:
        path: the HTML file.
        document: what evaluation.json holds.
        videos: folders with clip-N.mp4, under "reconstruction", "samples" and "nearest".
        records: of metrics.jsonl.
    """
    results, protocol = document["results"], document["protocol"]
    name = Path(document["run"]).resolve().name
    parts = [
        f"<h1>Evaluation of {escape(name)}</h1>",
        BUTTONS if videos else "",
        section("Scores", table(score_rows(results), ("", "score", "of"))),
        section("Missing", bullets(results["missing"])) if results["missing"] else "",
        section("Beware", bullets(results["caveats"])) if results["caveats"] else "",
        _videos("Reconstructions", "left the clip, right its reconstruction", videos.get("reconstruction")),
        _videos("Samples", _sampling(protocol), videos.get("samples")),
        nearest_section(results.get("nearest"), videos.get("nearest")),
        section("Training", figures((title, svg) for title, svg in curves(records))) if records else "",
        section("Protocol", f'<div id="protocol">{table(list(flat(protocol)), ("", ""))}</div>'),
        section("Files that could not be read", bullets(_unreadable(results["unreadable_files"])))
        if results["unreadable_files"]
        else "",
    ]
    write_page(path, f"Evaluation of {name}", parts)


def write_page(path: Path, title: str, parts: Iterable[str]) -> None:
    """Write an HTML file with the sections ``parts``, leaving out empty ones."""
    page = (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head>\n<body>\n"
        + "\n".join(part for part in parts if part)
        + f"\n<script>{SCRIPT}</script>\n</body></html>\n"
    )
    path.write_text(page, encoding="utf-8", errors="backslashreplace")  # file names need not be UTF-8


def score_rows(results: dict[str, Any]) -> list[tuple[str, str, str]]:
    """(name, value, of what) of every score, for people. A distance is called FVD only if it is one."""
    reconstruction = results["reconstruction"]
    clips = f"{reconstruction['clips']:,} clips of {reconstruction['frames']} frames"
    rows = []
    for key, label, digits, unit in (("psnr", "PSNR", 2, " dB"), ("ssim", "SSIM", 4, "")):
        if reconstruction[key] is not None:
            mean, error = reconstruction[key]["mean"], reconstruction[key]["standard_error"]
            spread = "" if error is None else f" ± {error:.{digits}f}"
            rows.append((f"reconstruction {label}", f"{mean:.{digits}f}{spread}{unit}", clips))
    if "frechet_distance" in reconstruction:
        label = "R-FVD" if reconstruction["fvd"] is not None else "reconstruction, Fréchet distance of other features"
        rows.append((label, f"{reconstruction['frechet_distance']:.2f}", clips))
    rows += _own_rows("reconstruction", reconstruction, clips)
    for frames, scores in results["generation"].items():
        of = f"{scores['samples']:,} samples and {scores.get('real_clips', 0):,} clips of {frames} frames"
        if "frechet_distance" in scores:
            label = "FVD" if scores["fvd"] is not None else "samples, Fréchet distance of other features"
            rows.append((f"{label}, {frames} frames", f"{scores['frechet_distance']:.2f}", of))
            if scores["fvd"] is not None and scores["fvd_unbiased_covariances"] is not None:
                label = "FVD with PVDM's covariances"
                rows.append((f"{label}, {frames} frames", f"{scores['fvd_unbiased_covariances']:.2f}", of))
        rows += _own_rows("samples", scores, of)
    if results.get("scenes"):
        rows += _scene_rows(results["scenes"], clips)
    return rows + nearest_rows(results.get("nearest"))


def _own_rows(what: str, scores: dict[str, Any], of: str) -> list[tuple[str, str, str]]:
    """Both distances in the shipped network's features, under names that nobody takes for FVD."""
    found = scores.get("pvdm_fast_features")
    if found is None:
        return []
    rows = []
    for key, label, digits in (("frechet_distance", "Fréchet", 2), ("kernel_distance", "kernel", 3)):
        value, low, high = (found[key][name] for name in ("value", "low", "high"))
        text = f"{value:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"
        rows.append((f"{what}, {label} distance, our features", text, of))
    return rows


def nearest_rows(nearest: dict[str, Any] | None) -> list[tuple[str, str, str]]:
    """The rows of the samples' distances from their nearest training clips, and of held-out clips'."""
    if nearest is None:
        return []
    rows = []
    for name, key in (("samples", "samples"), ("held-out clips", "held_out")):
        if found := nearest[key]:
            of = f"{len(found)} of them, their medians; {nearest['among']:,} training clips"
            distance, relative = (median(row[value] for row in found) for value in ("distance", "relative"))
            rows.append((f"{name}, nearest training clip", f"{distance:.1f}", of))
            rows.append((f"{name}, the same relative to the 50 nearest", f"{relative:.2f}", of))
    return rows


def _scene_rows(scenes: dict[str, Any], clips: str) -> list[tuple[str, str, str]]:
    """The rows of the scene judge: shares in per cent, and the distance of its features."""
    rows = []
    if scenes["kinds_right"] is not None:
        of = f"{scenes['objects']:,} objects in {clips}"
        rows.append(("reconstruction, objects with the right name", f"{scenes['kinds_right']:.1%}", of))
    if "samples" not in scenes:
        return rows
    of = f"{scenes['samples']:,} samples"
    for key, label in SCENE_LABELS.items():
        mean, error = scenes[key]["mean"], scenes[key]["standard_error"]
        rows.append((f"samples, {label}", f"{mean:.1%}" + ("" if error is None else f" ± {error:.1%}"), of))
    if scenes["of_class"] is not None:
        rows.append(("samples, objects of the class asked for", f"{scenes['of_class']:.1%}", of))
    distance = f"{scenes['frechet_distance']:.3f}"
    return [*rows, ("samples, Fréchet distance of the scene judge's features", distance, f"{of} and {clips}")]


def flat(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Nested values as ("data.split", "test") pairs. What all operations share is said once."""
    for key, value in values.items():
        label = f"{prefix}{key}"
        if isinstance(value, dict) and len(set(map(str, value.values()))) == 1 and len(value) > 2:
            yield label, f"{next(iter(value.values()))} (all {len(value)})"
        elif isinstance(value, dict):
            yield from flat(value, f"{label}.")
        else:
            yield label, "none" if value is None else str(value)


def nearest_section(nearest: dict[str, Any] | None, folder: Path | None, of: str = "") -> str:
    """Samples beside their nearest training clips, and what the distances are to be compared with."""
    if nearest is None or folder is None:
        return ""
    note = (
        f"Left the first {nearest['frames']} frames of a sample, right the nearest of {nearest['among']:,} training "
        f"clips (one window of each of {nearest['videos']:,} videos, again from the start where clips outnumber them; "
        f"not mirrored). Distance: {nearest['distance']}. Relative: {nearest['relative']}. A copy is near 0: below 0.5 "
        "look closely. A blurred sample, which is near to all training clips alike, is near 1."
    )
    if relatives := [row["relative"] for row in nearest["held_out"]]:
        note += f" Held-out clips, which no model has seen, have {min(relatives):.2f} to {max(relatives):.2f}."
    captions = [
        f"sample {n}: distance {row['distance']:.1f}, relative {row['relative']:.2f}, {row['name']}"
        for n, row in enumerate(nearest["samples"])
    ]
    return _videos(f"Nearest training clips{of}", note, folder, captions)


def _sampling(protocol: dict[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in protocol["sampling"].items())


def section(title: str, content: str) -> str:
    return f"<h2>{escape(title)}</h2>\n{content}"


def table(rows: Iterable[tuple[str, ...]], header: tuple[str, ...]) -> str:
    head = f"<tr>{''.join(f'<th>{escape(cell)}</th>' for cell in header)}</tr>" if any(header) else ""
    body = "\n".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table>\n{head}{body}\n</table>"


def bullets(items: Iterable[str]) -> str:
    return "<ul>\n" + "\n".join(f"<li>{escape(item)}</li>" for item in items) + "\n</ul>"


def _unreadable(files: dict[str, str]) -> list[str]:
    lines = [f"{path}: {reason}" for path, reason in list(files.items())[:NAMED_FILES]]
    more = len(files) - NAMED_FILES
    return [*lines, f"and {more} more, all in evaluation.json"] if more > 0 else lines


def figures(items: Iterable[tuple[str, str]]) -> str:
    made = (f"<figure>{content}<figcaption>{escape(title)}</figcaption></figure>" for title, content in items)
    return '<div class="row">\n' + "\n".join(made) + "\n</div>"


def _videos(title: str, note: str, folder: Path | None, captions: Sequence[str] = ()) -> str:
    """The section of a folder's videos, embedded as data. Empty if there are none."""
    shown = video_figures(folder, captions)
    return section(title, f"<p>{escape(note)}</p>\n{shown}") if shown else ""


def video_figures(folder: Path | None, captions: Sequence[str] = ()) -> str:
    """A row of a folder's clip-N.mp4 in the order of their numbers, with ``captions`` or their names. Empty if there
    are none."""
    paths = [] if folder is None else sorted(folder.glob("clip-*.mp4"), key=lambda path: int(path.stem.split("-")[1]))
    if not paths:
        return ""
    names = captions or [path.stem.replace("-", " ") for path in paths]
    return figures((name, _player(path)) for name, path in zip(names, paths, strict=True))


def _player(path: Path) -> str:
    data = base64.b64encode(path.read_bytes()).decode()
    return f'<video autoplay loop muted playsinline preload="auto" src="data:video/mp4;base64,{data}"></video>'
