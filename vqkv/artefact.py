"""Artefacts: a folder with `config.json` and `codebooks.safetensors`, written all or nothing."""

from __future__ import annotations

import hashlib
import json
import math
import tempfile
import warnings
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from vqkv.codebooks import Health
from vqkv.compressor import KVCompressor, Provenance
from vqkv.errors import ArtefactError, NotFittedError, StateError
from vqkv.folders import check_free, replacing
from vqkv.geometry import Geometry
from vqkv.registry import short
from vqkv.scheme import fingerprint
from vqkv.scheme_files import scheme_from_dict
from vqkv.version import __version__

#: 2: overrides of layers count compressed ones.
FORMAT_VERSION = 2
CONFIG = "config.json"
CODEBOOKS = "codebooks.safetensors"
#: All that is in an artefact's folder.
FILES = frozenset({CONFIG, CODEBOOKS})

#: Fields of `config.json` that loading needs, and what each one is.
_FIELDS: dict[str, type | tuple[type, ...]] = {
    "scheme": dict,
    "fingerprint": str,
    "geometry": dict,
    "base_model": (str, type(None)),
    "calibration": dict,
    "codebooks_sha256": str,
    "health": dict,
}


def save(compressor: KVCompressor, folder: Path, *, overwrite: bool) -> Path:
    """Write `compressor` to `folder`. Raises NotFittedError, ArtefactError, OSError."""
    if not compressor.fitted:
        raise NotFittedError(f"{compressor!r} has nothing to save: fit it first")
    check_free(folder, FILES, overwrite=overwrite)
    with replacing(folder) as work:
        tensors = {f"{s}.{name}": t.contiguous().clone() for s, name, t in compressor.tensors()}
        save_file(tensors, work / CODEBOOKS)
        config = {
            "format": "vqkv",
            "format_version": FORMAT_VERSION,
            "library_version": __version__,
            "scheme": compressor.scheme.to_dict(),
            "fingerprint": compressor.scheme.fingerprint(),
            "geometry": compressor.geometry.to_dict(),
            "base_model": compressor.provenance.base_model,
            "calibration": compressor.provenance.calibration,
            "codebooks_sha256": _sha256(work / CODEBOOKS),
            "health": _health(compressor),
        }
        text = json.dumps(config, indent=2, sort_keys=True, allow_nan=False)
        (work / CONFIG).write_text(text + "\n", encoding="utf-8")
    return folder


def load(name_or_folder: str | Path, config: Any = None) -> KVCompressor:
    """Read an artefact and check all of it before anything is built. Raises ArtefactError."""
    folder = _locate(name_or_folder)
    stored = read_config(folder)
    codebooks = folder / CODEBOOKS
    if not codebooks.is_file():
        raise ArtefactError(f"{folder}: {CODEBOOKS} is missing")
    digest = _sha256(codebooks)
    if digest != stored["codebooks_sha256"]:
        raise ArtefactError(
            f"{codebooks}: damaged, cut short, or from another artefact: its SHA-256 is "
            f"{digest[:16]}…, {CONFIG} expects {stored['codebooks_sha256'][:16]}…"
        )
    scheme = scheme_from_dict(stored["scheme"], f"{folder / CONFIG}: scheme")
    try:
        geometry = Geometry.from_dict(stored["geometry"])
        health = _health_from_dict(stored["health"])
    except (KeyError, TypeError, AttributeError) as error:
        raise ArtefactError(f"{folder / CONFIG}: damaged: {error!r}") from error
    if config is not None:
        check_fits(geometry, stored["base_model"], config, str(folder))
    provenance = Provenance(stored["base_model"], stored["calibration"])
    compressor = KVCompressor(scheme, geometry, provenance)
    try:
        return compressor.load_tensors(load_file(codebooks), health)
    except (SafetensorError, StateError) as error:
        raise ArtefactError(f"{codebooks}: {error}") from error


def read_config(folder: Path) -> dict[str, Any]:
    """`config.json` of an artefact. Raises ArtefactError where it is missing or not ours."""
    path = folder / CONFIG
    if not path.is_file():
        raise ArtefactError(f"{folder}: no vqkv artefact, {CONFIG} is missing")
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ArtefactError(f"{path}: damaged: {error}") from error
    if not isinstance(stored, dict) or stored.get("format") != "vqkv":
        raise ArtefactError(f"{path}: not a vqkv artefact (`format` is not 'vqkv')")
    if stored.get("format_version") != FORMAT_VERSION:
        raise ArtefactError(
            f"{path}: format version {stored.get('format_version')}, "
            f"vqkv {__version__} reads version {FORMAT_VERSION}"
        )
    missing = sorted(set(_FIELDS) - set(stored))
    if missing:
        raise ArtefactError(f"{path}: damaged: {missing} are missing")
    for name, kind in _FIELDS.items():
        if not isinstance(stored[name], kind):
            raise ArtefactError(f"{path}: damaged: `{name}` is {short(stored[name])}")
    if fingerprint(stored["scheme"]) != stored["fingerprint"]:
        raise ArtefactError(f"{path}: damaged or edited: `scheme` is not what `fingerprint` says")
    return stored


def check_fits(geometry: Geometry, base_model: str | None, config: Any, where: str) -> None:
    """Refuse a model of another geometry; warn of another id. Raises ArtefactError."""
    wanted = Geometry.from_config(config)
    differences = geometry.mismatches(wanted)
    if differences:
        raise ArtefactError(
            f"{where} was made for another model than the one given (its own != the model's):\n  "
            + "\n  ".join(differences)
        )
    given = base_model_name(config)
    if base_model and given and base_model != given:
        warnings.warn(
            f"{where} was calibrated on {base_model!r}, the model given is {given!r}: geometry "
            "agrees, quality may not",
            stacklevel=3,
        )


def base_model_name(config: Any) -> str | None:
    """The hub id of the model that a config came with, or the name of its folder."""
    given = getattr(config, "_name_or_path", "")
    # A path says nothing on another machine.
    return Path(given).resolve().name if given and Path(given).is_dir() else given or None


def push(compressor: KVCompressor, repo_id: str, *, private: bool) -> str:
    """Upload to the hub. Raises NotFittedError, or the hub's own errors."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = save(compressor, Path(scratch) / "artefact", overwrite=False)
        api = HfApi()
        api.create_repo(repo_id, private=private, exist_ok=True)
        return str(api.upload_folder(repo_id=repo_id, folder_path=folder))


def _locate(name_or_folder: str | Path) -> Path:
    folder = Path(name_or_folder)
    if folder.is_dir():
        return folder
    name = folder.as_posix()
    if name.count("/") != 1 or name.startswith(("/", ".", "~")):
        raise ArtefactError(f"{name}: no such folder; an artefact on the hub is called org/name")
    try:
        return Path(snapshot_download(name, allow_patterns=sorted(FILES)))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise ArtefactError(
            f"{name}: neither a folder here nor an artefact on the hub ({error})"
        ) from error


def _health(compressor: KVCompressor) -> dict[str, Any]:
    """Health by stream; grids that learned nothing have none."""
    return {
        f"{layer}.{stream}": [
            h.to_dict() for h in codec.health if h.inertia and math.isfinite(h.entropy)
        ]
        for (layer, stream), codec in compressor.codecs()
    }


def _health_from_dict(stored: dict[str, Any]) -> dict[str, list[Health]]:
    return {
        stream: [Health.from_dict(stage) for stage in stages] for stream, stages in stored.items()
    }


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        for block in iter(lambda: file.read(1 << 20), b""):
            digest.update(block)
    return digest.hexdigest()
