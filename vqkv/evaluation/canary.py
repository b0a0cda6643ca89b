"""The canary: would this evaluation notice if the codes were garbage?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from vqkv.codec import Codec, Encoded
from vqkv.compressor import KVCompressor
from vqkv.evaluation.arms import Arms, Mode, compressor_arms
from vqkv.layouts import PAGE_TOKENS, coded_tokens

#: Tokens that the canary runs on; destruction shows at once.
TOKENS = 1024


@dataclass(frozen=True)
class Canary:
    """Perplexity and top-1 agreement with destroyed codes, and the exact perplexity."""

    perplexity: float
    perplexity_exact: float
    top1_agreement: float

    @property
    def ok(self) -> bool:
        """Destruction was noticed: ten times the perplexity, or top-1 agreement below 10 %."""
        return self.perplexity >= 10 * self.perplexity_exact or self.top1_agreement < 0.1


class DestroyingCodec(Codec):
    """A fitted codec that stores zeros, whatever it is given."""

    def __init__(self, codec: Codec) -> None:
        self.__dict__.update(codec.__dict__)

    def encode(self, x: torch.Tensor, sources: Sequence[torch.Tensor] = ()) -> Encoded:
        """Zeros in the shape of what the codec would have stored."""
        encoded = super().encode(x, sources)
        return Encoded(torch.zeros_like(encoded.codes), torch.zeros_like(encoded.side))

    def to(self, device: torch.device) -> Codec:
        """Still destroying on another device."""
        return DestroyingCodec(super().to(device))


def destroyed(compressor: KVCompressor) -> KVCompressor:
    """The compressor with every codec destroying what it stores."""
    return compressor.with_codecs(DestroyingCodec)


def canary_arms(
    model: PreTrainedModel, compressor: KVCompressor, mode: Mode, chunk: int, tokens: int
) -> Arms:
    """Arms that score a window of `tokens` as an evaluation would, with destroyed codes.

    In chunked mode sinks, the exact window and the rest of the chunk would carry a model over the
    destruction. Where codes come into play at all they do so at once here: no sinks, no window, a
    page at a time.
    """
    compressor = destroyed(compressor)
    if mode == "chunked" and coded_tokens(tokens, compressor.scheme.residency.window):
        compressor = compressor.with_residency(sinks=0, window=0)
        chunk = min(chunk, PAGE_TOKENS)
    return compressor_arms(model, compressor, mode, chunk)


def run_canary(arms: Arms, window: torch.Tensor) -> Canary:
    """Score the start of a window with arms that destroy what they store."""
    scores = arms.scores(window[:TOKENS])
    return Canary(scores.perplexity, scores.perplexity_exact, float(scores.agree.mean()))
