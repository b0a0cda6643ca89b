"""Saving and loading a cache: a compressed prefix in one safetensors file."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar
from uuid import uuid4

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from vqkv.cache.layer import VQLayer
from vqkv.errors import ArtefactError, CacheError

if TYPE_CHECKING:
    from vqkv.cache.vqcache import VQCache

C = TypeVar("C", bound="VQCache")

FORMAT_VERSION = 2

#: Upstream's layers whose whole state is keys, values, and a count of the tokens seen.
_PLAIN = (DynamicLayer, DynamicSlidingWindowLayer)


def save(cache: VQCache, path: str | Path) -> None:
    """Write `cache` to `path`, all or nothing.

    Raises:
        CacheError: it is empty, or has layers of a kind that cannot be saved.
    """
    path = Path(path)
    tensors: dict[str, torch.Tensor] = {}
    layers: list[dict[str, Any]] = []
    caches: list[Any] = cache.layers  # upstream's union of layer classes shares no attributes
    for index, layer in enumerate(caches):
        if not layer.is_initialized:
            raise CacheError(f"layer {index} holds no tokens yet: there is nothing to save")
        if isinstance(layer, VQLayer):
            mine = layer.tensors()
            layers.append({"coded": layer.coded, "length": layer.get_seq_length()})
        elif type(layer) in _PLAIN:
            mine = {"keys": layer.keys, "values": layer.values}
            layers.append({"seen": getattr(layer, "cumulative_length", None)})
        else:
            raise CacheError(f"layer {index}: a {type(layer).__name__} cannot be saved")
        tensors |= {f"{index}.{name}": t.contiguous() for name, t in mine.items()}
    if cache.rows.positions is not None:
        tensors["positions"] = cache.rows.positions.contiguous()
    header = {
        "format": "vqkv-cache",
        "format_version": FORMAT_VERSION,
        "codebooks": cache.compressor.identity(),
        "layers": layers,
        "pads": cache.rows.pads,
    }
    text = json.dumps(header)
    scratch = path.with_name(f".{path.name}.{uuid4().hex}")
    scratch.touch(exist_ok=False)
    try:
        mode = scratch.stat().st_mode
        save_file(tensors, scratch, metadata={"vqkv": text, "sha256": _digest(text, tensors)})
        # Safetensors makes it readable to its owner alone; it should be like any new file here.
        scratch.chmod(mode)
        os.replace(scratch, path)
    except BaseException:
        scratch.unlink()
        raise


def load(cache: C, path: str | Path, device: torch.device | str) -> C:
    """Fill an empty `cache` from `path`, on `device`.

    Raises:
        ArtefactError: the file is missing, damaged, or does not fit the cache.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        text = metadata.get("vqkv", "{}")
        header = json.loads(text)
    except (OSError, SafetensorError, json.JSONDecodeError) as error:
        raise ArtefactError(f"{path}: no saved cache, or a damaged one: {error}") from error
    kind = (
        (header.get("format"), header.get("format_version")) if isinstance(header, dict) else None
    )
    if kind != ("vqkv-cache", FORMAT_VERSION):
        raise ArtefactError(f"{path}: not a saved cache of format version {FORMAT_VERSION}")
    # After this, names, shapes and types are as they were saved: nothing below has to look.
    digest, expected = _digest(text, tensors), metadata.get("sha256", "none")
    if digest != expected:
        raise ArtefactError(
            f"{path}: damaged or edited: the SHA-256 of what it holds is {digest[:16]}…, it "
            f"says {expected[:16]}…: save the prefix again"
        )
    if header["codebooks"] != cache.compressor.identity():
        raise ArtefactError(
            f"{path} was coded with other codebooks: {header['codebooks'][:16]}…, "
            f"this compressor's are {cache.compressor.identity()[:16]}…"
        )
    tensors = {name: tensor.to(device) for name, tensor in tensors.items()}
    caches: list[Any] = cache.layers
    for index, (layer, stored) in enumerate(zip(caches, header["layers"], strict=True)):
        prefix = f"{index}."
        mine = {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
        if isinstance(layer, VQLayer):
            layer.load_tensors(mine, stored["coded"], stored["length"])
        else:
            layer.lazy_initialization(mine["keys"], mine["values"])
            layer.keys, layer.values = mine["keys"], mine["values"]
            if stored["seen"] is not None:
                layer.cumulative_length = stored["seen"]
    cache.rows.pads = header["pads"]
    cache.rows.positions = tensors.get("positions")
    return cache


def _digest(header: str, tensors: dict[str, torch.Tensor]) -> str:
    """SHA-256 of the header and of every tensor's name, type, shape and bytes."""
    digest = hashlib.sha256(header.encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.cpu().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
