"""What `pvdm_fast` shows: its public names, where the others live, and types for your type checker."""

from __future__ import annotations

import subprocess
import sys
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import pytest

import pvdm_fast

ROOT = Path(__file__).resolve().parents[1]
USER_SCRIPT = """
import torch
from pvdm_fast import PVDMPipeline, TriplaneAttention, TriplaneLayout, use_backend
from pvdm_fast.models import Autoencoder, Denoiser
from pvdm_fast.ops import geglu, segment_attention

layout = TriplaneLayout(time=4, height=8, width=8)
tokens: int = layout.num_tokens
attention: torch.nn.Module = TriplaneAttention(channels=32, num_heads=4)
out: torch.Tensor = geglu(torch.randn(2, 8))
attended: torch.Tensor = segment_attention(torch.randn(1, tokens, 3, 2, 16), [0, tokens])
with use_backend("reference"):
    geglu(out)
autoencoder: Autoencoder = Autoencoder.from_preset("tiny")
denoiser: Denoiser = Denoiser.from_preset("tiny")
pipeline: PVDMPipeline = PVDMPipeline.from_pretrained("run")
wrong: str = geglu(out)
"""


def test_dir_lists_the_public_names() -> None:
    assert dir(pvdm_fast) == sorted(pvdm_fast.__all__)
    assert all(hasattr(pvdm_fast, name) for name in dir(pvdm_fast))


def test_other_names_say_where_they_live() -> None:
    for module, names in pvdm_fast._ELSEWHERE.items():
        for name in names:
            assert hasattr(import_module(module), name)
            with pytest.raises(ImportError, match=f"{name} lives in {module}: from {module} import {name}"):
                getattr(pvdm_fast, name)
    named = {name for names in pvdm_fast._ELSEWHERE.values() for name in names} | set(pvdm_fast.__all__)
    for module in ("ops", "models", "nn"):
        assert set(import_module(f"pvdm_fast.{module}").__all__) <= named, "a new name: add it to pvdm_fast/__init__.py"
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = pvdm_fast.nonsense  # type: ignore[attr-defined]


@pytest.mark.parametrize("module", ["pipeline", "schedulers", "checkpoints", "backends"])
def test_old_import_paths_work(module: str) -> None:
    old = import_module(f"pvdm_fast.{module}")
    assert all(hasattr(old, name) for name in old.__all__)


@pytest.mark.slow
@pytest.mark.skipif(find_spec("mypy") is None, reason="needs mypy: pip install mypy")
def test_types_reach_a_users_script(tmp_path: Path) -> None:
    """Under strict checks everything passes except the last line, which is wrong."""
    (tmp_path / "script.py").write_text(USER_SCRIPT)
    command = ["-m", "mypy", "--strict", "--follow-imports=silent", f"--cache-dir={tmp_path}", "script.py"]
    (tmp_path / "mypy.ini").write_text(f"[mypy]\nmypy_path = {ROOT}\n")
    result = subprocess.run([sys.executable, *command], cwd=tmp_path, capture_output=True, text=True)
    errors = [line for line in result.stdout.splitlines() if "error" in line and line.startswith("script.py")]
    assert len(errors) == 1 and 'expression has type "Tensor", variable has type "str"' in errors[0], result.stdout
    assert (ROOT / "pvdm_fast" / "py.typed").exists()
