"""Models in folders: saved with the rights and the checksums of their neighbours, loaded from folders alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pvdm_fast.jobs.checksums import NAME, write_checksums
from pvdm_fast.jobs.files import expect_folder, share_as_usual


class InFolders:
    """Put before diffusers' ``ModelMixin``: models are loaded from folders alone, and what is saved can be read by whom
    the umask allows, with the right checksums where there were some."""

    def save_pretrained(self, save_directory: str | Path, *arguments: Any, **options: Any) -> Any:
        """Like diffusers' own."""
        result = super().save_pretrained(save_directory, *arguments, **options)  # type: ignore[misc]
        folder = Path(save_directory)
        for weights in folder.glob("*.safetensors"):
            share_as_usual(weights)
        if (folder / NAME).is_file():
            write_checksums(folder)
        return result

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **options: Any) -> Any:
        """As diffusers' own, of a folder; raises UserError where there is none."""
        check_folder(pretrained_model_name_or_path)
        return super().from_pretrained(pretrained_model_name_or_path, **options)  # type: ignore[misc]


def check_folder(path: str | Path) -> None:
    """Raises UserError for what is no folder here. Diffusers would look for a repository of that name on a hub."""
    remedy = f"; a repository of a hub is fetched first, by huggingface_hub.snapshot_download({str(path)!r})"
    expect_folder(Path(path), remedy)
