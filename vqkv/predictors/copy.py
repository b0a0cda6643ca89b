"""The prediction is another layer's stream as it is: shared caches (KVSharer, arXiv 2410.18517)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal

import torch
from pydantic import Field

from vqkv.predictors.base import Predictor, PredictorConfig, Source


class CopyConfig(PredictorConfig):
    """Settings of `Copy`: one source."""

    type: Literal["copy"] = "copy"
    sources: tuple[Source, ...] = Field(min_length=1, max_length=1)


class Copy(Predictor):
    """`x̂ = s`. With a zero-bit quantizer nothing is stored at all."""

    Config = CopyConfig
    needs_data: ClassVar[bool] = False

    @property
    def head_local(self) -> bool:
        """Each head is its source's."""
        return True

    def predict(self, sources: Sequence[torch.Tensor]) -> torch.Tensor:
        """The source."""
        (source,) = sources
        return source
