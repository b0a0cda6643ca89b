"""The two arms of a comparison: the same tokens in the same chunks, exact and compressed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from transformers import DynamicCache, PreTrainedModel

from vqkv.cache import BeforeUseCache, VQCache, attach
from vqkv.compressor import KVCompressor
from vqkv.evaluation.exact import ExactLogits
from vqkv.evaluation.scoring import Scores, score

Mode = Literal["before-use", "chunked"]


class Arms:
    """Runs windows through a model with the exact cache and with a compressed one.

    Args:
        model: run without gradients.
        compressor: whose residency holds.
        mode: before-use runs a window as one chunk through reconstructions; chunked runs `chunk`
            tokens at a time through the real cache.
        chunk: tokens of a chunk, in chunked mode.
        exact: gives the exact arm's logits of windows that other compressors are scored on too,
            before use.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        compressor: KVCompressor,
        mode: Mode,
        chunk: int,
        exact: ExactLogits | None = None,
    ) -> None:
        self.model = model
        self.compressor = compressor
        self.mode = mode
        self.chunk = chunk
        self.exact = exact

    @torch.inference_mode()
    def scores(self, window: torch.Tensor, first: int = 1) -> Scores:
        """Scores of the tokens `first` and later of a window `[T]`, each from those before it."""
        ids = window.to(self.model.device)[None]
        chunk = self.chunk if self.mode == "chunked" else ids.shape[1]
        caches = (DynamicCache(config=self.model.config), self._compressed_cache())
        if self.exact is not None and self.mode == "before-use":
            exact = self.exact(ids)[first - 1 : -1]
            with attach(self.model, self.compressor):
                compressed = self.model(ids, past_key_values=caches[1]).logits[0, first - 1 : -1]
            return score(exact, compressed, ids[0, first:])
        parts = []
        with attach(self.model, self.compressor):
            for start in range(0, ids.shape[1], chunk):
                stop = min(start + chunk, ids.shape[1])
                exact, compressed = (
                    self.model(ids[:, start:stop], past_key_values=cache).logits[0]
                    for cache in caches
                )
                # Row i of a chunk predicts token start + i + 1.
                skipped = max(0, first - 1 - start)
                targets = ids[0, start + 1 + skipped : stop + 1]
                rows = slice(skipped, skipped + len(targets))
                if len(targets):
                    parts.append(score(exact[rows], compressed[rows], targets))
        return Scores.joined(parts)

    def _compressed_cache(self) -> BeforeUseCache | VQCache:
        kind: Callable[[KVCompressor, Any], BeforeUseCache | VQCache]
        kind = VQCache if self.mode == "chunked" else BeforeUseCache
        return kind(self.compressor, self.model.config)


@torch.inference_mode()
def filled_cache(
    model: PreTrainedModel, compressor: KVCompressor, window: torch.Tensor, chunk: int
) -> VQCache:
    """A real cache with all tokens of a window in it, for counting bytes."""
    ids = window.to(model.device)[None]
    cache = VQCache(compressor, model.config)
    with attach(model, compressor):
        for part in ids.split(chunk, 1):
            model(part, past_key_values=cache, logits_to_keep=1)
    return cache
