"""What every transform has: forward, inverse, and what must be stored per token."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Annotated, ClassVar, Literal, Self

import torch

from vqkv.errors import NotFittedError, StateError
from vqkv.registry import Choice, Component, Config, Registry
from vqkv.rotation import Pairs
from vqkv.states import States

#: In which an error counts: by what queries make of a key, the output projection of a value, or the
#: model's loss of either.
Metric = Literal["query", "output", "fisher"]


class TransformConfig(Config):
    """Base of transform settings."""

    type: str


class Transform(Component, ABC):
    """An invertible map of tokens `[N, H, D]`, given what it stores of each token on the side.

    Attributes:
        needs_data: `fit` has to run first.
        folds: it is linear and the same for every token, so attention on codes can move it into
            the query or the output.
        keeps_metric: a metric of what goes in is one of what comes out, up to a factor per token.
        keeps_channels: each channel that comes out is one that goes in, scaled or shifted.
    """

    config: TransformConfig
    needs_data: ClassVar[bool] = False
    folds: ClassVar[bool] = False
    keeps_metric: ClassVar[bool] = False
    keeps_channels: ClassVar[bool] = False

    @property
    def metric(self) -> Metric | None:
        """The metric that `fit` wants; None where squared error will do."""
        return None

    @property
    def head_local(self) -> bool:
        """Heads are not mixed."""
        return True

    @property
    def scales_heads(self) -> bool:
        """Its inverse multiplies each head, or the whole token, by the scalar stored for it."""
        return False

    @property
    def token_group(self) -> int:
        """Tokens in a row that only go through it together, a part of a page; else 1."""
        return 1

    def for_pairs(self, pairs: Pairs) -> Self:
        """This transform, told which channels of a head rotate together; few need to know."""
        return self

    def check(self, heads: int, head_dim: int) -> None:
        """Raises SchemeError where the settings do not fit H and D."""

    def side_count(self, heads: int, head_dim: int) -> int:
        """Scalars of 16 bits stored per token."""
        return 0

    def planned_bytes(self, heads: int, head_dim: int) -> int:
        """Bytes of `state`, known before `fit`."""
        return 0

    def mixed_run(self, head_dim: int) -> int | None:
        """Each run of so many channels that come out is a mix of whole RoPE pairs, and of no other
        channels; None where channels stay where they were.
        """
        return None if self.keeps_channels else head_dim

    def fit(
        self, states: States, metric: torch.Tensor | None = None, pairs: Pairs = ()
    ) -> Transform:
        """Learn from all chunks of a stream.

        Args:
            states: what the transforms before this one make of the stream.
            metric: `[H, D, D]`, given to transforms whose `metric` asks for one: an error e of a
                head costs `eᵀ M e`.
            pairs: the RoPE pairs of a head.
        """
        return self

    @abstractmethod
    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """`x` `[N, H, D]` to `(z [N, H, D], side [N, F] in fp16 or None)`.

        `z` is computed from the side as stored, rounding included, so `inverse` undoes it.
        """

    @abstractmethod
    def inverse(self, z: torch.Tensor, side: torch.Tensor | None) -> torch.Tensor:
        """`z` `[N, H, D]` and its side back to states `[N, H, D]`."""

    def state(self) -> dict[str, torch.Tensor]:
        """Learned tensors by flat name."""
        return {}

    def load_state(self, state: dict[str, torch.Tensor]) -> None:
        """Take over what `state` returned. Raises StateError on other names."""
        if state:
            raise StateError(f"{type(self).__name__} has no state, given {sorted(state)}")


class ChannelTransform(Transform):
    """A transform that learns one number per channel, `channels_` `[H, D]` in fp16."""

    needs_data = True
    folds = True
    channels_: torch.Tensor

    def planned_bytes(self, heads: int, head_dim: int) -> int:
        """`channels` `[H, D]` in fp16."""
        return 2 * heads * head_dim

    def channels(self) -> torch.Tensor:
        """What was learned, in fp32. Raises NotFittedError before fit."""
        if not hasattr(self, "channels_"):
            raise NotFittedError(f"{type(self).__name__} has not been fitted: call fit first")
        return self.channels_.float()

    def state(self) -> dict[str, torch.Tensor]:
        """`channels` `[H, D]` in fp16."""
        self.channels()
        return {"channels": self.channels_}

    def load_state(self, state: dict[str, torch.Tensor]) -> None:
        """Take over `channels`. Raises StateError on another name, rank or type."""
        given = {name: (tensor.dtype, tensor.ndim) for name, tensor in state.items()}
        if given != {"channels": (torch.float16, 2)}:
            raise StateError(f"state holds 'channels', float16 [H, D]; given {given}")
        self.channels_ = state["channels"]

    def _keep(self, channels: torch.Tensor) -> None:
        rounded = channels.to(torch.float16)
        if not bool(torch.isfinite(rounded).all()):
            raise StateError(
                f"{type(self).__name__} learned values up to {float(channels.abs().max()):.3g}, "
                "beyond fp16's 65504"
            )
        self.channels_ = rounded


TRANSFORMS: Registry[type[Transform]] = Registry(
    "vqkv.transforms",
    Transform,
    {
        "center": "vqkv.transforms.center:Center",
        "channel_scale": "vqkv.transforms.channel_scale:ChannelScale",
        "token_scale": "vqkv.transforms.token_scale:TokenScale",
        "hadamard": "vqkv.transforms.hadamard:Hadamard",
        "spectral": "vqkv.transforms.spectral:Spectral",
        "pair_metric": "vqkv.transforms.pair_metric:PairMetric",
        "page_scale": "vqkv.transforms.page_scale:PageScale",
        "page_center": "vqkv.transforms.page_center:PageCenter",
        "polar": "vqkv.transforms.polar:Polar",
        "outliers": "vqkv.transforms.outliers:Outliers",
    },
)

TransformChoice = Annotated[TransformConfig, Choice(TRANSFORMS)]
