"""`torch.ops.pvdm_fast.<op>` after `import pvdm_fast` alone, which imports neither torch nor the operations.

Importing both takes longer than a command's `--help` should. So PyTorch's namespace of the operations gets a hook that
imports them on first use. If torch isn't loaded yet, the hook is set as soon as it is.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any


class _AfterTorch:
    """Finds torch as Python itself does, once, and sets the hook after loading."""

    def find_spec(self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None) -> Any:
        if name != "torch":
            return None
        sys.meta_path.remove(self)
        spec: ModuleSpec | None = PathFinder.find_spec(name, path, target)
        if spec is not None and spec.loader is not None:
            load: Any = spec.loader
            execute = load.exec_module

            def execute_and_prepare(module: ModuleType) -> None:
                execute(module)
                load.exec_module = execute
                _prepare()

            load.exec_module = execute_and_prepare
        return spec


def _prepare() -> None:
    import torch

    namespace: Any = torch.ops.pvdm_fast
    plain: Any = type(namespace)

    class Unregistered(plain):
        """The namespace until its first use. Then it imports the operations and becomes a plain one."""

        def __getattr__(self, name: str) -> Any:
            if name.startswith("__"):
                return super().__getattr__(name)
            self.__class__ = plain
            import pvdm_fast.ops  # noqa: F401

            return getattr(self, name)

    namespace.__class__ = Unregistered


def register_when_used() -> None:
    """Let the first use of `torch.ops.pvdm_fast` import `pvdm_fast.ops`."""
    if "torch" in sys.modules:
        _prepare()
    else:
        sys.meta_path.insert(0, _AfterTorch())
