"""Saving and loading a cache: a compressed prefix in one safetensors file."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from vqkv.cache.layer import VQLayer
from vqkv.errors import ArtefactError, CacheError

if TYPE_CHECKING:
    from vqkv.cache.vqcache import VQCache

C = TypeVar("C", bound="VQCache")

FORMAT_VERSION = 1

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
    handle, scratch = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    os.close(handle)
    try:
        save_file(tensors, scratch, metadata={"vqkv": json.dumps(header)})
        os.replace(scratch, path)
    except BaseException:
        os.unlink(scratch)
        raise


def load(cache: C, path: str | Path) -> C:
    """Fill an empty `cache` from `path`. Raises ArtefactError where the file does not fit it."""
    try:
        with safe_open(path, framework="pt") as file:
            header = json.loads((file.metadata() or {}).get("vqkv", "{}"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise ArtefactError(f"{path}: no saved cache, or a damaged one: {error}") from error
    if (header.get("format"), header.get("format_version")) != ("vqkv-cache", FORMAT_VERSION):
        raise ArtefactError(f"{path}: not a saved cache of format version {FORMAT_VERSION}")
    if header["codebooks"] != cache.compressor.identity():
        raise ArtefactError(
            f"{path} was coded with other codebooks: {header['codebooks'][:16]}…, "
            f"this compressor's are {cache.compressor.identity()[:16]}…"
        )
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
