"""Names of devices, and which device a command gets for one."""

from __future__ import annotations

import pytest
import torch

from pvdm_fast.errors import UserError
from pvdm_fast.jobs.devices import DEVICE, claim_device


@pytest.mark.parametrize("name", ["auto", "cpu", "cuda", "cuda:0", "cuda:12"])
def test_names(name: str) -> None:
    assert DEVICE.checked("--device", name) == name


@pytest.mark.parametrize("name", ["tpu", "gpu", "cuda:", "cuda:-1", "cuda:1x", "CPU", "cpu:0", "", 3, None])
def test_other_names_are_refused(name: object) -> None:
    with pytest.raises(UserError, match="--device must be auto, cpu, cuda or cuda:N, not "):
        DEVICE.checked("--device", name)


def test_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert claim_device("auto") == claim_device("cpu") == torch.device("cpu")
    for name in ("cuda", "cuda:0"):
        with pytest.raises(UserError, match=f"--device {name}: PyTorch finds no GPU here.*choose auto or cpu"):
            claim_device(name)


def test_with_two_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stand-ins for PyTorch's own answers."""
    current: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    assert claim_device("auto") == claim_device("cuda") == torch.device("cuda")
    assert not current, "several processes: the launcher's variables say which"
    assert claim_device("cuda:1") == torch.device("cuda", 1)
    assert current == [torch.device("cuda", 1)]
    with pytest.raises(UserError, match="--device cuda:2: there are 2 GPUs, numbered from cuda:0"):
        claim_device("cuda:2")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="several processes take a GPU each; choose --device cuda"):
        claim_device("cuda:1")
    assert claim_device("cuda") == torch.device("cuda")
