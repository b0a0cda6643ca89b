"""The cache that `generate` takes: a layer of ours per compressed layer, upstream's elsewhere."""

from __future__ import annotations

import copy
from typing import Any, Self

import torch
from transformers import DynamicCache
from transformers.cache_utils import Cache

from vqkv.artefact import check_fits
from vqkv.cache.layer import VQLayer
from vqkv.cache.rows import Rows
from vqkv.compressor import KVCompressor


class VQCache(Cache):
    """A compressed cache for one batch; pass it as `past_key_values`.

    By itself it sees no attention mask: left-padded batches have to run inside `attach`, or their
    padding is coded, and kept as sinks, like any text.

    Args:
        compressor: fitted, or data-free.
        config: the model's transformers config.

    Raises:
        ArtefactError: the compressor is for a model of another geometry.
        NotFittedError: the scheme needs calibration and has had none.
    """

    def __init__(self, compressor: KVCompressor, config: Any) -> None:
        check_fits(compressor.geometry, compressor.provenance.base_model, config, repr(compressor))
        self.compressor = compressor
        self.rows = Rows()
        layers = list(DynamicCache(config=config).layers)
        for index in compressor.geometry.compressed:
            compressor.codec(index, "keys")  # raises before generation rather than in the middle
            layers[index] = VQLayer(index, compressor, self.rows)
        super().__init__(layers=layers)

    @property
    def coded_layers(self) -> dict[int, VQLayer]:
        """The compressed layers, by index."""
        return {i: layer for i, layer in enumerate(self.layers) if isinstance(layer, VQLayer)}

    def check_padding(self, pads: list[int]) -> None:
        """Make sure that what is stored stays in place where row i has `pads[i]` padded slots.

        Raises:
            CacheError: another number of rows, or other padding than tokens were coded with.
        """
        for layer in self.coded_layers.values():
            layer.check_padding(pads)

    # Rows change for all layers at once, so what they share changes here.

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Row i of every layer becomes what row `beam_idx[i]` was."""
        super().reorder_cache(beam_idx)  # type: ignore[arg-type]  # any integer tensor serves
        self.rows.select(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each row `repeats` times in a row."""
        super().batch_repeat_interleave(repeats)
        self.rows.select(torch.arange(self.rows.known).repeat_interleave(repeats))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep these rows."""
        super().batch_select_indices(indices)
        known = torch.arange(self.rows.known, device=indices.device)
        self.rows.select(known[indices] if len(known) else indices)

    def crop(self, tokens_to_remove: int) -> None:
        """Drop the last `-tokens_to_remove` slots of every layer, or of none where one refuses.

        Raises:
            CacheError: as `VQLayer.crop` says.
        """
        for layer in self.coded_layers.values():
            layer.check_crop(tokens_to_remove)
        super().crop(tokens_to_remove)
        self.rows.crop(self.get_seq_length())

    def reset(self) -> None:
        """Forget all tokens; the cache can start on another batch."""
        super().reset()
        self.rows.reset()

    def nbytes(self) -> dict[str, int]:
        """Bytes of live tensors: codes, exact sinks and tail, positions, other layers, total.

        Codebooks are not in it: they are the compressor's side bytes, shared by all its caches.
        """
        found = {
            "codes": 0,
            "sinks": 0,
            "tail": 0,
            "positions": self.rows.nbytes,
            "other_layers": 0,
        }
        for layer in self.layers:
            if isinstance(layer, VQLayer):
                for name, size in layer.nbytes().items():
                    found[name] += size
            else:
                tensors = (getattr(layer, name, None) for name in ("keys", "values"))
                found["other_layers"] += sum(t.nbytes for t in tensors if t is not None)
        return {**found, "total": sum(found.values())}

    def nbytes_exact(self) -> int:
        """What a 16-bit cache of the same tokens takes."""
        values = 0
        for layer in self.layers:
            if isinstance(layer, VQLayer):
                geometry = self.compressor.geometry
                batch = len(layer.coded)
                values += 2 * batch * layer.get_seq_length() * geometry.kv_heads * geometry.head_dim
            else:
                tensors = (getattr(layer, name, None) for name in ("keys", "values"))
                values += sum(t.numel() for t in tensors if t is not None)
        return 2 * values

    def draft(self, stages: int) -> VQCache:
        """A cache of the same codes, exact tokens included, that reads their first `stages` stages.

        It shares memory with this one, and holds until this one takes in more tokens. What it takes
        in itself this one does not see. Keys before RoPE need `attach` with its `compressor`.

        Raises:
            SchemeError: as `KVCompressor.draft` does.
        """
        view = copy.copy(self)
        view.compressor, view.rows = self.compressor.draft(stages), copy.deepcopy(self.rows)
        view.layers = [
            layer.read_by(view.compressor, view.rows)
            if isinstance(layer, VQLayer)
            else copy.copy(layer)
            for layer in self.layers
        ]
        return view

    def save(self, path: Any) -> None:
        """Write the compressed tokens to a file, for `load`: a prefix to start from again."""
        from vqkv.cache.storage import save

        save(self, path)

    @classmethod
    def load(
        cls,
        path: Any,
        compressor: KVCompressor,
        config: Any,
        *,
        device: torch.device | str = "cpu",
    ) -> Self:
        """A cache that `save` wrote, on the device that the model is on.

        Raises:
            ArtefactError: the file is damaged, or does not fit the compressor.
        """
        from vqkv.cache.storage import load

        return load(cls(compressor, config), path, device)

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """A copy of all tokens that shares the codebooks."""
        memo[id(self.compressor)] = self.compressor
        clone = self.__class__.__new__(self.__class__)
        memo[id(self)] = clone
        with torch.no_grad():
            clone.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return clone
