"""The report is one file with everything in it. A real browser opens it and plays its videos."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from pvdm_fast.data import write_video
from pvdm_fast.evaluate import main
from pvdm_fast.evaluation.curves import MAX_POINTS, curves, thinned
from pvdm_fast.evaluation.report import flat, score_rows, write_report

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
FLAGS = shlex.split(
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --hide-scrollbars --virtual-time-budget=3000"
)


def page_after_loading(page: Path, profile: Path) -> str:
    """The page's elements in a real browser, after its scripts have run."""
    browser = next((path for name in BROWSERS if (path := shutil.which(name))), None)
    if browser is None:
        pytest.skip(f"no browser is there (looked for {', '.join(BROWSERS)}): install chromium")
    done = subprocess.run(
        [browser, *FLAGS, f"--user-data-dir={profile}", "--dump-dom", page.as_uri()],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.fixture(scope="module")
def report(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("report")
    options = [
        "--clips",
        "9",
        "--frames",
        "5",
        "--steps",
        "1",
        "--nearest-among",
        "6",
        "--device",
        "cpu",
        "--out",
        str(out),
    ]
    assert main([str(run), *options]) == 0
    return out / "report.html"


@pytest.mark.slow
def test_a_browser_plays_every_video(report: Path, tmp_path: Path) -> None:
    loaded = page_after_loading(report, tmp_path / "profile")
    body = re.search(r"<body[^>]*>", loaded)
    assert body is not None
    assert 'data-videos="24 ready, 0 failed, 24 in all"' in body[0]
    assert "data-error" not in body[0], body[0]
    assert "cannot play" not in loaded.split("<script>")[0]
    lengths = [float(length) for length in re.findall(r'data-duration="([^"]*)"', loaded)]
    assert lengths == pytest.approx([0.4] * 8 + [0.5] * 8 + [0.4] * 8), (
        "4, 5 and 4 frames, at the run's 10 frames a second"
    )


@pytest.mark.slow
def test_a_browser_that_cannot_play_says_so(report: Path, tmp_path: Path) -> None:
    broken = tmp_path / "report.html"
    broken.write_text(report.read_text().replace("video/mp4;base64,", "video/mp4;base64,AAAA", 1))
    loaded = page_after_loading(broken, tmp_path / "profile")
    assert "23 ready, 1 failed" in loaded and "this browser cannot play it" in loaded.split("<script>")[0]


class Tags(HTMLParser):
    """Elements must be closed in order. Collects the sources of elements."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.sources: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.sources += [str(value) for name, value in attrs if name in ("src", "href")]
        if tag != "meta":
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.sources += [str(value) for name, value in attrs if name in ("src", "href")]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_it_asks_nothing_of_the_network(report: Path) -> None:
    tags = Tags()
    tags.feed(report.read_text())
    assert tags.open == []
    assert len([source for source in tags.sources if source.startswith("data:video/mp4;")]) == 24
    assert not [source for source in tags.sources if "//" in source[:40]]


def test_it_says_what_is_there_and_what_is_not(report: Path) -> None:
    text = report.read_text()
    for words in ("reconstruction PSNR", "reconstruction SSIM", "i3d_torchscript.pt", "data.split", "sampling.steps"):
        assert words in text
    assert "autoencoder: loss" in text and "autoencoder: psnr" in text and "diffusion: loss" in text
    assert text.count("<svg") == 3


def test_names_are_not_taken_for_html(tmp_path: Path) -> None:
    document = {
        "run": str(tmp_path / "<b>run"),
        "protocol": {"sampling": {}, "data": {"source": "<script>alert(1)</script>"}},
        "results": {
            "reconstruction": {"clips": 1, "frames": 2, "psnr": {"mean": 1.0, "standard_error": None}, "ssim": None},
            "generation": {},
            "missing": [],
            "caveats": [],
            "unreadable_files": {f"<i>{n}.mp4": "a & b" for n in range(30)},
        },
    }
    write_report(tmp_path / "page.html", document, {}, [])
    text = (tmp_path / "page.html").read_text()
    assert "<b>" not in text and "<i>" not in text and "alert(1)<" not in text
    assert "&lt;i&gt;0.mp4: a &amp; b" in text and "and 10 more" in text


def test_fvd_is_named_where_it_is_one() -> None:
    scores = {"clips": 2048, "frames": 16, "psnr": None, "ssim": None, "frechet_distance": 12.34, "fvd": 12.34}
    of_both = {"samples": 2048, "real_clips": 2048}
    generated = {"128": of_both | {"frechet_distance": 300.0, "fvd": 300.0, "fvd_unbiased_covariances": 300.2}}
    rows = score_rows({"reconstruction": scores, "generation": generated})
    assert rows == [
        ("R-FVD", "12.34", "2,048 clips of 16 frames"),
        ("FVD, 128 frames", "300.00", "2,048 samples and 2,048 clips of 128 frames"),
        ("FVD with PVDM's covariances, 128 frames", "300.20", "2,048 samples and 2,048 clips of 128 frames"),
    ]


def test_our_distances_are_never_called_fvd() -> None:
    distances = {"frechet_distance": (12.3, 10.0, 14.0), "kernel_distance": (0.01234, -0.001, 0.02)}
    ours = {key: dict(zip(("value", "low", "high"), value, strict=True)) for key, value in distances.items()}
    generated = {"16": {"samples": 256, "real_clips": 2048, "pvdm_fast_features": ours}}
    scores = {"clips": 2048, "frames": 16, "psnr": None, "ssim": None, "pvdm_fast_features": None}
    of = "256 samples and 2,048 clips of 16 frames"
    assert score_rows({"reconstruction": scores, "generation": generated}) == [
        ("samples, Fréchet distance, our features", "12.30 (10.00 to 14.00)", of),
        ("samples, kernel distance, our features", "0.012 (-0.001 to 0.020)", of),
    ]


def test_scenes_are_shares_of_objects_and_samples() -> None:
    reconstruction = {"clips": 30, "frames": 16, "psnr": None, "ssim": None}
    share = {"mean": 0.875, "standard_error": 0.021}
    scenes = {"objects": 700, "kinds_right": 0.9876, "samples": 64, "named": share, "path": share}
    scenes |= {"second_named": {"mean": 0.5, "standard_error": None}, "second_path": share, "frechet_distance": 0.1234}
    scenes["of_class"] = 0.625
    rows = score_rows({"reconstruction": reconstruction, "generation": {}, "scenes": scenes})
    assert rows == [
        ("reconstruction, objects with the right name", "98.8%", "700 objects in 30 clips of 16 frames"),
        ("samples, all objects named and kept, first clip", "87.5% ± 2.1%", "64 samples"),
        ("samples, all paths unbroken, first clip", "87.5% ± 2.1%", "64 samples"),
        ("samples, all objects named and kept, two clips", "50.0%", "64 samples"),
        ("samples, all paths unbroken, two clips", "87.5% ± 2.1%", "64 samples"),
        ("samples, objects of the class asked for", "62.5%", "64 samples"),
        ("samples, Fréchet distance of the scene judge's features", "0.123", "64 samples and 30 clips of 16 frames"),
    ]
    scenes = {"objects": 0, "kinds_right": None}
    assert score_rows({"reconstruction": reconstruction, "generation": {}, "scenes": scenes}) == []


def test_what_is_shared_is_said_once() -> None:
    assert list(flat({"a": {"x": "cpu", "y": "cpu", "z": "cpu"}, "b": {"c": None}})) == [
        ("a", "cpu (all 3)"),
        ("b.c", "none"),
    ]


def test_long_curves_are_thinned_evenly() -> None:
    points = np.stack([np.arange(5000), np.full(5000, 2.0)], axis=1).astype(float)
    few = thinned(points)
    assert len(few) <= MAX_POINTS and np.allclose(few[:, 1], 2) and np.all(np.diff(few[:, 0]) > 0)
    assert thinned(points[:7]).tolist() == points[:7].tolist()
    assert curves([{"stage": "diffusion", "step": 1, "loss": None}]) == []


def test_videos_are_shown_in_order(tmp_path: Path) -> None:
    for number in (10, 2):
        write_video(tmp_path / f"clip-{number}.mp4", np.full((1, 16, 16, 3), number, np.uint8))
    document = {
        "run": "r",
        "protocol": {"sampling": {}},
        "results": {
            "reconstruction": {"clips": 1, "frames": 2, "psnr": None, "ssim": None},
            "generation": {},
            "missing": [],
            "caveats": [],
            "unreadable_files": {},
        },
    }
    write_report(tmp_path / "page.html", document, {"samples": tmp_path}, [])
    text = (tmp_path / "page.html").read_text()
    assert text.index("clip 2<") < text.index("clip 10<")
