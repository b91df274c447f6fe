"""Saving a model over one that has checksums: they are written anew, else the folder would count as damaged."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pvdm_fast.jobs.checksums import NAME, write_checksums


class ChecksumsKept:
    """Put before diffusers' ``ModelMixin``: ``save_pretrained`` leaves the right checksums where there were some."""

    def save_pretrained(self, save_directory: str | Path, *arguments: Any, **options: Any) -> Any:
        """As diffusers' own."""
        result = super().save_pretrained(save_directory, *arguments, **options)  # type: ignore[misc]
        folder = Path(save_directory)
        if (folder / NAME).is_file():
            write_checksums(folder)
        return result
