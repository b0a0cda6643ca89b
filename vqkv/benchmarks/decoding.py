"""Decoding steps of a model, context really filled: exact caches against a compressed one."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import nullcontext
from statistics import fmean
from typing import Any

import torch
from transformers import DynamicCache, StaticCache

from vqkv.attention import most_positions
from vqkv.cache import attach
from vqkv.compressor import KVCompressor
from vqkv.errors import ModelError
from vqkv.layouts import PAGE_TOKENS
from vqkv.models import load_model

DTYPES = (torch.float32, torch.bfloat16)
CONTEXTS = (4096, 8000)
#: A page's worth, so that one of them codes a page.
STEPS, WARM_UP = PAGE_TOKENS, 4
#: Tokens of a prefill's forward.
CHUNK = 512


def decoding_cases(
    name: str,
    compressor: KVCompressor,
    contexts: Sequence[int] = CONTEXTS,
    steps: int = STEPS,
    warm_up: int = WARM_UP,
) -> list[dict[str, Any]]:
    """In both types at each context that the model has positions for.

    Raises:
        ModelError: it has positions for none of them.
    """
    rows = []
    for dtype in DTYPES:
        model, _ = load_model(name, dtype=dtype)
        limit = most_positions(model.config)
        for context in contexts:
            if limit is None or context + steps + warm_up <= limit:
                rows.append(decoding_case(model, compressor, context, steps, warm_up))
    if not rows:
        shortest = min(contexts) + steps + warm_up
        raise ModelError(f"{name} has {limit} positions, steps are timed at {shortest} or more")
    return rows


@torch.inference_mode()
def decoding_case(
    model: Any, compressor: KVCompressor, context: int, steps: int, warm_up: int
) -> dict[str, Any]:
    """Mean milliseconds of a step with each cache.

    Steps of all caches are taken in turn, each one token further.
    """
    total = context + steps + warm_up
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(model.config.vocab_size, (1, total), generator=generator)
    with attach(model, compressor) as attached:
        caches = {
            "dynamic": DynamicCache(config=model.config),
            "static": StaticCache(config=model.config, max_cache_len=total),
            "compressed": attached.new_cache(),
        }
        read = attached.read
    spent: dict[str, list[float]] = {name: [] for name in caches}

    def forward(name: str, part: torch.Tensor) -> None:
        with attach(model, compressor) if name == "compressed" else nullcontext():
            start = time.perf_counter()
            model(part, past_key_values=caches[name], logits_to_keep=1)
            spent[name].append(1000 * (time.perf_counter() - start))

    for name in caches:
        for part in ids[:, :context].split(CHUNK, 1):
            forward(name, part)
        spent[name].clear()
    for part in ids[:, context:].split(1, 1):
        for name in caches:
            forward(name, part)
    steps_ms = {name: fmean(times[warm_up:]) for name, times in spent.items()}
    exact = min(steps_ms["dynamic"], steps_ms["static"])
    return {
        "scheme": compressor.scheme.name,
        "dtype": str(model.dtype).removeprefix("torch."),
        "context": context,
        "read": read,
        **{f"{name}_ms": ms for name, ms in steps_ms.items()},
        "tokens_per_second": 1000 / steps_ms["compressed"],
        "tokens_per_second_exact": 1000 / exact,
    }
