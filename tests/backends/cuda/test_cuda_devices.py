"""The bindings of pvdm_fast._cuda read a GPU's memory: tensors that are elsewhere are refused by every one of them."""

from __future__ import annotations

import pytest
import torch
from backends import arguments
from backends.cuda import emulated

from pvdm_fast.backends import choice
from pvdm_fast.backends.extensions import ExtensionError, extension


class Counted:
    """The extension, noting which of its functions were called with tensors."""

    def __init__(self, module: object) -> None:
        self.module, self.refused = module, set[str]()

    def __getattr__(self, name: str) -> object:
        function = getattr(self.module, name)
        if name.endswith("_workspace") or name == "attention_shared_memory":
            return function  # takes sizes alone

        def call(*given: object) -> object:
            with pytest.raises(ValueError, match="one device: move them"):
                function(*given)
            self.refused.add(name)
            raise Refused

        return call


class Refused(Exception):
    """What the launchers of these tests end in."""


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_binding_refuses_tensors_on_the_cpu(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    try:
        counted = Counted(extension("_cuda"))
    except ExtensionError as reason:
        pytest.skip(f"{reason} (install the CUDA toolkit first)")
    emulated.replace_device(monkeypatch, counted)  # type: ignore[arg-type]
    calls = [call for call in arguments.recorded(dtype) if call.op in choice.SERVED["cuda"]]
    assert {call.direction for call in calls} == {"forward", "backward"}
    for call in calls:
        if function := getattr(choice.implementation("cuda", call.op), call.direction, None):
            with pytest.raises(Refused):
                function(*call.arguments)
    kernels = {name for name in dir(counted.module) if name.endswith(("_forward", "_backward", "_sums"))}
    assert counted.refused == kernels
