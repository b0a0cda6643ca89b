"""Folders and files that are written all or nothing, and never over anybody's own files."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

from vqkv.errors import ArtefactError


def check_free(folder: Path, files: Collection[str], *, overwrite: bool) -> None:
    """Refuse to write where something is; with `overwrite`, where more than `files` is.

    Raises:
        ArtefactError: it is in the way.
    """
    if not folder.exists():
        return
    if not overwrite:
        raise ArtefactError(
            f"{folder} exists already: choose another folder, or overwrite it on purpose "
            "(--force, or overwrite=True)"
        )
    if not folder.is_dir():
        raise ArtefactError(f"{folder} is no folder: choose another name")
    # Overwriting deletes the folder. A damaged one of ours may go too, but nobody's own files.
    others = sorted({path.name for path in folder.iterdir()} - set(files))
    if others:
        raise ArtefactError(
            f"{folder} holds more than {' and '.join(sorted(files))} ({', '.join(others[:3])}), "
            "which overwriting would delete: choose another folder"
        )


@contextmanager
def replacing(folder: Path) -> Iterator[Path]:
    """An empty folder to write into, which takes `folder`'s place when the block succeeds.

    When it fails, for a full disk or an interrupt, nothing of it stays and an older `folder` is
    as it was.
    """
    folder = folder.resolve()  # "." has neither a name nor a parent of its own
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as scratch:
        new, old = Path(scratch, "new"), Path(scratch, "old")
        new.mkdir()
        yield new
        try:
            if folder.exists():
                folder.rename(old)
            new.rename(folder)
        except BaseException:
            if old.exists() and not folder.exists():
                old.rename(folder)
            raise


def write_whole(file: Path, text: str) -> None:
    """Write a text file that is there whole or not at all; its folder is made."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{file.name}.", dir=file.parent) as scratch:
        draft = Path(scratch, "new")
        draft.write_text(text, encoding="utf-8")
        os.replace(draft, file)
