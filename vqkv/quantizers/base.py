"""What every quantizer has: fit, encode, decode, and the bits of a code."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Annotated, ClassVar, Literal

import torch

from vqkv.codebooks.base import Health, check_finite
from vqkv.errors import NotFittedError, StateError
from vqkv.registry import Choice, Component, Config, Registry


class QuantizerConfig(Config):
    """Base of quantizer settings."""

    def stages(self, dim: int) -> int:
        """S: codes stored per subvector of `dim` channels."""
        return 1

    def bits(self) -> int:
        """Bits of one code, 0 to 16."""
        raise NotImplementedError  # pragma: no cover - every concrete config defines it

    @property
    def data_free(self) -> bool:
        """No fit is needed."""
        return False

    def least_samples(self) -> int:
        """Vectors that a codebook cannot be learned from fewer of."""
        return 1

    @property
    def needs_rope_pairs(self) -> bool:
        """Subvectors are RoPE pairs of keys before rotation, side by side."""
        return False

    @property
    def commutes(self) -> bool:
        """A code of a stage names `u_a + i u_b`, which commutes with RoPE as in CommVQ."""
        return False

    @property
    def token_group(self) -> int:
        """Tokens in a row that are only coded together; vectors come in whole runs of them."""
        return 1

    @property
    def couples(self) -> Literal["groups", "heads"] | None:
        """What is chosen together in the metric of what is coded: codes of a head's subvectors, or
        those of a token's heads."""
        return None

    def coupled_heads(self, heads: int) -> int:
        """Of H heads, how many are chosen together where heads are; a number that divides H."""
        return 1


class Quantizer(Component, ABC):
    """Codes vectors `[N, M, d]` as integers `[N, M, S]`, deterministically.

    M counts codebooks here: where subvectors share one, the caller lays them along N.

    Attributes:
        nested: the first stages of a code can be decoded without the others, to something coarser.
    """

    config: QuantizerConfig
    nested: ClassVar[bool] = False
    health_: list[Health]

    def couple(self, metric: torch.Tensor) -> None:
        """Told before `fit` where the config `couples`.

        Args:
            metric: of groups, `[U, n, n]`, by which errors of the n = M·d / U channels of a unit
                cost; the diagonal blocks of its subvectors are unit matrices and given as zeros.
                Of B sets of h heads, `[B, h, n, h, n]`: how far errors of one head's n channels
                push those of another, in its own metric; zeros for a head and itself.
        """

    def fit(
        self, samples: torch.Tensor, weights: torch.Tensor | None = None, *, seed: int = 0
    ) -> Quantizer:
        """Learn from samples `[N, M, d]` with optional weights `[N]` or `[N, M]`.

        Raises:
            StateError: wrong shape, NaN or infinity, or too few samples.
        """
        if samples.ndim != 3:
            raise StateError(f"samples have shape [N, M, d], given {list(samples.shape)}")
        check_finite(samples, "samples", "[N, M, d]")
        self._fit(samples.float(), weights, seed)
        return self

    @abstractmethod
    def _fit(self, samples: torch.Tensor, weights: torch.Tensor | None, seed: int) -> None: ...

    @abstractmethod
    def prepare(self, subspaces: int, dim: int) -> None:
        """Set up a data-free quantizer for M subspaces of `dim` channels, without samples.

        Raises:
            NotFittedError: these settings need data.
        """

    @abstractmethod
    def encode(self, x: torch.Tensor) -> torch.Tensor:
        """Codes `[N, M, S]` (int32) of vectors `[N, M, d]`."""

    @abstractmethod
    def decode(self, codes: torch.Tensor) -> torch.Tensor:
        """Vectors `[N, M, d]` (fp32) of codes `[N, M, S]`, or fewer stages where it is nested."""

    @abstractmethod
    def planned_bytes(self, subspaces: int, dim: int) -> int:
        """Bytes of `state` for M subspaces of `dim` channels, known before `fit`."""

    @abstractmethod
    def state(self) -> dict[str, torch.Tensor]:
        """Learned tensors by flat name: what is saved and what counts as side bytes."""

    @abstractmethod
    def load_state(self, state: dict[str, torch.Tensor]) -> None:
        """Take over what `state` returned. Raises StateError on a wrong name, shape or type."""

    def needs_fit(self) -> NotFittedError:
        """The error for use before `fit`."""
        return NotFittedError(
            f"{type(self).__name__} has not been fitted: call fit(samples [N, M, d]) first"
        )


QUANTIZERS: Registry[type[Quantizer]] = Registry(
    "vqkv.quantizers",
    Quantizer,
    {
        "product": "vqkv.quantizers.product:ProductQuantizer",
        "residual": "vqkv.quantizers.residual:ResidualQuantizer",
        "joint_heads": "vqkv.quantizers.joint_heads:JointHeadsQuantizer",
        "joint_product": "vqkv.quantizers.joint_product:JointProductQuantizer",
        "identity": "vqkv.quantizers.identity:IdentityQuantizer",
        "rope_commutative": "vqkv.quantizers.commutative:Commutative",
        "sign_sketch": "vqkv.quantizers.sign_sketch:SignSketch",
        "e8p": "vqkv.quantizers.e8p:E8P",
        "trellis": "vqkv.quantizers.trellis:Trellis",
        "nested": "vqkv.quantizers.nested:Nested",
    },
)

QuantizerChoice = Annotated[QuantizerConfig, Choice(QUANTIZERS)]
