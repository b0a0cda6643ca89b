"""Ridge regression on reconstructions: AQUA-KV's predictors (arXiv 2501.19392, section 3)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, Self

import torch
from einops import rearrange
from pydantic import Field

from vqkv.errors import NotFittedError, StateError
from vqkv.predictors.base import Predictor, PredictorConfig
from vqkv.states import States


class LinearConfig(PredictorConfig):
    """Settings of `Linear`.

    Attributes:
        ridge: penalty on the weights, in mean variances of the sources' channels, and no less than
            fp32 products of states can tell.
        scope: predict a head from the same head of every source, or from all heads together.
    """

    type: Literal["linear"] = "linear"
    ridge: float = Field(default=1e-3, ge=1e-6)
    scope: Literal["head", "layer"] = "layer"


class Linear(Predictor):
    """`x̂ = s A + b`, s the sources' channels side by side.

    `A = (Cov(s) + λI)⁻¹ Cov(s, x)` with `λ = ridge · tr Cov(s) / F`, and `b = E x − E s A`.
    State: `weight` `[U, F, n]` and `bias` `[U, n]` in fp16; U is H or 1, n = C / U.
    """

    Config = LinearConfig
    config: LinearConfig
    weight_: torch.Tensor
    bias_: torch.Tensor

    @property
    def head_local(self) -> bool:
        """Whether the scope is one head."""
        return self.config.scope == "head"

    def fit(self, states: States, sources: Sequence[States]) -> Self:
        """Closed form, one pass over the tokens.

        Chunks are moved by the first one's mean, so that their products keep their digits in fp32;
        sums over chunks and the solution are fp64.

        Raises:
            StateError: weights beyond fp16.
        """
        total: torch.Tensor | None = None
        shift: torch.Tensor | None = None
        for rows in states.beside(sources, lambda x, s: self._rows([*s, x])):  # [U, N, F + n]
            shift = rows.mean(1, keepdim=True) if shift is None else shift
            moved = torch.nn.functional.pad(rows - shift, (0, 1), value=1.0)
            product = (moved.mT @ moved).double()
            total = product if total is None else total + product
        if total is None or shift is None or not states.tokens:
            raise StateError("there are no tokens to learn from")
        count = total[:, -1:, -1:]
        offset = total[:, -1:, :-1] / count  # of the mean from the shift, [U, 1, F + n]
        covariance = total[:, :-1, :-1] / count - offset.mT @ offset
        mean = shift.double() + offset
        features = self._features(covariance.shape[1])
        seen = covariance[:, :features, :features]
        spread = seen.diagonal(dim1=1, dim2=2).mean(1)
        # Sources that never vary predict nothing: what is left of them is rounding, in parts of
        # their size, and must neither be learned from nor make the system singular.
        size = spread + mean[:, 0, :features].square().mean(1)
        penalty = (self.config.ridge * spread).maximum(1e-10 * size)
        penalty = penalty.clamp_min(torch.finfo(torch.float32).tiny)
        eye = torch.eye(features, dtype=seen.dtype, device=seen.device)
        weight = torch.linalg.solve(
            seen + penalty[:, None, None] * eye, covariance[:, :features, features:]
        )
        bias = (mean[:, :, features:] - mean[:, :, :features] @ weight)[:, 0]
        self.weight_, self.bias_ = _stored(weight), _stored(bias)
        return self

    def predict(self, sources: Sequence[torch.Tensor]) -> torch.Tensor:
        """`s A + b`."""
        if not hasattr(self, "weight_"):
            raise NotFittedError("the linear predictor has not been fitted: call fit first")
        heads = sources[0].shape[1]
        rows = self._rows(sources)
        predicted = torch.baddbmm(self.bias_.float().unsqueeze(1), rows, self.weight_.float())
        if self.head_local:
            return rearrange(predicted, "h n d -> n h d")
        return rearrange(predicted, "1 n (h d) -> n h d", h=heads)

    def planned_bytes(self, heads: int, head_dim: int) -> int:
        """Weight and bias in fp16."""
        units = heads if self.head_local else 1
        channels = heads * head_dim // units
        return 2 * units * channels * (len(self.config.sources) * channels + 1)

    def state(self) -> dict[str, torch.Tensor]:
        """`weight` and `bias` in fp16."""
        if not hasattr(self, "weight_"):
            raise NotFittedError("the linear predictor has not been fitted: call fit first")
        return {"weight": self.weight_, "bias": self.bias_}

    def load_state(self, state: dict[str, torch.Tensor]) -> None:
        """Take over `weight` and `bias`. Raises StateError on other names, types or shapes."""
        given = {name: (tensor.dtype, list(tensor.shape)) for name, tensor in state.items()}
        weight, bias = state.get("weight"), state.get("bias")
        fits = (
            set(state) == {"weight", "bias"}
            and weight is not None
            and bias is not None
            and (weight.dtype, bias.dtype) == (torch.float16, torch.float16)
            and (weight.ndim, bias.ndim) == (3, 2)
            and weight.shape[1] == len(self.config.sources) * weight.shape[2]
            and bias.shape == (weight.shape[0], weight.shape[2])
        )
        if not fits:
            raise StateError(
                "state holds 'weight', float16 [U, sources · n, n], and 'bias', float16 [U, n]; "
                f"given {given}"
            )
        self.weight_, self.bias_ = state["weight"], state["bias"]

    def _row(self, x: torch.Tensor) -> torch.Tensor:
        """Tokens `[N, H, D]` as `[U, N, n]`."""
        if self.head_local:
            return rearrange(x, "n h d -> h n d")
        return rearrange(x, "n h d -> 1 n (h d)")

    def _rows(self, sources: Sequence[torch.Tensor]) -> torch.Tensor:
        """Sources side by side, `[U, N, F]`."""
        return torch.cat([self._row(source) for source in sources], 2).float()

    def _features(self, width: int) -> int:
        """F of F + n channels."""
        sources = len(self.config.sources)
        return width * sources // (sources + 1)


def _stored(exact: torch.Tensor) -> torch.Tensor:
    rounded = exact.to(torch.float16)
    if not bool(torch.isfinite(rounded).all()):
        raise StateError(
            f"the linear predictor learned values up to {float(exact.abs().max()):.3g}, beyond "
            "fp16's 65504: raise `ridge`"
        )
    return rounded
