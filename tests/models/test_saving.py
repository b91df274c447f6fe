"""Models in folders: rights as the umask says, and casts without a warning."""

from __future__ import annotations

import logging
import os
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from pvdm_fast.models import Denoiser


@pytest.fixture(params=[0o022, 0o027, 0o077])
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def small() -> Denoiser:
    return Denoiser(time=2, height=2, width=2, model_channels=32, channel_mult=[1], num_res_blocks=1, num_heads=2)


def test_rights_are_those_of_any_new_file(umask: int, tmp_path: Path) -> None:
    small().save_pretrained(tmp_path)
    files = list(tmp_path.iterdir())
    assert {path.suffix for path in files} == {".json", ".safetensors"}
    assert {stat.S_IMODE(path.stat().st_mode) for path in files} == {0o666 & ~umask}


def test_casts_give_no_warning(caplog: pytest.LogCaptureFixture) -> None:
    from diffusers.utils import logging as theirs

    logger = logging.getLogger("diffusers.models.modeling_utils")
    theirs.enable_propagation()
    try:
        model = small().to(torch.bfloat16).half()
        model.to(dtype=torch.float32)
        logger.warning("shown")
    finally:
        theirs.disable_propagation()
    assert {record.message for record in caplog.records} == {"shown"}
