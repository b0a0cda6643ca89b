"""Quantizers: vectors to integer codes and back. One method, one file."""

from vqkv.quantizers.base import QUANTIZERS, Quantizer, QuantizerChoice, QuantizerConfig

__all__ = ["QUANTIZERS", "Quantizer", "QuantizerChoice", "QuantizerConfig"]
