"""Greedy continuation of a prompt, timed, with the exact cache or a compressed one."""

from __future__ import annotations

import time
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from typing import Any

import torch
from transformers import (
    DynamicCache,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
)

from vqkv.cache import VQCache, attach
from vqkv.cache.attachment import Read
from vqkv.compressor import KVCompressor
from vqkv.errors import TextError


@dataclass(frozen=True)
class Continuation:
    """What came out, and what it took.

    Attributes:
        text: the new text, without the prompt.
        tokens_per_second: from the first new token to the last, so without the prompt's forward.
        cache_bytes: live tensors of the cache at the end.
        cache_bytes_exact: a 16-bit cache of the same tokens.
        side_bytes: codebooks and the like, shared by all caches of the compressor.
    """

    text: str
    prompt_tokens: int
    new_tokens: int
    seconds: float
    tokens_per_second: float
    cache_bytes: int
    cache_bytes_exact: int
    side_bytes: int
    read: str

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


class Clock(StoppingCriteria):
    """Never stops; notes when each token was there."""

    def __init__(self) -> None:
        self.ticks: list[float] = []

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        self.ticks.append(time.perf_counter())
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)


def continue_prompt(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    max_new_tokens: int,
    *,
    compressor: KVCompressor | None = None,
    read: Read = "auto",
) -> Continuation:
    """Continue `prompt` greedily; with the exact cache where there is no compressor.

    Raises:
        TextError: the prompt has no tokens.
    """
    inputs = tokenizer(prompt, return_tensors="pt").to(model.device)
    prompt_tokens = inputs["input_ids"].shape[1]
    if not prompt_tokens:
        raise TextError("the prompt is empty: give it at least one token")
    clock = Clock()
    context = nullcontext() if compressor is None else attach(model, compressor, read=read)
    with context as attached, torch.inference_mode():
        cache = (
            DynamicCache(config=model.config)
            if compressor is None
            else VQCache(compressor, model.config)
        )
        start = time.perf_counter()
        output = model.generate(  # type: ignore[operator]
            **inputs,
            past_key_values=cache,
            max_new_tokens=max_new_tokens,
            do_sample=False,
            stopping_criteria=StoppingCriteriaList([clock]),
        )
        seconds = time.perf_counter() - start
    new = output[0, prompt_tokens:]
    cache_bytes, cache_bytes_exact = _sizes(cache)
    decoding = clock.ticks[-1] - clock.ticks[0]
    return Continuation(
        text=str(tokenizer.decode(new, skip_special_tokens=True)),
        prompt_tokens=prompt_tokens,
        new_tokens=len(new),
        seconds=seconds,
        tokens_per_second=(len(new) - 1) / decoding if decoding else 0.0,
        cache_bytes=cache_bytes,
        cache_bytes_exact=cache_bytes_exact,
        side_bytes=0 if compressor is None else compressor.nbytes(),
        read="exact" if attached is None else attached.read,
    )


def _sizes(cache: VQCache | DynamicCache) -> tuple[int, int]:
    """Bytes of a cache's live tensors, and of a 16-bit cache of the same tokens."""
    if isinstance(cache, VQCache):
        return cache.nbytes()["total"], cache.nbytes_exact()
    tensors: list[torch.Tensor] = [
        tensor
        for layer in cache.layers
        for tensor in (getattr(layer, "keys", None), getattr(layer, "values", None))
        if tensor is not None
    ]
    return sum(t.nbytes for t in tensors), 2 * sum(t.numel() for t in tensors)
