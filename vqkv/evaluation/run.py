"""One evaluation: a compressor against the exact cache, on one text."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from vqkv.calibration.windows import Text, check_context, read_text, text_windows
from vqkv.compressor import KVCompressor
from vqkv.errors import TextError
from vqkv.evaluation.arms import Mode, compressor_arms, filled_cache
from vqkv.evaluation.canary import canary_arms
from vqkv.evaluation.exact import ExactLogits
from vqkv.evaluation.quality import Progress, measure

#: Tokens that a cache is filled with at a time where only its bytes are wanted.
FILL_CHUNK = 512


@dataclass(frozen=True)
class Evaluation:
    """Figures of one evaluation; docs/measuring.md says what each means.

    Attributes:
        tokens: scored: every token of each window but its first.
        kl: KL(exact ‖ compressed), nats per token.
        interval: 95 % of the log perplexity ratio.
        repeated_passage: mean loss on the second copy, by passage length.
        window: exact tokens at the end, as scored: none in before-use mode.
        effective_bits_per_value: exact values at 16 bits, at `cache_bytes_length` tokens with a
            window of `cache_bytes_window`.
        cache_bytes: of a real cache holding `cache_bytes_length` tokens, of which the latest
            `cache_bytes_window` or more are exact, in the model's type.
        cache_bytes_exact: 16 bits per value at that length.
        canary_perplexity: None where the canary was not asked for.
        notes: what a reader of the figures has to know beside them.
    """

    scheme: str
    text: str
    mode: Mode
    dtype: str
    context: int
    chunk: int | None
    skip: int
    sinks: int
    window: int
    tokens: int
    kl: float
    perplexity: float
    perplexity_exact: float
    ratio: float
    interval: tuple[float, float]
    top1_agreement: float
    repeated_passage: dict[int, float]
    repeated_passage_exact: dict[int, float]
    bits_per_value: float
    effective_bits_per_value: float
    cache_bytes: int
    cache_bytes_exact: int
    cache_bytes_length: int
    cache_bytes_window: int
    side_bytes: dict[str, int]
    canary_perplexity: float | None
    canary_ok: bool | None
    notes: tuple[str, ...]
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    compressor: KVCompressor,
    text: str | Path | Text,
    *,
    tokens: int,
    mode: Mode = "before-use",
    context: int = 2048,
    chunk: int = 256,
    skip: int = 0,
    canary: bool = True,
    passages: int = 8,
    passage_lengths: tuple[int, ...] = (512, 1024, 2048),
    exact: ExactLogits | None = None,
    progress: Progress | None = None,
) -> Evaluation:
    """Score `tokens` tokens of a text, in windows of `context`, with both caches.

    Args:
        model: the exact arm runs it with an ordinary cache.
        tokenizer: the model's.
        compressor: fitted, or data-free; its residency holds (before-use ignores the window).
        text: one that no calibration saw; a note says so where the compressor's own saw what
            is scored.
        tokens: in all, `skip` tokens of the text left out at its start.
        mode: see `docs/measuring.md`.
        context: tokens of a window.
        chunk: tokens of a chunk, in chunked mode.
        skip: tokens to leave out.
        canary: also check that destroyed codes are noticed.
        passages: repeated passages of each length; 0 for none.
        passage_lengths: in tokens.
        exact: keeps the exact arm's logits where several compressors are scored before use.
        progress: told of each window and passage, of the canary and of the filling of a cache.

    Raises:
        TextError: the text cannot be read, or is too short.
        ArtefactError, ModelError: compressor and model do not fit, or the model has no room for
            `context` tokens.
    """
    begun = time.perf_counter()
    if tokens < 2 or context < 2:
        raise TextError(f"scoring takes windows of 2 tokens or more, given {tokens} and {context}")
    tell = progress or (lambda phase, done, total: None)
    check_context(model.config, context)
    text = text if isinstance(text, Text) else read_text(text)
    notes = []
    if skip < compressor.provenance.tokens_of(text.sha256):
        notes.append(
            f"{compressor.scheme.name} was calibrated on this very text, {text.name}: the figures "
            "flatter it; evaluate on another text"
        )
    windows = text_windows(tokenizer, text, tokens, context, skip)
    arms = compressor_arms(model, compressor, mode, chunk, exact)
    destroying = canary_arms(model, compressor, mode, chunk, len(windows[0])) if canary else None
    quality = measure(
        arms,
        destroying,
        windows,
        passages=passages,
        passage_lengths=passage_lengths,
        progress=tell,
    )
    fill = chunk if mode == "chunked" else FILL_CHUNK
    tell("cache", 0, 1)
    cache = filled_cache(model, compressor, windows[0], fill)
    tell("cache", 1, 1)
    length = cache.get_seq_length()
    return Evaluation(
        scheme=compressor.scheme.name,
        text=text.name,
        mode=mode,
        dtype=str(model.dtype).removeprefix("torch."),
        context=context,
        chunk=chunk if mode == "chunked" else None,
        skip=skip,
        sinks=compressor.scheme.residency.sinks,
        window=compressor.scheme.residency.window if mode == "chunked" else 0,
        **quality.figures(),
        bits_per_value=compressor.bits_per_value,
        effective_bits_per_value=compressor.effective_bits_per_value(length),
        cache_bytes=cache.nbytes()["total"],
        cache_bytes_exact=cache.nbytes_exact(),
        cache_bytes_length=length,
        cache_bytes_window=compressor.scheme.residency.window,
        side_bytes=compressor.side_bytes(),
        notes=(*notes, *quality.repeated.notes),
        seconds=time.perf_counter() - begun,
    )
