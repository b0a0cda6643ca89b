"""What every codebook learner has: `fit`, codewords, health."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Annotated, Any

import torch

from vqkv.errors import NotFittedError, StateError
from vqkv.registry import Choice, Component, Config, Registry


@dataclass(frozen=True)
class Health:
    """How well a codebook came out, over all subspaces.

    Attributes:
        inertia: mean squared distance to the chosen codeword per vector, as learning went on;
            the last value is that of the final codewords.
        entropy: bits of the usage distribution, mean over subspaces; at most log2 K.
        dead_before: codewords that no sample used, summed over iterations, before revival.
        dead_after: codewords that no sample uses in the end.
        last_gain: how much of its distortion the last iteration still took away, as a part of 1,
            which says how far from convergence learning ended; None where nothing iterated.
    """

    inertia: tuple[float, ...]
    entropy: float
    dead_before: int
    dead_after: int
    last_gain: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """As plain values, for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Health:
        """Inverse of `to_dict`, also after a round trip through JSON.

        Raises:
            TypeError, KeyError: a field is missing, unknown, or no number.
        """
        health = cls(**{**data, "inertia": tuple(data["inertia"])})
        numbers = [*health.inertia, health.entropy, health.dead_before, health.dead_after]
        if health.last_gain is not None:
            numbers.append(health.last_gain)
        for value in numbers:
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise TypeError(f"codebook health holds {value!r}, which is no number")
        return health


class CodebookLearner(Component, ABC):
    """Learns codewords for M subspaces at once.

    After `fit`: `codewords_` `[M, S, K, d]` (fp32; S is 1 for single-stage learners) and
    `health_`, one per stage.
    """

    codewords_: torch.Tensor
    health_: list[Health]

    def fit(
        self,
        samples: torch.Tensor,
        codewords: int,
        weights: torch.Tensor | None = None,
        *,
        seed: int = 0,
    ) -> CodebookLearner:
        """Learn `codewords` (K) codewords per subspace from samples `[N, M, d]`.

        Args:
            samples: fp32.
            codewords: K, at most N.
            weights: how much a sample counts, `[N]` or `[N, M]`, not negative.
            seed: all randomness follows from it.

        Raises:
            StateError: wrong shape, NaN or infinity, or fewer samples than codewords.
        """
        samples, weights = check_samples(samples, codewords, weights)
        self.codewords_, self.health_ = self._learn(samples, codewords, weights, seed)
        return self

    @abstractmethod
    def _learn(
        self, samples: torch.Tensor, codewords: int, weights: torch.Tensor | None, seed: int
    ) -> tuple[torch.Tensor, list[Health]]:
        """Codewords `[M, S, K, d]` and a health per stage, from checked input."""

    def fixed(self, subspaces: int, dim: int, codewords: int) -> torch.Tensor | None:
        """Codewords `[M, 1, K, d]` that need no data, or None where data is needed."""
        return None

    def partial_fit(
        self,
        samples: torch.Tensor,
        codewords: int,
        weights: torch.Tensor | None = None,
        *,
        seed: int = 0,
    ) -> CodebookLearner:
        """Learn from one more batch of a stream; arguments and errors as `fit`.

        Raises:
            StateError: this learner needs all its samples at once.
        """
        raise StateError(
            f"{type(self).__name__} needs all samples at once: call fit, or stream to a learner "
            "such as kmeans or ema"
        )

    def check_runs(self, device: torch.device) -> None:
        """Raises KernelError where it could not learn from samples on `device`, and says why."""
        return None  # torch runs everywhere

    def check_fitted(self) -> None:
        """Raises NotFittedError before `fit`."""
        if not hasattr(self, "codewords_"):
            raise NotFittedError(f"{type(self).__name__} has no codewords yet: call fit first")


def check_samples(
    samples: torch.Tensor, codewords: int, weights: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Samples as fp32 `[N, M, d]` and weights as fp32 `[N, M]`, or a StateError."""
    if samples.ndim != 3:
        raise StateError(f"samples have shape [N, M, d], given {list(samples.shape)}")
    if samples.shape[0] < codewords:
        raise StateError(
            f"{codewords} codewords need at least as many samples, given {samples.shape[0]}: "
            "calibrate on more tokens or lower code_bits"
        )
    check_finite(samples, "samples", "[N, M, d]")
    if weights is None:
        return samples.float().contiguous(), None
    if weights.shape not in (samples.shape[:1], samples.shape[:2]):
        raise StateError(
            f"weights have shape [N] or [N, M] = {list(samples.shape[:2])}, "
            f"given {list(weights.shape)}"
        )
    check_finite(weights, "weights", "[N, M]")
    if bool((weights < 0).any()):
        raise StateError(f"weights are not negative, given {float(weights.min()):.3g}")
    weights = weights.float()
    if weights.ndim == 1:
        weights = weights.unsqueeze(1)
    unused = (weights.sum(0) == 0).nonzero()
    if unused.numel():
        raise StateError(f"weights of subspace {int(unused[0])} are all 0; some must count")
    return samples.float().contiguous(), weights.expand(samples.shape[:2]).contiguous()


def check_finite(x: torch.Tensor, what: str, shape: str) -> None:
    """Raises StateError where `x` holds NaN or infinity, naming the first place."""
    finite = torch.isfinite(x)
    if not bool(finite.all()):
        where = (~finite).nonzero()[0].tolist()
        raise StateError(
            f"{what} {shape} hold {x[tuple(where)].item()} at {where}; all must be finite"
        )


def last_gain(inertia: Sequence[float]) -> float | None:
    """By how much the last inertia is below the one before it, as a part of that; None of one."""
    if len(inertia) < 2:
        return None
    before, after = inertia[-2:]
    return 1 - after / before if before else 0.0


def usage_entropy(counts: torch.Tensor) -> float:
    """Mean over subspaces of the entropy of code usage, in bits; counts `[M, K]`."""
    share = counts.double() / counts.double().sum(1, keepdim=True).clamp_min(1e-30)
    return float(torch.special.entr(share).sum(1).mean() / torch.log(torch.tensor(2.0)))


LEARNERS: Registry[type[CodebookLearner]] = Registry(
    "vqkv.learners",
    CodebookLearner,
    {
        "kmeans": "vqkv.codebooks.kmeans:KMeans",
        "ema": "vqkv.codebooks.ema:EMA",
        "residual": "vqkv.codebooks.residual:ResidualLearner",
        "product": "vqkv.codebooks.product:ProductLearner",
        "uniform": "vqkv.codebooks.uniform:Uniform",
        "em": "vqkv.codebooks.em:EM",
        "gain_shape": "vqkv.codebooks.gain_shape:GainShape",
        "simvq": "vqkv.codebooks.simvq:SimVQ",
        "gaussian": "vqkv.codebooks.gaussian:Gaussian",
    },
)

LearnerChoice = Annotated[Config, Choice(LEARNERS)]
