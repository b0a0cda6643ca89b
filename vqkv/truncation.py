"""Fewer stages of residual codebooks, without another fit: stages that are learned in turn nest.

What is left out is not stored either. To store all stages and read fewer, see `vqkv.drafts`.
"""

from __future__ import annotations

from vqkv.compressor import KVCompressor
from vqkv.errors import SchemeError
from vqkv.quantizers.residual import ResidualConfig
from vqkv.scheme import STREAMS, LayerOverride, Scheme, StreamConfig


def first_stages(compressor: KVCompressor, depth: int) -> KVCompressor:
    """The first `depth` stages of every residual codebook, as a compressor of its own.

    A stage learns from what the stages before it leave over, so these are the codebooks that a fit
    at this depth gives. Bits and bytes are those of the shorter scheme.

    Args:
        compressor: fitted; every stream has one residual quantizer and no predictor, which would
            have been fitted on deeper reconstructions.
        depth: R, from 1 to the stages there are.

    Raises:
        SchemeError: another quantizer, a predictor, or fewer stages than `depth`.
        NotFittedError: before `fit`.
    """
    for key, codec in compressor.codecs():
        compressor.codec(*key)  # refuses before `fit`
        _check(codec.config, codec.layout.segments[0].stages, depth, codec.where)
    shorter = KVCompressor(
        _shortened(compressor.scheme, depth), compressor.geometry, compressor.provenance
    )
    tensors = {
        f"{stream}.{name}": tensor[:, :depth].clone() if name.endswith(".codewords") else tensor
        for stream, name, tensor in compressor.tensors()
    }
    health = {
        f"{layer}.{stream}": codec.health[:depth] for (layer, stream), codec in compressor.codecs()
    }
    return shorter.load_tensors(tensors, health)


def _check(config: StreamConfig, stages: int, depth: int, where: str) -> None:
    if not isinstance(config.quantizer, ResidualConfig) or config.predictor is not None:
        raise SchemeError(
            f"{where}: stages nest where a stream has one residual quantizer and no predictor"
        )
    if not 1 <= depth <= stages:
        raise SchemeError(f"{where}: there are {stages} stages, so 1 to {stages}, given {depth}")


def _shortened(scheme: Scheme, depth: int) -> Scheme:
    """The same scheme with another depth in every stream, overrides included."""

    def shortened(config: Scheme | LayerOverride) -> dict[str, StreamConfig]:
        streams = {stream: getattr(config, stream) for stream in STREAMS}
        return {
            stream: given.model_copy(
                update={
                    "quantizer": given.quantizer.model_copy(update={"depth": depth, "rate": None})
                }
            )
            for stream, given in streams.items()
            if given is not None
        }

    overrides = tuple(layer.model_copy(update=shortened(layer)) for layer in scheme.layers)
    return scheme.model_copy(update={**shortened(scheme), "layers": overrides})
