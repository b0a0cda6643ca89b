"""What fits into a given memory, from a model's and a scheme's config alone."""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import asdict, dataclass
from typing import Any

import torch
from transformers import PreTrainedConfig

from vqkv.attention import most_positions
from vqkv.compressor import EXACT_BYTES, KVCompressor
from vqkv.errors import SchemeError, VQKVError
from vqkv.geometry import Geometry
from vqkv.layouts import PAGE_TOKENS, coded_tokens
from vqkv.models import auto_class
from vqkv.scheme import Scheme

#: Bytes of a weight of a 16-bit model.
_WEIGHT_BYTES = 2

#: Pages grow by this part at a time, so as much of them may lie idle.
_IDLE_PART = 16


@dataclass(frozen=True)
class Plan:
    """Figures in bytes and tokens; per-token ones count one sequence.

    Attributes:
        bits_per_value: stored bits over cached scalars.
        bytes_per_token: coded; `bytes_per_token_exact` at 16 bits.
        position_bytes: of each token beside them, coded or not; 0 for post-RoPE schemes.
        exact_bytes: sinks and the longest exact tail of one sequence.
        side_bytes: codebooks and the like, once per model.
        weights_bytes: the model's, at 16 bits.
        longest_context: tokens of each sequence that fit; `longest_context_exact` without vqkv.
        context_bytes: cache bytes at the context asked for, side bytes included, and the most
            room for later tokens that pages may keep there.
    """

    bits_per_value: float
    bytes_per_token: int
    bytes_per_token_exact: int
    position_bytes: int
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
        SchemeError: the scheme cannot code this model, or stores nothing that would fill memory.
    """
    geometry = Geometry.from_config(config)
    compressor = KVCompressor(scheme, geometry)
    per_token = compressor.bytes_per_token
    if not per_token:
        raise SchemeError(
            f"scheme {scheme.name!r} stores 0 bits of a coded token, so no memory bounds its "
            "context: plan with a scheme that has code_bits of at least 1 somewhere"
        )
    weights = _WEIGHT_BYTES * _parameters(config)
    side = compressor.planned_side_bytes()
    room = memory - weights
    if room <= side:
        raise VQKVError(
            f"the weights take {weights:,} bytes and the codebooks {side:,}, "
            f"more than the {memory:,} given"
        )
    residency = scheme.residency
    tail = residency.window + PAGE_TOKENS - 1
    exact = EXACT_BYTES * compressor.values_per_token

    def taken(tokens: int) -> int:
        idle = _idle_tokens(coded_tokens(tokens, residency.window))
        return side + batch * (compressor.row_bytes(tokens) + per_token * idle)

    def most_until(tokens: int) -> int:
        # The tail is exact, so a length just before its page is coded may take more than one after.
        before = coded_tokens(tokens, residency.window) + residency.window - 1
        return max(taken(tokens), taken(max(0, min(before, tokens))))

    # No longer: there the codes alone fill the room.
    lengths = range(1, tail + room // (batch * per_token) + 2)
    return Plan(
        bits_per_value=compressor.bits_per_value,
        bytes_per_token=per_token,
        bytes_per_token_exact=exact,
        position_bytes=compressor.position_bytes,
        exact_bytes=exact * (residency.sinks + tail),
        side_bytes=side,
        weights_bytes=weights,
        memory_bytes=memory,
        batch=batch,
        longest_context=bisect_right(lengths, room, key=most_until),
        longest_context_exact=room // batch // exact,
        model_context=most_positions(config),
        context=context,
        context_bytes=None if context is None else taken(context),
        context_bytes_exact=None if context is None else context * batch * exact,
        context_fits=None if context is None else taken(context) <= room,
    )


def _idle_tokens(coded: int) -> int:
    """The most tokens that pages with `coded` tokens in them may have room for beside these."""
    pages = coded // PAGE_TOKENS
    return max(0, pages - 2) // _IDLE_PART * PAGE_TOKENS


def _parameters(config: PreTrainedConfig) -> int:
    with torch.device("meta"):
        model = auto_class(config).from_config(config, trust_remote_code=False)
    return sum(parameter.numel() for parameter in model.parameters())
