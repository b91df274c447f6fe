"""The tables of what the scene judge says: rows and shares are those of the scenes that were drawn."""

from __future__ import annotations

import dataclasses

import torch
from evaluation.scene_clips import held_out, truth

from benchmarks import judge_accuracy
from benchmarks.judge_accuracy import CLIP, DOCUMENT, clips_table, known, measure, objects_table
from pvdm_fast.evaluation.scene_judge import load_judge


def test_the_tables_count_what_is_right() -> None:
    scenes = held_out(5)
    visible, kind, place = known(scenes)
    seen = truth(scenes, 2 * CLIP)
    assert torch.equal(visible, seen.visible) and torch.equal(place, seen.place)
    head, _, *rows = objects_table(seen, visible, kind, place)
    assert len(rows) == 3 + 5 and all(row.count("|") == head.count("|") for row in rows)
    assert all("| 100.00% | 100.00% | 0.00 pixels |" in row for row in rows if "| 0 |" not in row)
    nothing = dataclasses.replace(seen, kinds=torch.eye(6)[5].expand_as(seen.kinds))
    assert "| 0.00% | 0.00% |" in objects_table(nothing, visible, kind, place)[2]


def test_the_page_has_its_place_and_rows() -> None:
    page = DOCUMENT.read_text(encoding="utf-8").partition("<!-- judge -->")[2].partition("<!-- /judge -->")[0]
    tables = measure(3)
    names = [line.split("|")[1] for line in tables.splitlines() if line]
    assert names == [line.split("|")[1] for line in page.strip().splitlines() if line]
    clips = judge_accuracy.render(held_out(2))
    assert clips.shape == (2, 3, 2 * CLIP, 32, 32) and len(clips_table(load_judge(), clips)) == 5
