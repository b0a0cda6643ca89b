"""What every predictor has: fit on reconstructions, predict from them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Annotated, ClassVar, Self

import torch
from pydantic import Field

from vqkv.errors import StateError
from vqkv.layouts import Stream
from vqkv.registry import Choice, Component, Config, Registry
from vqkv.states import States


class Source(Config):
    """A stream to predict from, by how many compressed layers it lies back; 0 is this layer."""

    stream: Stream
    back: int = Field(ge=0)


class PredictorConfig(Config):
    """Base of predictor settings."""

    type: str
    sources: tuple[Source, ...] = Field(
        min_length=1,
        description="Streams that are decoded earlier: of layers before, or this layer's keys.",
    )


class Predictor(Component, ABC):
    """Predicts tokens `[N, H, D]` of a stream from reconstructions of other streams.

    What is coded is the difference. Sources are reconstructions when fitting too, so a codec's
    own errors are in the loop.

    Attributes:
        needs_data: `fit` has to run first.
    """

    config: PredictorConfig
    needs_data: ClassVar[bool] = True

    @property
    def head_local(self) -> bool:
        """A head is predicted from the same head alone."""
        return False

    def fit(self, states: States, sources: Sequence[States]) -> Self:
        """Learn to predict `states` from `sources`, which hold the same tokens."""
        return self

    @abstractmethod
    def predict(self, sources: Sequence[torch.Tensor]) -> torch.Tensor:
        """Tokens `[N, H, D]` (fp32) from each source's `[N, H, D]`, in the config's order.

        Raises:
            NotFittedError: before `fit`.
        """

    def planned_bytes(self, heads: int, head_dim: int) -> int:
        """Bytes of `state`, known before `fit`."""
        return 0

    def state(self) -> dict[str, torch.Tensor]:
        """Learned tensors by flat name."""
        return {}

    def load_state(self, state: dict[str, torch.Tensor]) -> None:
        """Take over what `state` returned. Raises StateError on other names."""
        if state:
            raise StateError(f"{type(self).__name__} has no state, given {sorted(state)}")


PREDICTORS: Registry[type[Predictor]] = Registry(
    "vqkv.predictors",
    Predictor,
    {
        "linear": "vqkv.predictors.linear:Linear",
        "copy": "vqkv.predictors.copy:Copy",
    },
)

PredictorChoice = Annotated[PredictorConfig, Choice(PREDICTORS)]
