"""The compiled CPU kernels against the fastest alternatives: encode, attention on codes, decode."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from vqkv.benchmarks.attend import attend_case
from vqkv.benchmarks.decoding import decoding_cases
from vqkv.benchmarks.timing import clock, medians
from vqkv.compressor import KVCompressor
from vqkv.kernels import native
from vqkv.kernels.native.decode import decode_into
from vqkv.provenance import provenance

CHANNELS = 128
#: (vectors, d, K)
ENCODE = ((8192, 2, 256), (8192, 4, 256), (8192, 8, 256), (4096, 16, 256), (1024, 4, 4096))
#: (tokens, RoPE of the keys, d, S), K = 256
ATTEND = (
    (16384, "post", 4, 1),
    (16384, "pre", 4, 1),
    (16384, "post", 8, 1),
    (16384, "post", 8, 2),
    (32768, "post", 4, 1),
    (131072, "post", 4, 1),
    (131072, "pre", 4, 1),
)
#: (vectors, d), K = 256
DECODE = ((131072, 4), (131072, 8))


def run(
    threads: int = 1, rounds: int = 31, model: str = "demo", compressor: KVCompressor | None = None
) -> dict[str, Any]:
    """All cases, with machine, versions and commit; with a compressor also its model's steps."""
    with _threads(threads):
        steps = {} if compressor is None else {"steps": decoding_cases(model, compressor)}
        return {
            **provenance(),
            "simd_level": native.simd_level(),
            "clock": clock(threads).__name__,
            "rounds": rounds,
            "encode": [encode_case(*shape, threads, rounds) for shape in ENCODE],
            "attend": [attend_case(*shape, threads, rounds) for shape in ATTEND],
            "decode": [decode_case(*shape, threads, rounds) for shape in DECODE],
            **steps,
        }


def encode_case(vectors: int, dim: int, size: int, threads: int, rounds: int) -> dict[str, Any]:
    """Nearest codewords of `[N, M, d]` against faiss's product quantizer, where it is installed."""
    groups = CHANNELS // dim
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(vectors, groups, dim, generator=generator)
    books = torch.randn(groups, size, dim, generator=generator)
    works: dict[str, Any] = {"vqkv": lambda: native.nearest(x, books)}
    try:
        faiss = importlib.import_module("faiss")
    except ImportError:
        speedup = agreement = None
        times = medians(works, rounds, clock(threads))
    else:
        faiss.omp_set_num_threads(threads)
        baseline = faiss.ProductQuantizer(CHANNELS, groups, size.bit_length() - 1)
        faiss.copy_array_to_vector(books.numpy().ravel(), baseline.centroids)
        flat = x.flatten(1).numpy()
        times = medians(
            {**works, "faiss": lambda: baseline.compute_codes(flat)}, rounds, clock(threads)
        )
        speedup = times["faiss"] / times["vqkv"]
        theirs = torch.from_numpy(baseline.decode(baseline.compute_codes(flat)))
        mine = books[torch.arange(groups), native.nearest(x, books).long()].flatten(1)
        agreement = float((mine == theirs).float().mean())
    return {
        "vectors": vectors,
        "dim": dim,
        "codewords": size,
        "milliseconds": 1e3 * times["vqkv"],
        "encode_speedup_vs_faiss": speedup,
        "agreement_with_faiss": agreement,
    }


def decode_case(vectors: int, dim: int, threads: int, rounds: int) -> dict[str, Any]:
    """Codes to vectors, as a fraction of the speed at which memory of that size is filled."""
    groups = CHANNELS // dim
    generator = torch.Generator().manual_seed(0)
    books = torch.randn(groups, 1, 256, dim, generator=generator)
    codes = torch.randint(256, (vectors, groups, 1), generator=generator, dtype=torch.int32)
    output = torch.empty(vectors, groups, dim)
    times = medians(
        {
            "vqkv": lambda: decode_into(output, codes, books),
            "fill": lambda: output.fill_(1.0),
        },
        rounds,
        clock(threads),
    )
    return {
        "vectors": vectors,
        "dim": dim,
        "milliseconds": 1e3 * times["vqkv"],
        "gigabytes_per_second": output.nbytes / times["vqkv"] / 1e9,
        "decode_bandwidth_fraction": times["fill"] / times["vqkv"],
    }


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
