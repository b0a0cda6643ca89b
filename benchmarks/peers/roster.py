"""The peers by name."""

from __future__ import annotations

from collections.abc import Callable

from transformers import PreTrainedConfig

from benchmarks.peers.base import Peer
from benchmarks.peers.faiss_codecs import FaissPQ, FaissRQ
from benchmarks.peers.quantized_cache import Backend, Grouping, QuantizedCachePeer

#: Axes of the lowest KL on the calibration texts, as `axes.py` finds them.
BEST_AXES: dict[Backend, tuple[int, int]] = {"quanto": (-1, 0), "hqq": (0, 1)}

#: Makes a peer for a model.
Make = Callable[[PreTrainedConfig], Peer]


def roster() -> dict[str, Make]:
    """Each backend of transformers at its defaults, and with its best axes; faiss's quantizers."""
    made: dict[str, Make] = {FaissPQ.name: lambda _: FaissPQ(), FaissRQ.name: lambda _: FaissRQ()}
    for backend, axes in BEST_AXES.items():
        for bits in (2, 4):
            name = f"{backend}-{bits}"
            made[name] = _grouped(name, backend, bits, None)
            # At transformers' own group size, and at half of it, which is KIVI's.
            for size in (64, 32):
                best = f"{name}-axes-g{size}"
                made[best] = _grouped(best, backend, bits, Grouping(*axes, size))
    return made


def _grouped(name: str, backend: Backend, bits: int, grouping: Grouping | None) -> Make:
    return lambda config: QuantizedCachePeer(name, backend, bits, config, grouping)
