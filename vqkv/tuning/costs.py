"""What each stream's errors cost, told from gradients, without running the model again."""

from __future__ import annotations

from functools import partial

import torch

from vqkv.calibration.source import CapturedStates
from vqkv.codec import Codec
from vqkv.compressor import KVCompressor, Reconstructions, StreamKey


def stream_costs(compressor: KVCompressor, source: CapturedStates) -> dict[StreamKey, float]:
    """Of each stream `½ E[eᵀ F e]` per token, e being a token's error in that stream.

    F is the Fisher information of each head, `E[g gᵀ]` of gradients g of the loss by the stream.
    To second order an error raises the loss, and the KL to the exact model, by as much; sums over
    streams take their errors as unrelated.

    Args:
        compressor: fitted to `source`.
        source: holds states and gradients.
    """
    reconstructions = Reconstructions(compressor, source)
    costs: dict[StreamKey, float] = {}
    for key, codec in compressor.codecs():
        reconstructions.forget_before(key)
        states = source.states(*key)
        information = source.gradient_products(*key) / states.tokens
        cost = partial(_cost, codec, information)
        parts = states.beside(reconstructions.of(key), cost)
        costs[key] = float(sum(parts)) / states.tokens / 2
    return costs


def _cost(
    codec: Codec, information: torch.Tensor, x: torch.Tensor, sources: list[torch.Tensor]
) -> torch.Tensor:
    """`Σ eᵀ F e` over tokens `[N, H, D]`, F being `[H, D, D]`."""
    error = (codec.there_and_back(x, sources) - x).double()
    return torch.einsum("nhd,hde,nhe->", error, information, error)
