"""faiss's product and residual quantizers, one for each KV head of each stream, at 2 bits a value.

faiss trains them on captured states. Keys are coded before RoPE, where vector codes do best.
"""

from __future__ import annotations

from abc import abstractmethod
from importlib.metadata import version
from typing import Any

import faiss
import numpy as np
import torch

from benchmarks.peers.base import Peer
from vqkv.layouts import Stream

CODE_BITS = 8
#: Channels to a code.
DIM = 4
BEAM = 4


class FaissPeer(Peer):
    """What both have in common: codes `[H, T, bytes]` of states, head by head."""

    rope = "pre"
    learns = True

    def __init__(self) -> None:
        self.package = f"faiss-cpu {version('faiss-cpu')}"
        self.quantizers: dict[tuple[int, Stream], list[Any]] = {}

    @abstractmethod
    def trained(self, x: np.ndarray[Any, Any]) -> Any:
        """A faiss quantizer of vectors `[N, D]`."""

    @abstractmethod
    def codebook_bytes(self, quantizer: Any) -> int:
        """Of one quantizer."""

    def fit(self, layer: int, stream: Stream, states: torch.Tensor) -> None:
        """Train a quantizer for each head."""
        heads = states.transpose(0, 1).float().contiguous().numpy()
        self.quantizers[layer, stream] = [self.trained(head) for head in heads]

    def encode(self, layer: int, stream: Stream, states: torch.Tensor) -> torch.Tensor:
        """Codes `[H, T, bytes]`."""
        heads = states[0].float().contiguous().numpy()
        pairs = zip(self.quantizers[layer, stream], heads, strict=True)
        return torch.from_numpy(np.stack([q.compute_codes(head) for q, head in pairs]))

    def decode(self, layer: int, stream: Stream, stored: torch.Tensor) -> torch.Tensor:
        """What the codes stand for."""
        pairs = zip(self.quantizers[layer, stream], stored.numpy(), strict=True)
        return torch.from_numpy(np.stack([q.decode(codes) for q, codes in pairs]))[None]

    def tensors(self, stored: torch.Tensor) -> list[torch.Tensor]:
        """The codes."""
        return [stored]

    def side_bytes(self) -> int:
        """Of all codebooks, in fp32 as faiss has them."""
        return sum(self.codebook_bytes(q) for heads in self.quantizers.values() for q in heads)


class FaissPQ(FaissPeer):
    """`faiss.ProductQuantizer`, as faiss sets it."""

    name = "faiss-pq-4d8b"

    def trained(self, x: np.ndarray[Any, Any]) -> Any:
        """D / 4 subvectors of 8 bits each."""
        channels = x.shape[1]
        quantizer = faiss.ProductQuantizer(channels, channels // DIM, CODE_BITS)
        quantizer.train(x)
        return quantizer

    def codebook_bytes(self, quantizer: Any) -> int:
        """Of the centroids."""
        return int(faiss.vector_to_array(quantizer.centroids).nbytes)


class FaissRQ(FaissPeer):
    """`faiss.ResidualQuantizer`: D / 4 stages over a whole head, coded with a beam of 4.

    Trained stage by stage on the residuals of the best code. faiss's own setting, a beam of 5 with
    k-means of growing dimension, takes 30 times as long here.
    """

    name = "faiss-rq-beam4"

    def trained(self, x: np.ndarray[Any, Any]) -> Any:
        """D / 4 stages of 8 bits each."""
        channels = x.shape[1]
        quantizer = faiss.ResidualQuantizer(channels, channels // DIM, CODE_BITS)
        quantizer.train_type = faiss.ResidualQuantizer.Train_default
        quantizer.max_beam_size = 1
        quantizer.train(x)
        quantizer.max_beam_size = BEAM
        return quantizer

    def codebook_bytes(self, quantizer: Any) -> int:
        """Of the codebooks of all stages."""
        return int(faiss.vector_to_array(quantizer.codebooks).nbytes)
