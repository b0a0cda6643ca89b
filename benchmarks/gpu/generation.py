"""Tokens a second of `generate`: a model with random weights, exact caches and `fast-2bit`'s.

    python -m benchmarks.gpu.generation --out benchmarks/results/gpu-h200-generation.json

`fast-2bit` is fitted on random states, so its speed is right and its text is not. With `--compiled`
transformers' static cache is measured too, whose steps it compiles, which takes minutes.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Iterator
from contextlib import ExitStack
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, PreTrainedModel
from transformers.generation.stopping_criteria import StoppingCriteriaList

from benchmarks.gpu.sizes import FULL, TOY, Sizes
from benchmarks.gpu.timing import gpu
from vqkv import KVCompressor, attach, load_scheme
from vqkv.cache.steps import DecodingSteps
from vqkv.compressor import Metric, StateSource
from vqkv.generation import Clock
from vqkv.geometry import Geometry
from vqkv.kernels import using
from vqkv.layouts import Stream
from vqkv.provenance import write
from vqkv.states import States

#: New tokens, and how many of them come before any is timed: a graph is captured meanwhile.
NEW, FIRST = 100, 20
#: Contexts and batches.
POINTS = ((2048, 1), (8192, 8), (32768, 1), (8192, 32))
TOKENS = 600


class RandomStates(StateSource):
    """Of a model's shape, and what `fast-2bit` asks of a loss: nothing in particular."""

    def __init__(self, geometry: Geometry) -> None:
        self._heads, self._dim = geometry.kv_heads, geometry.head_dim

    def states(self, layer: int, stream: Stream) -> States:
        """Tokens `[N, H, D]`."""
        return States.of(torch.randn(TOKENS, self._heads, self._dim))

    def metric(self, layer: int, stream: Stream, kind: Metric) -> torch.Tensor:
        """`[H, D, D]`."""
        return _metric(self._heads, self._dim)

    def across_heads(self, layer: int, stream: Stream, together: int) -> torch.Tensor:
        """`[B, h, D, h, D]`."""
        sets = self._heads // together
        metric = _metric(sets, together * self._dim)
        return metric.view(sets, together, self._dim, together, self._dim)

    def gradients(self, layer: int, stream: Stream) -> States:
        """`[N, H, D]`."""
        return States.of(torch.randn(TOKENS, self._heads, self._dim))


def _metric(count: int, size: int) -> torch.Tensor:
    """Positive definite, and not diagonal."""
    noise = torch.randn(count, size, size)
    return torch.eye(size) + 0.1 * noise @ noise.mT / size


def generation(sizes: Sizes, compiled: bool) -> Iterator[dict[str, Any]]:
    """Each arm at each context and batch."""
    model = _model(sizes)
    geometry = Geometry.from_model(model)
    compressor = KVCompressor(load_scheme("fast-2bit"), geometry).fit(RandomStates(geometry))
    arms = ["exact", "fast-2bit", "fast-2bit, graphs"] + ["exact, static"] * compiled
    for context, batch in POINTS if sizes is FULL else ((200, 2),):
        ids = torch.randint(sizes.vocabulary, (batch, context), device=sizes.device)
        for arm in arms:
            times, steps = _steps(model, compressor, arm, ids)
            yield {
                "arm": arm,
                "context": context,
                "batch": batch,
                "ms": 1e3 * statistics.median(times),
                "tokens_per_s": batch / statistics.mean(times),
                "replayed": steps,
            }


def _steps(
    model: PreTrainedModel, compressor: KVCompressor, arm: str, ids: torch.Tensor
) -> tuple[list[float], int]:
    """Seconds of each timed token, coding of pages among them, and how many steps were replayed."""
    clock, settings = Clock(), {"do_sample": False, "max_new_tokens": NEW, "min_new_tokens": NEW}
    with ExitStack() as stack, torch.no_grad():
        replayed = None
        if arm == "exact, static":
            settings["cache_implementation"] = "static"
        elif arm == "exact":
            settings["past_key_values"] = DynamicCache(config=model.config)
        else:
            if not ids.is_cuda:
                stack.enter_context(using(attend_codes="naive"))
            attached = stack.enter_context(attach(model, compressor, read="attend"))
            settings["past_key_values"] = attached.new_cache()
            if arm.endswith("graphs"):
                replayed = stack.enter_context(DecodingSteps(model, compressor))
        model.generate(  # type: ignore[operator]
            ids,
            attention_mask=torch.ones_like(ids),
            stopping_criteria=StoppingCriteriaList([clock]),
            **settings,
        )
    times = [after - before for before, after in pairwise(clock.ticks)]
    return times[FIRST:], 0 if replayed is None else replayed.taken


def _model(sizes: Sizes) -> PreTrainedModel:
    config = LlamaConfig(
        vocab_size=sizes.vocabulary,
        hidden_size=sizes.hidden,
        intermediate_size=sizes.inner,
        num_hidden_layers=sizes.layers,
        num_attention_heads=sizes.query_heads,
        num_key_value_heads=sizes.heads,
        head_dim=sizes.head_dim,
        max_position_embeddings=1 << 17,
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
        bos_token_id=0,
        eos_token_id=None,
        pad_token_id=0,
    )
    with torch.device(sizes.device):
        model = LlamaForCausalLM._from_config(config, dtype=torch.float16)
    return model.eval()  # type: ignore[no-any-return]


def main() -> None:
    """Print a table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--dry", action="store_true", help="a toy model without a GPU")
    parser.add_argument("--compiled", action="store_true", help="the static cache, too")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    sizes = TOY if arguments.dry else FULL
    figures: dict[str, Any] = {"dry": arguments.dry, "gpu_before": gpu(), "generation": []}
    for row in generation(sizes, arguments.compiled):
        figures["generation"].append(row)
        write(arguments.out, figures)  # what is measured stays, whatever the next arm does
    table = Table(*figures["generation"][0])
    for row in figures["generation"]:
        table.add_row(*(f"{v:.4g}" if isinstance(v, float) else str(v) for v in row.values()))
    Console().print(table)


if __name__ == "__main__":
    main()
