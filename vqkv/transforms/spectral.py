"""Rotate into the eigenbasis of a stream's covariance, in the metric in which errors count.

For keys as NOVA-KV's (arXiv 2608.04074); the same for values in the metric of the output
projection, and over all heads together.
"""

from __future__ import annotations

from typing import Literal

import torch
from einops import rearrange

from vqkv.errors import NotFittedError, StateError
from vqkv.rotation import Pairs
from vqkv.states import States
from vqkv.transforms.base import Metric, Transform, TransformConfig
from vqkv.transforms.roots import normed, roots
from vqkv.transforms.statistics import mean_and_covariance


class SpectralConfig(TransformConfig):
    """Settings of `Spectral`.

    Attributes:
        metric: `query` for keys, `output` for values; None for squared error of the states.
        scope: rotate each head's D channels, or all C channels of a token together.
    """

    type: Literal["spectral"] = "spectral"
    metric: Metric | None = None
    scope: Literal["head", "layer"] = "head"


class Spectral(Transform):
    """`z = (x − μ) W U`: `W = M^{1/2}`, U the eigenvectors of `W Cov(x) W`, strongest first.

    Squared error of z is then the cost `eᵀ M e` of an error e. Ranks are laid out so that channel
    i of head h is rank `i · H + h` of a token rotated as a whole: a strided grouping deals strong
    and weak ranks to every group, whatever the scope.

    State: `mean` `[H, D]` and `matrix` `[V, n, n]`, which maps z back, in fp16; V is H or 1. What
    `forward` multiplies by is the inverse of that very matrix, so coding undoes its rounding.
    """

    Config = SpectralConfig
    config: SpectralConfig
    needs_data = True
    folds = True
    mean_: torch.Tensor
    matrix_: torch.Tensor

    @property
    def metric(self) -> Metric | None:
        """As configured."""
        return self.config.metric

    @property
    def head_local(self) -> bool:
        """Whether the scope is one head."""
        return self.config.scope == "head"

    def planned_bytes(self, heads: int, head_dim: int) -> int:
        """Mean and matrix in fp16."""
        units = heads if self.head_local else 1
        channels = heads * head_dim // units
        return 2 * (heads * head_dim + units * channels**2)

    def fit(
        self, states: States, metric: torch.Tensor | None = None, pairs: Pairs = ()
    ) -> Spectral:
        """Learn μ, W and U, in fp64.

        Raises:
            StateError: no tokens, no metric though one is configured, or values beyond fp16.
        """
        if (self.config.metric is None) != (metric is None):
            raise StateError(
                f"spectral: the metric {self.config.metric!r} is configured, "
                f"{'none' if metric is None else 'one'} was given"
            )
        mean, covariance = mean_and_covariance(states, self._rows)
        eye = torch.eye(covariance.shape[1], dtype=torch.float64, device=covariance.device)
        root, inverse = (
            (eye, eye) if metric is None else roots(normed(self._joined(metric.double())))
        )
        # eigh sorts upwards; a fixed sign keeps artefacts alike across machines.
        vectors = torch.linalg.eigh(root @ covariance @ root).eigenvectors.flip(-1)
        signs = vectors.gather(1, vectors.abs().argmax(1, keepdim=True)).sign()
        back = (vectors * signs).transpose(1, 2) @ inverse  # z to x, [V, n, n]
        self._take(mean.to(torch.float16), back.to(torch.float16))
        return self

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, None]:
        """Rotate."""
        self._check_fitted()
        rows = self._rows(x.float() - self.mean_.float())
        return self._ranked(rows @ self._ahead.to(rows.device), x.shape[1]), None

    def inverse(self, z: torch.Tensor, side: torch.Tensor | None) -> torch.Tensor:
        """Rotate back."""
        self._check_fitted()
        heads = z.shape[1]
        ranked = rearrange(z, "n h d -> h n d" if self.head_local else "n h d -> 1 n (d h)")
        rows = ranked @ self.matrix_.float()
        if self.head_local:
            return rearrange(rows, "h n d -> n h d") + self.mean_.float()
        return rearrange(rows, "1 n (h d) -> n h d", h=heads) + self.mean_.float()

    def state(self) -> dict[str, torch.Tensor]:
        """`mean` and `matrix` in fp16."""
        self._check_fitted()
        return {"mean": self.mean_, "matrix": self.matrix_}

    def load_state(self, state: dict[str, torch.Tensor]) -> None:
        """Take over `mean` and `matrix`. Raises StateError on other names, types or shapes."""
        given = {name: (tensor.dtype, list(tensor.shape)) for name, tensor in state.items()}
        mean, matrix = state.get("mean"), state.get("matrix")
        fits = (
            set(state) == {"mean", "matrix"}
            and mean is not None
            and matrix is not None
            and (mean.dtype, matrix.dtype) == (torch.float16, torch.float16)
            and (mean.ndim, matrix.ndim) == (2, 3)
            and matrix.shape[1] == matrix.shape[2]
            and matrix.shape[0] == (mean.shape[0] if self.head_local else 1)
            and matrix.shape[0] * matrix.shape[1] == mean.numel()
        )
        if not fits:
            raise StateError(
                "state holds 'mean', float16 [H, D], and 'matrix', float16 [V, n, n]; "
                f"given {given}"
            )
        self._take(state["mean"], state["matrix"])

    def _take(self, mean: torch.Tensor, matrix: torch.Tensor) -> None:
        for name, tensor in (("mean", mean), ("matrix", matrix)):
            if not bool(torch.isfinite(tensor).all()):
                raise StateError(f"spectral: '{name}' holds values beyond fp16's 65504")
        self.mean_, self.matrix_ = mean, matrix
        self._ahead = torch.linalg.inv(matrix.double()).float()

    def _check_fitted(self) -> None:
        if not hasattr(self, "matrix_"):
            raise NotFittedError("Spectral has not been fitted: call fit first")

    def _rows(self, x: torch.Tensor) -> torch.Tensor:
        """Tokens `[N, H, D]` as `[V, N, n]`."""
        return rearrange(x, "n h d -> h n d" if self.head_local else "n h d -> 1 n (h d)")

    def _ranked(self, rows: torch.Tensor, heads: int) -> torch.Tensor:
        """Ranks `[V, N, n]` as tokens `[N, H, D]`."""
        if self.head_local:
            return rearrange(rows, "h n d -> n h d")
        return rearrange(rows, "1 n (d h) -> n h d", h=heads)

    def _joined(self, metric: torch.Tensor) -> torch.Tensor:
        """A metric per head `[H, D, D]`, as one block-diagonal `[1, C, C]` for the layer scope."""
        return metric if self.head_local else torch.block_diag(*metric).unsqueeze(0)
