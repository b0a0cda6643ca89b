"""transformers' `QuantizedCache`: ranges over groups of values, by optimum-quanto or hqq.

Its layers hand out exact states while they fill, so their own `_quantize` and `_dequantize` are
called here instead.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib.metadata import version
from typing import Any, Literal

import torch
from transformers import PreTrainedConfig
from transformers.cache_utils import QuantizedCache

from benchmarks.peers.base import Peer
from vqkv.layouts import Stream

Backend = Literal["quanto", "hqq"]

PACKAGES: dict[Backend, str] = {"quanto": "optimum-quanto", "hqq": "hqq"}

#: What the other axis is called beside 0: one range for each channel over tokens in quanto, one
#: for each group of a token's channels in hqq.
OTHER_AXIS: dict[Backend, int] = {"quanto": -1, "hqq": 1}


@dataclass(frozen=True)
class Grouping:
    """Values that share a range: transformers' `axis_key`, `axis_value` and `q_group_size`."""

    axis_key: int = 0
    axis_value: int = 0
    size: int = 64


class QuantizedCachePeer(Peer):
    """A backend of `QuantizedCache`.

    States are given in float16, as a model on a GPU has them, so that scales and zeros take 16 bits
    each.

    Args:
        name: in tables.
        backend: of the two.
        bits: of a code.
        config: of the model.
        grouping: transformers' defaults if left out.
    """

    rope = "post"
    learns = False

    def __init__(
        self,
        name: str,
        backend: Backend,
        bits: int,
        config: PreTrainedConfig,
        grouping: Grouping | None = None,
    ) -> None:
        """Raises ImportError where the backend's package is missing."""
        self.name = name
        self.package = f"{PACKAGES[backend]} {version(PACKAGES[backend])}"
        grouping = grouping or Grouping()
        self.backend = backend
        self.group_size = grouping.size
        self.layers: list[Any] = QuantizedCache(
            backend,
            config,
            nbits=bits,
            axis_key=grouping.axis_key,
            axis_value=grouping.axis_value,
            q_group_size=grouping.size,
        ).layers

    def encode(self, layer: int, stream: Stream, states: torch.Tensor) -> tuple[Any, int]:
        """The package's quantized tensor, and T.

        The last group of tokens is filled up, as later tokens of a longer text would.
        """
        tokens = states.shape[2]
        missing = -tokens % self.group_size
        filled = torch.cat([states, states[:, :, -1:].expand(-1, -1, missing, -1)], 2).half()
        held = self.layers[layer]
        held.lazy_initialization(filled, filled)
        axis = held.axis_key if stream == "keys" else held.axis_value
        return held._quantize(filled.contiguous(), axis=axis), tokens

    def decode(self, layer: int, stream: Stream, stored: tuple[Any, int]) -> torch.Tensor:
        """As the package dequantizes it."""
        quantized, tokens = stored
        decoded: torch.Tensor = self.layers[layer]._dequantize(quantized)
        return decoded[:, :, :tokens]

    def tensors(self, stored: tuple[Any, int]) -> list[torch.Tensor]:
        """Packed codes, scales and zeros."""
        if self.backend == "hqq":
            codes, meta = stored[0]
            return [codes, meta["scale"], meta["zero"]]
        return list(_leaves(stored[0]))


def _leaves(tensor: Any) -> list[torch.Tensor]:
    """The plain tensors that a tensor subclass of quanto is made of."""
    if type(tensor) is torch.Tensor:
        return [tensor]
    names, _ = tensor.__tensor_flatten__()
    return [leaf for name in names for leaf in _leaves(getattr(tensor, name))]
