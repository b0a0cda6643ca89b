"""One pass over the samples: each to its nearest codeword, by one of several backends."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any, Literal

import torch

from vqkv.codebooks.statistics import Statistics
from vqkv.errors import KernelError
from vqkv.kernels import native
from vqkv.kernels.encode.naive import nearest

# Every backend ranks codewords by ‖c‖² − 2⟨x, c⟩, which cancels badly far from the origin: samples
# and codewords are first moved by the codewords' mean.

#: Scalars of samples taken at a time; bounds the fp64 transients to about 100 MiB.
MAX_SCALARS = 1 << 22

Backend = Literal["auto", "native", "torch", "faiss", "sklearn"]
Step = Callable[[torch.Tensor, torch.Tensor, torch.Tensor | None], Statistics]


def step_for(backend: Backend, device: torch.device) -> Step:
    """The assignment pass of a backend: samples `[N, M, d]`, codewords `[M, K, d]`, weights.

    `auto` is the compiled kernel on CPUs that have it, else torch. scikit-learn has no single
    pass; the one around its iterations is torch's.

    Raises:
        KernelError: the backend cannot run here; says why.
    """
    if backend == "auto":
        able = device.type == "cpu" and native.available()
        return native_step if able else torch_step
    if backend == "native":
        if device.type != "cpu":
            raise KernelError(
                f"the k-means backend 'native' runs on cpu, the samples are on {device.type}: "
                "use backend 'torch'"
            )
        if not native.available():
            raise KernelError(f"the k-means backend 'native': {native.unavailable_reason()}")
        return native_step
    if backend == "faiss":
        _faiss()
        return faiss_step
    return torch_step


def native_step(
    x: torch.Tensor, codewords: torch.Tensor, weights: torch.Tensor | None
) -> Statistics:
    """By the compiled kernel, which assigns and sums in one go."""
    middle = codewords.mean(1)
    found = native.assign_accumulate(x - middle, codewords - middle[:, None], weights)
    sums = found.sums + found.counts.unsqueeze(-1) * middle[:, None].double()
    return Statistics(sums, found.counts, found.inertia)


def torch_step(
    x: torch.Tensor, codewords: torch.Tensor, weights: torch.Tensor | None
) -> Statistics:
    """By batched matrix products, on any device."""
    middle = codewords.mean(1)
    return _accumulate(
        x, codewords, weights, lambda block: nearest(block - middle, codewords - middle[:, None])
    )


def faiss_step(
    x: torch.Tensor, codewords: torch.Tensor, weights: torch.Tensor | None
) -> Statistics:
    """By faiss, subspace by subspace; on the GPU where both it and the samples are there.

    Raises:
        KernelError: faiss is not installed.
    """
    faiss = _faiss()
    search: Callable[..., Any] = faiss.knn
    if x.is_cuda and hasattr(faiss, "StandardGpuResources"):
        resources = faiss.StandardGpuResources()

        def search(queries: Any, base: Any, k: int) -> Any:
            return faiss.knn_gpu(resources, queries, base, k, device=x.device.index or 0)

    middle = codewords.mean(1)
    books = (codewords - middle[:, None]).cpu().numpy()

    def codes(block: torch.Tensor) -> torch.Tensor:
        vectors = (block - middle).transpose(0, 1).contiguous().cpu().numpy()
        found = [search(v, book, 1)[1][:, 0] for v, book in zip(vectors, books, strict=True)]
        return torch.stack([torch.from_numpy(f) for f in found], 1).to(x.device)

    return _accumulate(x, codewords, weights, codes)


def sklearn_lloyd(
    x: torch.Tensor, start: torch.Tensor, weights: torch.Tensor | None, iterations: int
) -> torch.Tensor:
    """Codewords `[M, K, d]` after scikit-learn's own Lloyd iterations from `start`."""
    from sklearn.cluster import KMeans  # takes a second to import

    books = []
    for m in range(x.shape[1]):
        model = KMeans(
            start.shape[1],
            init=start[m].cpu().numpy(),
            n_init=1,
            max_iter=iterations,
            tol=0,
            algorithm="lloyd",
        )
        model.fit(
            x[:, m].cpu().numpy(),
            sample_weight=None if weights is None else weights[:, m].cpu().numpy(),
        )
        books.append(torch.from_numpy(model.cluster_centers_))
    return torch.stack(books).to(x)


def _faiss() -> Any:
    try:
        return importlib.import_module("faiss")
    except ImportError as error:
        raise KernelError(
            f"the k-means backend 'faiss' needs faiss, which does not import ({error}): "
            "pip install 'vqkv[cpu]' (or 'vqkv[gpu]'), or use backend 'auto'"
        ) from error


def _accumulate(
    x: torch.Tensor,
    codewords: torch.Tensor,
    weights: torch.Tensor | None,
    assign: Callable[[torch.Tensor], torch.Tensor],
) -> Statistics:
    books, size, dim = codewords.shape
    table = codewords.reshape(books * size, dim)
    first = torch.arange(books, device=x.device) * size
    totals = torch.zeros(books * size, dim + 1, dtype=torch.float64, device=x.device)
    inertia = torch.zeros(books, dtype=torch.float64, device=x.device)
    rows = max(1, MAX_SCALARS // (books * dim))
    for start in range(0, x.shape[0], rows):
        block = x[start : start + rows]
        codewords_of = assign(block).long() + first  # [n, M], rows of `table`
        distance = (block - table[codewords_of]).square().sum(-1, dtype=torch.float64)
        values = torch.nn.functional.pad(block.double(), (0, 1), value=1.0)  # x and its count
        if weights is not None:
            weight = weights[start : start + rows].double()
            values *= weight.unsqueeze(-1)
            distance *= weight
        # Unlike index_add_, this adds in a fixed order on GPUs too (on CPUs where it is fp64).
        totals.index_put_((codewords_of.flatten(),), values.flatten(0, 1), accumulate=True)
        inertia += distance.sum(0)
    totals = totals.view(books, size, dim + 1)
    return Statistics(totals[..., :dim], totals[..., dim], inertia)
