"""A randomised Hadamard rotation: spreads outliers evenly over channels."""

from __future__ import annotations

import math
from functools import cache
from typing import Literal

import torch
from pydantic import Field

from vqkv.errors import SchemeError
from vqkv.transforms.base import Transform, TransformConfig


class HadamardConfig(TransformConfig):
    """Settings of `Hadamard`.

    Attributes:
        scope: rotate each head's D channels, or all C channels of a token together.
        block: rotate runs of this many channels apart; None for the whole scope.
        sign_seed: seed of the random signs; None for none.
    """

    type: Literal["hadamard"] = "hadamard"
    scope: Literal["head", "layer"] = "head"
    block: int | None = Field(default=None, ge=1)
    sign_seed: int | None = 0


class Hadamard(Transform):
    """`z = x · diag(±1) · Hᵀ`, H orthogonal.

    For n = 2^a · m channels, m odd, H is the Kronecker product of Sylvester's Hadamard matrix of
    size 2^a and an m × m cosine matrix (DCT-II), so every n is possible.
    """

    Config = HadamardConfig
    config: HadamardConfig
    folds = True

    @property
    def head_local(self) -> bool:
        """Whether the scope is one head."""
        return self.config.scope == "head"

    def check(self, heads: int, head_dim: int) -> None:
        """Refuse a `block` that does not divide the channels of the scope."""
        channels = head_dim if self.head_local else heads * head_dim
        if channels % (self.config.block or channels):
            raise SchemeError(
                f"hadamard.block: {self.config.block} does not divide the {channels} channels of "
                f"a {self.config.scope}"
            )

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, None]:
        """Rotate. Raises SchemeError as `check` does."""
        rows, matrix = self._rows(x)
        return (rows @ matrix.T).view_as(x), None

    def inverse(self, z: torch.Tensor, side: torch.Tensor | None) -> torch.Tensor:
        """Rotate back."""
        rows, matrix = self._rows(z)
        return (rows @ matrix).view_as(z)

    def _rows(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        heads, head_dim = x.shape[1:]
        self.check(heads, head_dim)
        block = self.config.block or (head_dim if self.head_local else heads * head_dim)
        return x.reshape(-1, block), _rotation(block, self.config.sign_seed, x.device)


@cache
def _rotation(size: int, sign_seed: int | None, device: torch.device) -> torch.Tensor:
    """Orthogonal `[n, n]`, signs included."""
    power = size & -size
    matrix = torch.kron(_sylvester(power), _cosine(size // power))
    if sign_seed is not None:
        generator = torch.Generator().manual_seed(sign_seed)
        matrix = matrix * (2 * torch.randint(2, (size,), generator=generator) - 1)
    return matrix.float().to(device)


def _sylvester(size: int) -> torch.Tensor:
    matrix = torch.ones(1, 1, dtype=torch.float64)
    step = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64) / math.sqrt(2)
    while matrix.shape[0] < size:
        matrix = torch.kron(matrix, step)
    return matrix


def _cosine(size: int) -> torch.Tensor:
    k = torch.arange(size, dtype=torch.float64)
    matrix = torch.cos(math.pi / size * k.unsqueeze(1) * (k + 0.5)) * math.sqrt(2 / size)
    matrix[0] /= math.sqrt(2)
    return matrix
