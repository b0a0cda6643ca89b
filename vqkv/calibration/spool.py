"""States on disk, so that memory does not grow with tokens.

One file per layer and kind of state, `3.pre_keys.raw`: tokens in a row, each `[H, D]`,
little-endian, in the type that the model computes in. `index.json` says how much of the files is
whole; what a killed process wrote beyond that is cut off when the spool is opened again. Files are
read with plain reads: pages of a memory map would count as resident memory. Of queries the sums of
their products can be kept, in `products-7.safetensors` after 7 windows. `3.keys.decoded` are
reconstructions, made when needed.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from vqkv.calibration.capture import Kind
from vqkv.codebooks.base import check_finite
from vqkv.errors import ArtefactError, StateError
from vqkv.layouts import Stream
from vqkv.states import CHUNK_TOKENS, States

_INDEX = "index.json"
#: The bits of a state, as integers of its size.
_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True)
class _Form:
    """What one token of a stream looks like."""

    dtype: str
    heads: int
    head_dim: int

    @property
    def torch_dtype(self) -> torch.dtype:
        found: torch.dtype = getattr(torch, self.dtype)
        return found

    @property
    def token_bytes(self) -> int:
        return self.heads * self.head_dim * self.torch_dtype.itemsize


class Spool:
    """Appends states window by window and reads them back.

    Args:
        folder: made where it is missing; an earlier spool in it is gone on with.
        sinks: tokens at the start of each window to leave out, because a cache keeps them exact.

    Raises:
        ArtefactError: what is in the folder is damaged.
    """

    def __init__(self, folder: Path, sinks: int) -> None:
        self.folder = folder
        self.sinks = sinks
        self.windows = 0
        self.tokens = 0
        self._pending = 0
        self._forms: dict[str, _Form] = {}
        self._products: dict[str, torch.Tensor] = {}
        folder.mkdir(parents=True, exist_ok=True)
        if (folder / _INDEX).exists():
            self._read_index()
        self._cut()

    def append(self, layer: int, kind: Kind, x: torch.Tensor) -> None:
        """Add states `[B, H, T, D]` of the current window, of any kind that a capture hands out.

        Raises:
            StateError: NaN or infinity; names layer, stream and window.
        """
        x = x[:, :, self.sinks :].transpose(1, 2).flatten(0, 1)  # [N, H, D]
        check_finite(x, f"{kind} of layer {layer} in window {self.windows}", "[T, H, D]")
        name = f"{layer}.{kind}"
        form = _Form(str(x.dtype).removeprefix("torch."), *x.shape[1:])
        if self._forms.setdefault(name, form) != form:
            raise StateError(f"{name}: the spool holds {self._forms[name]}, given {form}")
        self._pending = x.shape[0]
        bits = x.contiguous().cpu().view(_BITS[x.dtype.itemsize]).numpy()
        with self._path(name).open("ab") as file:
            file.write(bits.astype(bits.dtype.newbyteorder("<"), copy=False).data)

    def add_queries(self, layer: int, kind: Kind, queries: torch.Tensor) -> None:
        """Add what queries `[B, Q, T, D]` of the current window sum up to.

        Raises:
            StateError: NaN or infinity; names layer and window.
        """
        queries = queries[:, :, self.sinks :]
        check_finite(queries, f"{kind} of layer {layer} in window {self.windows}", "[B, Q, T, D]")
        rows = rearrange(queries.double(), "b q t d -> q (b t) d")
        product = rows.transpose(1, 2) @ rows
        name = f"{layer}.{kind}"
        held = self._products.get(name)
        self._products[name] = product.cpu() + (0 if held is None else held)

    def query_moments(self, layer: int, kind: Kind) -> torch.Tensor:
        """`Σ_q = E[q qᵀ]` of each query head, `[Q, D, D]` in fp64."""
        name = f"{layer}.{kind}"
        if name not in self._products:
            raise StateError(f"{kind} of layer {layer}: none were captured")
        return self._products[name] / self.tokens

    def finish_window(self) -> None:
        """The current window is whole: keep it."""
        self.windows += 1
        if self._products:
            save_file(self._products, self._products_path(self.windows))
        self.tokens += self._pending
        index = {
            "windows": self.windows,
            "tokens": self.tokens,
            "products": bool(self._products),
            "streams": {name: asdict(form) for name, form in self._forms.items()},
        }
        draft = self.folder / f"{_INDEX}.new"
        draft.write_text(json.dumps(index), encoding="utf-8")
        os.replace(draft, self.folder / _INDEX)
        self._products_path(self.windows - 1).unlink(missing_ok=True)

    def states(self, layer: int, kind: Kind) -> States:
        """What was captured of one kind, in the order of its windows."""
        name = f"{layer}.{kind}"
        if name not in self._forms:
            raise StateError(f"{kind} of layer {layer}: there are no tokens to learn from")
        return States(self.tokens, lambda: self._chunks(self._path(name), self._forms[name]))

    def kept(self, layer: int, stream: Stream, states: States) -> States:
        """The same states, computed once and kept on disk until `forget`."""
        path = self._decoded_path(layer, stream)
        form = None
        with path.open("wb") as file:
            for chunk in states.chunks():
                form = _Form("float32", *chunk.shape[1:])
                file.write(chunk.float().cpu().contiguous().numpy().astype("<f4", copy=False).data)
        if form is None:
            raise StateError(f"{stream} of layer {layer}: there are no tokens to keep")
        kept = form
        return States(self.tokens, lambda: self._chunks(path, kept))

    def forget(self, layer: int, stream: Stream) -> None:
        """What `kept` keeps of a stream is needed no more."""
        self._decoded_path(layer, stream).unlink(missing_ok=True)

    def _chunks(self, path: Path, form: _Form) -> Iterator[torch.Tensor]:
        bits = _BITS[form.torch_dtype.itemsize]
        stored = np.dtype(f"<i{form.torch_dtype.itemsize}")
        with path.open("rb") as file:
            for start in range(0, self.tokens, CHUNK_TOKENS):
                count = min(CHUNK_TOKENS, self.tokens - start) * form.token_bytes
                data = bytearray(count)
                if file.readinto(data) != count:
                    raise ArtefactError(f"{path}: damaged, it ends too early")
                native = np.frombuffer(data, stored).astype(stored.newbyteorder("="), copy=False)
                chunk = torch.from_numpy(native).to(bits).view(form.torch_dtype)
                yield chunk.view(-1, form.heads, form.head_dim).float()

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}.raw"

    def _decoded_path(self, layer: int, stream: Stream) -> Path:
        return self.folder / f"{layer}.{stream}.decoded"

    def _products_path(self, windows: int) -> Path:
        return self.folder / f"products-{windows}.safetensors"

    def _read_index(self) -> None:
        path = self.folder / _INDEX
        try:
            index = json.loads(path.read_text(encoding="utf-8"))
            self.windows, self.tokens = index["windows"], index["tokens"]
            self._forms = {name: _Form(**form) for name, form in index["streams"].items()}
            if index["products"]:
                self._products = load_file(self._products_path(self.windows))
        except (ValueError, LookupError, TypeError, OSError, SafetensorError) as error:
            raise ArtefactError(f"{path}: damaged: {error}") from error

    def _cut(self) -> None:
        """Cut off what no finished window holds."""
        for name in self._forms:
            path, size = self._path(name), self.tokens * self._forms[name].token_bytes
            if not path.exists() or path.stat().st_size < size:
                raise ArtefactError(f"{path}: damaged, it has not the {size} bytes of the index")
            os.truncate(path, size)
        wanted = {self._path(name) for name in self._forms} | {self.folder / _INDEX}
        if self._products:
            wanted.add(self._products_path(self.windows))
        for path in set(self.folder.iterdir()) - wanted:
            path.unlink()
