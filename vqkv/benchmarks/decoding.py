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
from vqkv.benchmarks.shares import measuring
from vqkv.cache import attach
from vqkv.compressor import KVCompressor
from vqkv.errors import ModelError
from vqkv.layouts import PAGE_TOKENS
from vqkv.models import load_model

DTYPES = (torch.float32, torch.bfloat16)
CONTEXTS = (4096, 8000)
#: A page's worth, taken in runs, each after a step that is not counted. With a window of whole
#: pages the step that codes a page is in the middle of the last run.
STEPS, RUN = PAGE_TOKENS, 16
#: Tokens of a prefill's forward.
CHUNK = 512


def decoding_cases(
    name: str,
    compressor: KVCompressor,
    contexts: Sequence[int] = CONTEXTS,
    steps: int = STEPS,
    run: int = RUN,
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
            if limit is None or context + _taken(steps, run) <= limit:
                rows.append(decoding_case(model, compressor, context, steps, run))
    if not rows:
        shortest = min(contexts) + _taken(steps, run)
        raise ModelError(f"{name} has {limit} positions, steps are timed at {shortest} or more")
    return rows


@torch.inference_mode()
def decoding_case(
    model: Any, compressor: KVCompressor, context: int, steps: int, run: int
) -> dict[str, Any]:
    """Mean milliseconds of a step with each cache, and where they go with the compressed one.

    Caches take runs of steps in turn. As before any step of `generate`, the compressor has been
    attached and the model has been run before a step counts.
    """
    total = context + _taken(steps, run)
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

    def forward(name: str, tokens: torch.Tensor, length: int) -> None:
        with attach(model, compressor) if name == "compressed" else nullcontext():
            for part in tokens.split(length, 1):
                start = time.perf_counter()
                model(part, past_key_values=caches[name], logits_to_keep=1)
                spent[name].append(1000 * (time.perf_counter() - start))

    for name in caches:
        forward(name, ids[:, :context], CHUNK)
        spent[name].clear()
    for tokens in ids[:, context : -1 - run].split(run + 1, 1):
        for name in caches:
            counted = len(spent[name])
            forward(name, tokens, 1)
            del spent[name][counted]
    steps_ms = {name: fmean(times) for name, times in spent.items()}
    with attach(model, compressor):
        first, *others = ids[:, -1 - run :].split(1, 1)
        model(first, past_key_values=caches["compressed"], logits_to_keep=1)
        with measuring(model) as shares:
            for part in others:
                model(part, past_key_values=caches["compressed"], logits_to_keep=1)
    exact = min(steps_ms["dynamic"], steps_ms["static"])
    return {
        "scheme": compressor.scheme.name,
        "dtype": str(model.dtype).removeprefix("torch."),
        "context": context,
        "read": read,
        **{f"{name}_ms": ms for name, ms in steps_ms.items()},
        **shares.milliseconds(run),
        "tokens_per_second": 1000 / steps_ms["compressed"],
        "tokens_per_second_exact": 1000 / exact,
    }


def _taken(steps: int, run: int) -> int:
    """Tokens that one cache takes in all: a step before each run, and a run to see its shares."""
    return steps + -(-steps // run) + 1 + run
