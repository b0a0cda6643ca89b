"""What fits into a given memory, from a model's and a scheme's config alone."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig

from vqkv.compressor import KVCompressor
from vqkv.errors import VQKVError
from vqkv.geometry import Geometry
from vqkv.layouts import PAGE_TOKENS, coded_tokens
from vqkv.scheme import Scheme

#: A 16-bit model: weights and exact states.
_BYTES = 2


@dataclass(frozen=True)
class Plan:
    """Figures in bytes and tokens; per-token ones count one sequence.

    Attributes:
        bits_per_value: stored bits over cached scalars.
        bytes_per_token: coded; `bytes_per_token_exact` at 16 bits.
        exact_bytes: sinks and the longest exact tail of one sequence.
        side_bytes: codebooks and the like, once per model.
        weights_bytes: the model's, at 16 bits.
        longest_context: tokens of each sequence that fit; `longest_context_exact` without vqkv.
        context_bytes: cache bytes at the context asked for, side bytes included.
    """

    bits_per_value: float
    bytes_per_token: int
    bytes_per_token_exact: int
    exact_bytes: int
    side_bytes: int
    weights_bytes: int
    memory_bytes: int
    batch: int
    longest_context: int
    longest_context_exact: int
    model_context: int | None
    context: int | None
    context_bytes: int | None
    context_bytes_exact: int | None
    context_fits: bool | None

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def plan(
    config: PreTrainedConfig,
    scheme: Scheme,
    memory: int,
    *,
    batch: int = 1,
    context: int | None = None,
) -> Plan:
    """Fit `batch` sequences beside a 16-bit model into `memory` bytes.

    Layers that are not compressed (sliding windows) are left out: their cache does not grow.

    Raises:
        VQKVError: the weights and codebooks alone do not fit.
        SchemeError: the scheme cannot code this model.
    """
    geometry = Geometry.from_config(config)
    compressor = KVCompressor(scheme, geometry)
    weights = _BYTES * _parameters(config)
    side = compressor.planned_side_bytes()
    room = memory - weights
    if room <= side:
        raise VQKVError(
            f"the weights take {weights:,} bytes and the codebooks {side:,}, "
            f"more than the {memory:,} given"
        )
    values = 2 * len(geometry.compressed) * geometry.kv_heads * geometry.head_dim
    residency = scheme.residency
    tail = residency.window + PAGE_TOKENS - 1
    exact = _BYTES * values * (residency.sinks + tail)
    per_token = compressor.bytes_per_token
    each = (room - side) // batch
    longest = tail + (each - exact) // per_token if each > exact else each // (_BYTES * values)

    def taken(tokens: int) -> int:
        coded = coded_tokens(tokens, residency.window)
        kept = tokens - coded + min(residency.sinks, coded)
        return side + batch * (coded * per_token + kept * _BYTES * values)

    return Plan(
        bits_per_value=compressor.bits_per_value,
        bytes_per_token=per_token,
        bytes_per_token_exact=_BYTES * values,
        exact_bytes=exact,
        side_bytes=side,
        weights_bytes=weights,
        memory_bytes=memory,
        batch=batch,
        longest_context=longest,
        longest_context_exact=room // batch // (_BYTES * values),
        model_context=getattr(config.get_text_config(), "max_position_embeddings", None),
        context=context,
        context_bytes=None if context is None else taken(context),
        context_bytes_exact=None if context is None else context * batch * _BYTES * values,
        context_fits=None if context is None else taken(context) <= room,
    )


def _parameters(config: PreTrainedConfig) -> int:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    return sum(parameter.numel() for parameter in model.parameters())
