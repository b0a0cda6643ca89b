"""Whole RoPE pairs in groups, each in its own block of a metric: keys that are read by look-up."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field

from vqkv.errors import NotFittedError, SchemeError, StateError
from vqkv.rotation import Pairs
from vqkv.states import States
from vqkv.transforms.base import Metric, Transform, TransformConfig
from vqkv.transforms.pairing import paired_groups
from vqkv.transforms.roots import normed, roots
from vqkv.transforms.statistics import mean_and_covariance


class PairMetricConfig(TransformConfig):
    """Settings of `PairMetric`.

    Attributes:
        metric: in which errors count.
        dim: channels of a group, as the grouping after it has.
        code_bits: that a group's code is taken to have.
    """

    type: Literal["pair_metric"] = "pair_metric"
    metric: Metric = "query"
    dim: int = Field(ge=2, le=4096, multiple_of=2)
    code_bits: int = Field(default=8, ge=1)


class PairMetric(Transform):
    """`z_g = (x − μ)_g W_g`, with `W_g = M_gg^{1/2}`, for each group g of whole RoPE pairs.

    Squared error of z is the cost `eᵀ M e` of an error e, up to what groups do to each other. Group
    g comes out as channels g·d to g·d + d − 1. Since its inverse mixes no groups, codewords of
    contiguous groups of `dim` can be stored as plain channels, mean included: a read is one look-up
    per code and a rotation of its pairs.

    Pairs are grouped so that ideal codes would leave least of all groups together, as far as
    exchanges of two pairs get (`pairing`): channels that tell about each other in one group, and
    as much to code in every group.

    State: `mean` `[H, D]` and `blocks` `[H, G, d, d]`, which map z back, in fp16, and `order`
    `[H, D]` (int64), the channels of each head by group.
    """

    Config = PairMetricConfig
    config: PairMetricConfig
    needs_data = True
    folds = True
    mean_: torch.Tensor
    blocks_: torch.Tensor
    order_: torch.Tensor

    @property
    def metric(self) -> Metric:
        """As configured."""
        return self.config.metric

    def check(self, heads: int, head_dim: int) -> None:
        """Refuse a `dim` that does not divide D."""
        if head_dim % self.config.dim:
            raise SchemeError(
                f"pair_metric.dim: {self.config.dim} does not divide head dim {head_dim}"
            )

    def mixed_run(self, head_dim: int) -> int:
        """A group."""
        return self.config.dim

    def planned_bytes(self, heads: int, head_dim: int) -> int:
        """Mean and blocks in fp16, order in int64."""
        return heads * head_dim * (2 + 2 * self.config.dim + 8)

    def fit(
        self, states: States, metric: torch.Tensor | None = None, pairs: Pairs = ()
    ) -> PairMetric:
        """Learn μ, the groups and their blocks, in fp64.

        Raises:
            StateError: no tokens, no metric, or values beyond fp16.
            SchemeError: as `check` does.
        """
        if metric is None:
            raise StateError(f"pair_metric: the metric {self.config.metric!r} is needed")
        metric = normed(metric.double())
        heads, head_dim = metric.shape[:2]
        self.check(heads, head_dim)
        mean, covariance = mean_and_covariance(states, _by_head)
        chosen = [
            paired_groups(*of_head, pairs, self.config.dim, self.config.code_bits)
            for of_head in zip(covariance, metric, strict=True)
        ]
        order = torch.stack(chosen)  # [H, D]
        index = order.view(heads, -1, self.config.dim)  # [H, G, d]
        every_head = torch.arange(heads)[:, None, None, None]
        blocks = metric[every_head, index.unsqueeze(3), index.unsqueeze(2)]
        _, back = roots(blocks)
        self._take(mean.to(torch.float16), back.to(torch.float16), order)
        return self

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, None]:
        """Deal channels to groups, and each group into its block."""
        self._check_fitted()
        order = self.order_.expand(len(x), -1, -1)
        dealt = (x.float() - self.mean_.float()).gather(2, order)
        return self._by_block(dealt, self._ahead.to(x.device)), None

    def inverse(self, z: torch.Tensor, side: torch.Tensor | None) -> torch.Tensor:
        """Back to channels."""
        self._check_fitted()
        dealt = self._by_block(z, self.blocks_.float())
        order = self.order_.expand(len(z), -1, -1)
        return torch.empty_like(dealt).scatter_(2, order, dealt) + self.mean_.float()

    def state(self) -> dict[str, torch.Tensor]:
        """`mean`, `blocks` and `order`."""
        self._check_fitted()
        return {"mean": self.mean_, "blocks": self.blocks_, "order": self.order_}

    def load_state(self, state: dict[str, torch.Tensor]) -> None:
        """Take over `mean`, `blocks` and `order`. Raises StateError where they do not fit."""
        given = {name: (tensor.dtype, list(tensor.shape)) for name, tensor in state.items()}
        heads, head_dim = given["mean"][1] if given.get("mean", (None, []))[1][1:] else (0, 0)
        groups, dim = head_dim // self.config.dim, self.config.dim
        expected = {
            "mean": (torch.float16, [heads, head_dim]),
            "blocks": (torch.float16, [heads, groups, dim, dim]),
            "order": (torch.int64, [heads, head_dim]),
        }
        if given != expected:
            raise StateError(
                f"state holds 'mean', float16 [H, D], 'blocks', float16 [H, D / {dim}, {dim}, "
                f"{dim}], and 'order', int64 [H, D]; given {given}"
            )
        self._take(state["mean"], state["blocks"], state["order"])

    def _take(self, mean: torch.Tensor, blocks: torch.Tensor, order: torch.Tensor) -> None:
        for name, tensor in (("mean", mean), ("blocks", blocks)):
            if not bool(torch.isfinite(tensor).all()):
                raise StateError(f"pair_metric: '{name}' holds values beyond fp16's 65504")
        channels = torch.arange(order.shape[1], device=order.device)
        if not torch.equal(order.sort(1).values, channels.expand_as(order)):
            raise StateError(f"pair_metric: 'order' is no permutation of {len(channels)} channels")
        self.mean_, self.blocks_, self.order_ = mean, blocks, order
        # What `forward` multiplies by undoes the rounding of what is stored.
        self._ahead = torch.linalg.inv(blocks.double()).float()

    def _by_block(self, x: torch.Tensor, blocks: torch.Tensor) -> torch.Tensor:
        grouped = x.unflatten(2, (-1, self.config.dim))
        return torch.einsum("nhgi,hgij->nhgj", grouped, blocks).flatten(2)

    def _check_fitted(self) -> None:
        if not hasattr(self, "blocks_"):
            raise NotFittedError("PairMetric has not been fitted: call fit first")


def _by_head(x: torch.Tensor) -> torch.Tensor:
    """Tokens `[N, H, D]` as `[H, N, D]`."""
    return x.transpose(0, 1)
