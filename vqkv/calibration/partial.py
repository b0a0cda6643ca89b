"""`<out>.partial`: the work in progress of a calibration, which survives a kill."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from vqkv.calibration.spool import Spool
from vqkv.codebooks.base import Health
from vqkv.compressor import FittedStream
from vqkv.errors import REFUSALS, ArtefactError

log = logging.getLogger(__name__)

_LOCK = "lock"
_MANIFEST = "manifest.json"
_DRAFT = "manifest.new"
_STATES = "states"
_FITTED = "fitted"
_DISTILLED = "distilled"


@contextmanager
def working(partial: Path) -> Iterator[None]:
    """Hold the folder of work in progress, alone; it stays where the block is interrupted.

    States, schemes and models that the block refuses it would refuse again, so then nothing is
    kept. Anything else, such as a folder in the way or a library that is missing, can be mended.

    Raises:
        ArtefactError: the folder holds other things, another process is at work in it, or the
            disk is full.
    """
    try:
        partial.mkdir(parents=True, exist_ok=True)
        _check_ours(partial)
        with FileLock(partial / _LOCK, timeout=0):
            try:
                yield
            except REFUSALS:
                shutil.rmtree(partial)
                raise
    except Timeout as error:
        raise ArtefactError(f"{partial}: another calibration is writing there") from error
    # safetensors reports a full disk as an error of its own.
    except (OSError, SafetensorError) as error:
        raise ArtefactError(
            f"{partial}: cannot go on writing: {error}. What is done is kept there: make room and "
            "calibrate again, or delete it"
        ) from error


def _check_ours(partial: Path) -> None:
    """The folder will be deleted, so nothing else may be in it."""
    ours = {_LOCK, _MANIFEST, _DRAFT, _STATES, _FITTED, _DISTILLED}
    others = {path.name for path in partial.iterdir()} - ours
    if others:
        raise ArtefactError(
            f"{partial} is where work in progress goes, but it holds {', '.join(sorted(others))}: "
            "move it away or choose another output folder"
        )


def resume(partial: Path, manifest: dict[str, Any], sinks: int) -> Spool:
    """The spool of an interrupted calibration where everything agrees, else a fresh one."""
    path = partial / _MANIFEST
    # As it comes back from JSON: tuples become lists.
    wanted = json.loads(json.dumps(manifest))
    if path.exists():
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            differ = sorted(key for key in wanted if found.get(key) != wanted[key])
            if not differ:
                spool = Spool(partial / _STATES, sinks)
                log.info("%s: going on after %d windows", partial, spool.windows)
                return spool
            log.warning("%s: starting anew, %s differ", partial, ", ".join(differ))
        except (ValueError, AttributeError, ArtefactError) as error:
            log.warning("%s: starting anew, %s", partial, error)
    # The manifest goes first and comes last: what it vouches for is always whole.
    path.unlink(missing_ok=True)
    for name in (_STATES, _FITTED, _DISTILLED):
        if (partial / name).exists():
            shutil.rmtree(partial / name)
    draft = partial / _DRAFT
    draft.write_text(json.dumps(wanted, indent=2, sort_keys=True), encoding="utf-8")
    draft.replace(path)
    return Spool(partial / _STATES, sinks)


def save_whole(
    tensors: dict[str, torch.Tensor], path: Path, metadata: dict[str, str] | None = None
) -> None:
    """Write tensors as a safetensors file that appears whole, or takes another one's place."""
    draft = path.with_suffix(".new")
    # safetensors wants memory of its own for each.
    own = {name: tensor.contiguous().clone() for name, tensor in tensors.items()}
    save_file(own, draft, metadata)
    draft.replace(path)


def distilled_file(partial: Path) -> Path:
    """Where distillation keeps what is done."""
    folder = partial / _DISTILLED
    folder.mkdir(exist_ok=True)
    return folder / "steps.safetensors"


class StreamFiles(MutableMapping[str, FittedStream]):
    """Fitted streams as files of the work in progress, one each, that appear whole."""

    def __init__(self, partial: Path) -> None:
        self.folder = partial / _FITTED
        self.folder.mkdir(exist_ok=True)

    def __getitem__(self, name: str) -> FittedStream:
        """Raises KeyError where it has not been fitted, or its file is damaged and now deleted."""
        path = self._path(name)
        if not path.exists():
            raise KeyError(name)
        try:
            return _read_stream(path)
        except (SafetensorError, LookupError, ValueError, TypeError) as error:
            log.warning("%s: damaged, so fitted anew: %s", path, error)
            path.unlink()
            raise KeyError(name) from error

    def __setitem__(self, name: str, fitted: FittedStream) -> None:
        health = json.dumps([h.to_dict() for h in fitted.health])
        save_whole(fitted.tensors, self._path(name), {"health": health})

    def __delitem__(self, name: str) -> None:
        self._path(name).unlink()

    def __iter__(self) -> Iterator[str]:
        return (path.stem for path in sorted(self.folder.glob("*.safetensors")))

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}.safetensors"


def _read_stream(path: Path) -> FittedStream:
    with safe_open(path, "pt") as file:
        stages = json.loads(file.metadata()["health"])
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - no dict
    return FittedStream(tensors, [Health.from_dict(stage) for stage in stages])
