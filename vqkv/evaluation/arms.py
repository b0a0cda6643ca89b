"""The two arms of a comparison: the same tokens in the same chunks, exact and compressed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Literal

import torch
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import Cache

from vqkv.cache import BeforeUseCache, VQCache, attach
from vqkv.compressor import KVCompressor
from vqkv.evaluation.exact import ExactLogits
from vqkv.evaluation.scoring import Scores, score

Mode = Literal["before-use", "chunked"]

#: Prepares the model for a compressed cache, hands out an empty one, and undoes itself.
OpenCache = Callable[[], AbstractContextManager[Cache]]


class Arms:
    """Runs windows through a model with the exact cache and with a compressed one.

    Args:
        model: run without gradients.
        open_cache: gives each window a compressed cache of its own.
        chunk: tokens at a time; None for a window in one forward, which before-use caches need.
        exact: gives the exact arm's logits of windows in one forward that other caches are scored
            on too.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        open_cache: OpenCache,
        chunk: int | None = None,
        exact: ExactLogits | None = None,
    ) -> None:
        self.model = model
        self.open_cache = open_cache
        self.chunk = chunk
        self.exact = exact

    @torch.inference_mode()
    def scores(self, window: torch.Tensor, first: int = 1) -> Scores:
        """Scores of the tokens `first` and later of a window `[T]`, each from those before it."""
        ids = window.to(self.model.device)[None]
        if self.exact is not None and self.chunk is None:
            exact = self.exact(ids)[first - 1 : -1]
            with self.open_cache() as cache:
                compressed = self.model(ids, past_key_values=cache).logits[0, first - 1 : -1]
            return score(exact, compressed, ids[0, first:])
        chunk = self.chunk or ids.shape[1]
        exact_cache = DynamicCache(config=self.model.config)
        parts = []
        with self.open_cache() as cache:
            for start in range(0, ids.shape[1], chunk):
                stop = min(start + chunk, ids.shape[1])
                exact, compressed = (
                    self.model(ids[:, start:stop], past_key_values=held).logits[0]
                    for held in (exact_cache, cache)
                )
                # Row i of a chunk predicts token start + i + 1.
                skipped = max(0, first - 1 - start)
                targets = ids[0, start + 1 + skipped : stop + 1]
                rows = slice(skipped, skipped + len(targets))
                if len(targets):
                    parts.append(score(exact[rows], compressed[rows], targets))
        return Scores.joined(parts)


def compressor_arms(
    model: PreTrainedModel,
    compressor: KVCompressor,
    mode: Mode,
    chunk: int,
    exact: ExactLogits | None = None,
) -> Arms:
    """Arms of a compressor, whose residency holds.

    Args:
        model: of the compressor's geometry.
        compressor: fitted, or data-free.
        mode: before-use runs a window as one chunk through reconstructions; chunked runs `chunk`
            tokens at a time through the real cache.
        chunk: tokens of a chunk, in chunked mode.
        exact: as in `Arms`; chunked mode has no use for it.
    """
    kind = VQCache if mode == "chunked" else BeforeUseCache

    @contextmanager
    def open_cache() -> Iterator[Cache]:
        with attach(model, compressor):
            yield kind(compressor, model.config)

    return Arms(model, open_cache, chunk if mode == "chunked" else None, exact)


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
