"""The pages are true: links work, their Python runs, what they name exists, and the site builds."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import yaml

import pvdm_fast
from benchmarks import (
    busy,
    call,
    cost,
    cuda_resources,
    errors,
    few_steps,
    kernel_resources,
    report,
    rows,
    samplers,
    traffic,
)
from pvdm_fast import ops
from pvdm_fast.backends import SERVED

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
YAML = sorted([*ROOT.glob(".github/**/*.yml"), ROOT / ".pre-commit-config.yaml", ROOT / "CITATION.cff"])

pages = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


# Mentioned in the worked example, though geglu doesn't touch it.
NOT_IN_EXAMPLE = {
    "csrc/cpu/vec.h",
    "csrc/bindings_cuda.cpp",
    "pvdm_fast/ops/operation.py",  # names no operation
    "tests/analysis/test_workload.py",  # named for what has no gradient
    "pvdm_fast/analysis/flops.py",  # geglu multiplies no matrices
    "tests/tolerances.py",
    "benchmarks/cases_networks.py",
}


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


@pages
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text(encoding="utf-8")):
        if not target.startswith("http"):
            assert page.parent.joinpath(target).exists(), target


@pages
def test_commands_exist(page: Path) -> None:
    for module in re.findall(r"python -m ((?:pvdm_fast|benchmarks)\.\w+)", page.read_text(encoding="utf-8")):
        assert find_spec(module), module


@pytest.mark.parametrize("name", ["docs/use_kernels.md", "docs/api/index.md", "docs/api/models.md"])
def test_python_runs(name: str) -> None:
    """The blocks of a page, one after another."""
    blocks = re.findall(r"^```python\n(.*?)^```$", read(name), re.MULTILINE | re.DOTALL)
    assert blocks
    names: dict[str, Any] = {}
    for block in blocks:
        exec(compile(block, name, "exec"), names)


def test_contributing_names_files_that_exist() -> None:
    """And the worked example covers all of them."""
    text = read("CONTRIBUTING.md")
    named = {path for path in re.findall(r"`([\w./]+\.(?:py|cpp|h|cu|md|toml))`", text) if "/" in path}
    assert len(named) > 15
    missing = [path for path in named if not (ROOT / path).exists()]
    assert not missing
    example = text.partition("[start:operation]")[2].partition("[end:kernel]")[0]
    touched = set(re.findall(r"`([\w/]+\.(?:py|cpp|h))`", example)) & named - NOT_IN_EXAMPLE
    assert not [path for path in touched if "geglu" not in path + (ROOT / path).read_text(encoding="utf-8")]


def test_the_api_has_every_public_name() -> None:
    text = "".join(page.read_text(encoding="utf-8") for page in (ROOT / "docs" / "api").glob("*.md"))
    described = re.findall(r"^::: ([\w.]+)$", text, re.MULTILINE)
    names = {name.rpartition(".")[2] for name in described}
    assert set(ops.__all__) <= names
    assert {name for name in pvdm_fast.__all__ if name != "__version__"} <= names
    assert len(described) == len(set(described))


def test_the_api_says_which_backend_serves() -> None:
    lines = re.findall(r"^\| `(\w+)` \|(.*)\|$", read("docs/api/operations.md"), re.MULTILINE)
    served = {op: [cell.strip() == "yes" for cell in cells.split("|")] for op, cells in lines}
    backends = ("reference", "cpu", "triton", "cuda")
    assert served == {op: [op in SERVED[name] for name in backends] for op in SERVED["reference"]}


def test_generated_tables_have_their_place() -> None:
    names = {
        report.DOCUMENT: ["machine", "base", "memory"],
        report.SMALL: ["small"],
        errors.DOCUMENT: ["errors"],
        cost.DOCUMENT: ["cost"],
        traffic.DOCUMENT: ["traffic"],
        samplers.DOCUMENT: ["samplers"],
        few_steps.DOCUMENT: ["few-steps"],
        call.DOCS: ["call"],
        busy.PAGE: ["busy"],
    }
    places = {page: [f"<!-- {end}{name} -->" for name in found for end in ("", "/")] for page, found in names.items()}
    places[kernel_resources.DOCS] = [kernel_resources.BEGIN, kernel_resources.END]
    places[cuda_resources.DOCS] = [cuda_resources.BEGIN, cuda_resources.END]
    marked = {page: re.findall(r"^<!-- .+ -->$", page.read_text(), re.MULTILINE) for page in PAGES if page in places}
    assert marked == places
    others = {page for page in (ROOT / "docs" / "results").glob("*.md") if "<!-- " in page.read_text()}
    assert others == set(places), "a page has marks of which no command is known here"


def test_speeds_of_the_readme_are_stored_rows() -> None:
    stored = rows.newest(rows.read(ROOT / "benchmarks/results/amd-epyc-26-2-2-threads.jsonl"))
    by_key = {(row["case"], row["direction"], row["dtype"]): row for row in stored if row["size"] == "base"}
    case = r"(denoiser|autoencoder, (?:encode|decode)|cross-plane attention block)"
    line = rf"^\| {case}(?:, (forward|forward \+ backward))? \| (fp32|bf16) \| ([\d.]+) (ms|s) \|(.*)\|$"
    found = re.findall(line, read("README.md"), re.MULTILINE)
    assert len(found) == 12
    names = {"cross-plane attention block": "block/cross-plane attention"}
    for label, direction, dtype, time, unit, cells in found:
        name = names.get(label, label.replace(",", ""))
        row = by_key[name, "both" if "backward" in direction else "forward", dtype]
        seconds = float(time) / (1000 if unit == "ms" else 1)
        assert seconds == pytest.approx(row["seconds"]["ours"][1], rel=6e-3), label
        shown = [float(cell.strip(" x%")) for cell in cells.split("|")]
        ratios = [row["ratio"][rival][1] for rival in ("eager", "sdpa", "eager" if dtype == "fp32" else "eager fp32")]
        for value, exact, digits in zip(shown, ratios, (1, 2, 1), strict=False):
            assert abs(value - exact) <= 0.51 * 10**-digits, label


@pytest.mark.parametrize("path", YAML, ids=lambda path: path.name)
def test_yaml_parses(path: Path) -> None:
    assert isinstance(yaml.safe_load(path.read_text(encoding="utf-8")), dict)


def test_tests_that_pages_name_exist() -> None:
    there = {path.name for path in (ROOT / "tests").rglob("test_*.py")}
    for path in (*(ROOT / "docs").glob("*.md"), ROOT / "README.md", ROOT / "CONTRIBUTING.md"):
        named = set(re.findall(r"\btest_\w+\.py", path.read_text(encoding="utf-8")))
        assert named <= there, (path.name, named - there)


def test_ci_runs_every_python_that_is_promised() -> None:
    workflow = yaml.safe_load(read(".github/workflows/ci.yml"))
    job = workflow["jobs"]["ci"]
    assert job["strategy"]["matrix"]["python"] == ["3.10", "3.11", "3.12", "3.13"]
    assert 'requires-python = ">=3.10"' in read("pyproject.toml")
    assert [step["run"] for step in job["steps"] if "run" in step] == [".ci/run"]
    wheel = [step["run"] for step in workflow["jobs"]["wheel"]["steps"] if "run" in step]
    assert [command.split()[:2] for command in wheel] == [[".ci/wheels", "build"], [".ci/wheels", "try"]]
    oldest = [step["run"] for step in workflow["jobs"]["oldest"]["steps"] if "run" in step]
    assert [command.split()[0] for command in oldest] == [".ci/oldest"] and ".ci/oldest" in read("CONTRIBUTING.md")


def test_faults_are_reported_with_what_the_machine_says() -> None:
    for name in ("fault", "speed"):
        form = yaml.safe_load(read(f".github/ISSUE_TEMPLATE/{name}.yml"))
        required = [f["attributes"]["label"] for f in form["body"] if f.get("validations", {}).get("required")]
        for command in ("info", "selftest"):
            assert f"Output of `python -m pvdm_fast.{command}`" in required


def test_citation_is_of_this_version() -> None:
    assert yaml.safe_load(read("CITATION.cff"))["version"] == pvdm_fast.__version__


def test_hooks_are_the_linters_of_ci() -> None:
    (repository,) = yaml.safe_load(read(".pre-commit-config.yaml"))["repos"]
    assert [hook["entry"] for hook in repository["hooks"]] == ["ruff check --fix", "ruff format", "mypy"]


def test_ci_builds_the_site_with_the_extra_docs() -> None:
    (extra,) = re.findall(r"^docs = \[(.*)\]", read("pyproject.toml"), re.MULTILINE)
    requirements = re.findall(r'"([^"]+)"', extra)
    assert requirements
    assert all(f'"{requirement}"' in read(".ci/run") for requirement in requirements)
    assert "mkdocs build --strict" in read(".ci/run")


@pytest.mark.slow
def test_the_site_builds(tmp_path: Path) -> None:
    """Strictly: no dead link, no page outside the navigation. And no page loads anything from elsewhere."""
    mkdocs = shutil.which("mkdocs", path=str(Path(sys.executable).parent)) or shutil.which("mkdocs")
    if mkdocs is None:
        pytest.skip('mkdocs is not installed: pip install -e ".[docs]"')
    result = subprocess.run(
        [mkdocs, "build", "--strict", "--quiet", "--site-dir", str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    built = list(tmp_path.rglob("*.html"))
    assert len(built) > len(list((ROOT / "docs").rglob("*.md")))  # and a page for "not found"
    for page in built:
        loaded = re.findall(r"<(?:script|link|img|iframe)\b[^>]*\b(?:src|href)=[\"']?(https?:)?//", page.read_text())
        assert not loaded, page.name
        shown = re.search(r":(?:func|class|mod|meth):", page.read_text())
        assert shown is None, f"{page.name}: a Sphinx role in a docstring stays as it is; write backticks"
