"""Drafts: states from the first stages of stored codes, coarser and from the same bytes.

QuantSpec (arXiv 2502.10424) speculates with such a draft of the cache that verifies it. To leave
stages out of what is stored, see `vqkv.truncation`.
"""

from __future__ import annotations

import torch

from vqkv.codec import Codec
from vqkv.errors import SchemeError


class DraftCodec(Codec):
    """A fitted codec that stores all stages of a code and reads the first `stages` of them.

    Codes of fewer stages are read whole.

    Raises:
        SchemeError: stages that cannot be left out, or a predictor.
    """

    def __init__(self, codec: Codec, stages: int) -> None:
        self.__dict__.update(codec.__dict__)
        self.stages = stages
        if self.predictor is not None:
            raise SchemeError(
                f"{self.where}: its codes are of what full reconstructions of other streams leave "
                "over, so a draft of those cannot be added to them"
            )
        for quantizer, segment in zip(self.quantizers, self.layout.segments, strict=True):
            if segment.stages > stages and not quantizer.nested:
                raise SchemeError(
                    f"{self.where}: no stage of {type(quantizer).__name__} can be left out when "
                    "its codes are read"
                )

    def to(self, device: torch.device) -> Codec:
        """Still a draft on another device."""
        return DraftCodec(super().to(device), self.stages)

    def _read(self, codes: torch.Tensor) -> torch.Tensor:
        return codes[..., : self.stages]
