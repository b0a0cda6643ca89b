"""Learn the Gaussian grids in `vqkv/data/gaussian-grids.safetensors`: k-means on many samples.

    python tools/gaussian_grids.py

Grids of one dimension are not among them: Lloyd–Max levels are computed when asked for.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save_file

from vqkv.codebooks.kmeans import KMeans

TARGET = Path(__file__).parent.parent / "vqkv" / "data" / "gaussian-grids.safetensors"

#: (d, code bits)
GRIDS = ((2, 4), (2, 6), (2, 8), (4, 8), (8, 8))
SAMPLES, ITERATIONS = 1 << 20, 100


def main() -> None:
    """Learn, report the error per coordinate, write."""
    grids = {}
    for dim, bits in GRIDS:
        samples = torch.randn(SAMPLES, 1, dim, generator=torch.Generator().manual_seed(dim))
        learner = KMeans(iterations=ITERATIONS).fit(samples, 2**bits)
        held_out = torch.randn(SAMPLES, 1, dim, generator=torch.Generator().manual_seed(99))
        error = torch.cdist(held_out[:, 0].split(4096)[0], learner.codewords_[0, 0]).amin(1)
        print(f"d = {dim}, {bits} bits: {float(error.square().mean()) / dim:.4f} per coordinate")
        grids[f"{dim}x{bits}"] = learner.codewords_[0, 0].half()
    save_file(grids, TARGET)


if __name__ == "__main__":
    main()
