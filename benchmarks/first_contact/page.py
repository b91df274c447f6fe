"""What the parts found, on one page: report.md for people, report.json for programs, ratios.svg to look at."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from benchmarks import machine
from benchmarks.first_contact import plot
from benchmarks.first_contact.context import read_json, write_json
from benchmarks.first_contact.walk import LEFT, Outcome, Walk, as_rows
from benchmarks.floors import Work, floor_at
from pvdm_fast.jobs.files import whole_file

PAGE, NUMBERS, PLOT = "report.md", "report.json", "ratios.svg"
RIVALS = ("eager", "sdpa", "sdpa flash", "sdpa cudnn", "compiled")
Found = Mapping[str, Any]


def write(walk: Walk, outcomes: Sequence[Outcome]) -> None:
    """Write the three files from what the parts that have ended left in DIR."""
    found = {outcome.part: read_json(walk.out / f"{outcome.part}.json") for outcome in outcomes}
    facts = {"device": walk.device, "dry": walk.dry, "minutes": walk.seconds / 60, "time": machine.now()}
    write_json(walk.out / NUMBERS, {**facts, "parts": as_rows(outcomes), "found": found})
    rows = [row for part in ("operations", "networks") for row in found.get(part, {}).get("rows", [])]
    drawn = plot.ratios(rows, name_of(found.get("probe", {})))
    if drawn:
        with whole_file(walk.out / PLOT) as temporary:
            temporary.write_text(drawn, encoding="utf-8")
    with whole_file(walk.out / PAGE) as temporary:
        temporary.write_text(text(walk, outcomes, found, bool(drawn)), encoding="utf-8")


def name_of(probe: Found) -> str:
    return str(probe.get("name", "unknown machine"))


def text(walk: Walk, outcomes: Sequence[Outcome], found: Mapping[str, Found], drawn: bool) -> str:
    """The page."""
    lines = [f"# {name_of(found.get('probe', {}))}", ""]
    if walk.dry:
        lines += ["A dry walk at tiny sizes: no number of it means anything.", ""]
    lines += table(("part", "", "seconds"), [(o.title, o.status, f"{o.seconds:.1f}") for o in outcomes])
    for outcome in outcomes:
        if outcome.lines:
            word = "was left out" if outcome.status == LEFT else "failed"
            lines += [f"**{outcome.title}** {word}:", "", "```text", *outcome.lines, "```", ""]
    for part, section in SECTIONS.items():
        if part in found and (body := [*section(found[part], found), *_not_all(found[part])]):
            title = next(outcome.title for outcome in outcomes if outcome.part == part)
            lines += [f"## {title}", "", *body]
    if drawn:
        lines += [f"![Time of each rival by ours]({PLOT})", ""]
    return "\n".join(lines).rstrip() + "\n"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    body = [f"| {' | '.join(row)} |" for row in rows]
    return [f"| {' | '.join(head)} |", "| --- " * len(head) + "|", *body, ""] if body else []


def _not_all(part: Found) -> list[str]:
    """What a part left out, so that no table looks complete that isn't."""
    lines = [f"- not run: {' '.join(str(line).split())}" for line in part.get("not_run", [])]
    rivals = {text for row in part.get("rows", []) for text in row.get("left_out", [])}
    lines += [f"- {text}" for text in sorted(rivals)]
    lines += [f"- does not fit in memory: {row.get('case') or row.get('network')}" for row in part.get("too_large", [])]
    lines += [f"- FAILED: {row['case']}: {row['problem']}" for row in part.get("problems", [])]
    if waiting := part.get("no_time_for"):
        shown = "; ".join(map(str, waiting[:8]))
        more = f" and {len(waiting) - 8} more" if len(waiting) > 8 else ""
        lines += [f"- no time for: {shown}{more}"]
    return [*lines, ""] if lines else []


def _probe(part: Found, _: Mapping[str, Found]) -> list[str]:
    known, card, driver = part.get("machine", {}), part.get("card", {}), part.get("driver", {})
    lines = [
        f"- {key}: {known[key]}" for key in ("cpu", "threads", "python", "torch", "cuda", "commit") if known.get(key)
    ]
    lines += [f"- Triton: {part['facts']['versions']['triton'] or 'not installed'}"] if "facts" in part else []
    if card:
        lines += [
            f"- card: compute capability {card['capability']}, {card['memory'] / 2**30:.0f} GiB, "
            f"{card['multiprocessors']} multiprocessors"
        ]
    lines += [f"- {key}: {value}" for key, value in driver.items() if key != "name"]
    if part.get("missing"):
        lines += [f"- not installed: {', '.join(part['missing'])}"]
    return [*lines, ""]


def _build(part: Found, _: Mapping[str, Found]) -> list[str]:
    return [f"By {part['compiler']} for {', '.join(part['targets'])}.", ""] if "targets" in part else []


def _results(part: Found, _: Mapping[str, Found]) -> list[str]:
    results = part.get("results", [])
    wrong = [row for row in results if row["problem"]]
    lines = [f"{len(results) - len(wrong)} of {len(results)} comparisons are right.", ""] if results else []
    lines += table(
        ("wrong", "backend", "dtype", "error", "allowed", ""),
        [
            (r["what"], r["backend"], r["precision"], _number(r["error"]), _number(r["allowed"]), r["problem"])
            for r in wrong
        ],
    )
    return lines


def _goldens(part: Found, found: Mapping[str, Found]) -> list[str]:
    rows = [
        (r["what"], r["precision"], _number(r["error"]), _number(r["allowed"]), r["problem"] or "ok")
        for r in part.get("results", [])
    ]
    return table(("result", "dtype", "error", "allowed", ""), rows)


def _sanitizer(part: Found, _: Mapping[str, Found]) -> list[str]:
    rows = [
        (r["tool"], r["backend"], str(r["cases"]), r["status"], f"{r['seconds']:.0f}") for r in part.get("runs", [])
    ]
    return table(("tool", "backend", "cases", "", "seconds"), rows)


def _peaks(part: Found, _: Mapping[str, Found]) -> list[str]:
    rows = [
        (f"{r['precision']} products", f"{r['flops_per_second'] / 1e12:.2f} TFLOP/s") for r in part.get("products", [])
    ]
    rows += [
        (f"copies and sums of {r['bytes'] >> 20} MiB", f"{r['bytes_per_second'] / 1e9:.0f} GB/s")
        for r in part.get("memory", [])
    ]
    return table(("peak", ""), rows)


def _speed(part: Found, found: Mapping[str, Found]) -> list[str]:
    """Ours in milliseconds; of every rival how many times longer it takes; the share of the floor; peak memory."""
    rows = part.get("rows", [])
    rivals = [name for name in RIVALS if any(name in row["ratio"] for row in rows)]
    memory = any(row["memory"] for row in rows)
    head = ("case", "direction", "dtype", "ours, ms", *(f"{name} / ours" for name in rivals), "of the floor")
    cells = [
        (
            row["case"], row["direction"], row["precision"], f"{1e3 * row['median']['ours']:.3f}",
            *(_ratio(row["ratio"].get(name)) for name in rivals), _share(row, found.get("peaks", {})),
            *([f"{row['memory'].get('ours', 0) / 2**20:.0f} / {row['memory'].get('eager', 0) / 2**20:.0f}"] * memory),
        )
        for row in rows
    ]  # fmt: skip
    return table((*head, "MiB, ours / eager") if memory else head, cells)


def _ratio(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:.2f}x" if value >= 1 else f"**{value:.2f}x**"  # a loss is marked


def _share(row: Found, peaks: Found) -> str:
    """Of the time, what products at their peak or bytes at memory's would take at least."""
    products = [r["flops_per_second"] for r in peaks.get("products", []) if r["precision"] == row["precision"]]
    speeds = [r["bytes_per_second"] for r in peaks.get("memory", [])]
    if not products or not speeds:
        return ""
    floor = floor_at(Work(row["flops"], row["bytes"]), products[0], max(speeds))
    return f"{100 * floor.seconds / row['median']['ours']:.0f} %"


def _sampler(part: Found, _: Mapping[str, Found]) -> list[str]:
    rows = [(name, f"{1e3 * seconds:.3f}") for name, seconds in part.get("median", {}).items()]
    lines = table(("the denoiser's guided pass", "ms"), rows)
    if "errors" in part:
        errors = ", ".join(map(_number, part["errors"]))
        lines += [f"Against the launched pass the graph differs by {errors} (allowed {_number(part['allowed'])}).", ""]
    return lines


def _training(part: Found, _: Mapping[str, Found]) -> list[str]:
    rows = [
        (
            row["network"], str(row["clips"]), f"{1e3 * row['median']['ours']:.1f}",
            _ratio(row["median"]["sdpa"] / row["median"]["ours"]),
            " / ".join(f"{size / 2**30:.2f}" for size in row["memory"].values()) or "",
            f"{row['loss']['ours']:.5f} / {row['loss']['sdpa']:.5f}",
        )
        for row in part.get("rows", [])
    ]  # fmt: skip
    return table(("network", "clips", "ours, ms", "sdpa / ours", "GiB, ours / sdpa", "first loss, ours / sdpa"), rows)


def _tune(part: Found, _: Mapping[str, Found]) -> list[str]:
    if "planned" not in part:
        return []
    entries = part.get("entries", [])
    better = [entry for entry in entries if entry["config"]]
    lines = [f"{len(entries)} of {part['planned']} entries timed; {len(better)} have a quicker configuration.", ""]
    return [*lines, *table(("entry", "quicker"), [(entry["entry"], f"`{entry['config']}`") for entry in better])]


def _number(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.1e}"


SECTIONS: dict[str, Callable[[Found, Mapping[str, Found]], list[str]]] = {
    "probe": _probe,
    "build": _build,
    "self-test": _results,
    "goldens": _goldens,
    "sanitizer": _sanitizer,
    "peaks": _peaks,
    "operations": _speed,
    "networks": _speed,
    "sampler-step": _sampler,
    "training-step": _training,
    "tune": _tune,
}
