"""Product codes that are chosen together: in a metric, errors of groups add up or cancel."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field

from vqkv.codebooks.assignment import step_for
from vqkv.codebooks.base import LEARNERS, LearnerChoice
from vqkv.codebooks.kmeans import KMeansConfig
from vqkv.errors import StateError
from vqkv.kernels.decode import decode
from vqkv.kernels.encode import encode
from vqkv.kernels.encode.joint import Coupling, coupling, encode_joint
from vqkv.quantizers.base import QuantizerConfig
from vqkv.quantizers.codebook import CodebookQuantizer


class JointProductConfig(QuantizerConfig):
    """Settings of `JointProductQuantizer`.

    Attributes:
        code_bits: of each code.
        learner: of the codewords that learning starts from, group by group.
        rounds: of learning, over all groups.
        width: choices of codes that the search before the sweeps keeps, when encoding.
        sweeps: of choosing each group's code anew, after it.
    """

    type: Literal["joint_product"] = "joint_product"
    code_bits: int = Field(ge=1, le=16)
    learner: LearnerChoice = KMeansConfig()
    rounds: int = Field(default=8, ge=1)
    width: int = Field(default=1, ge=1)
    sweeps: int = Field(default=2, ge=1)

    def bits(self) -> int:
        """`code_bits`."""
        return self.code_bits

    @property
    def couples(self) -> Literal["groups"]:
        """Always groups."""
        return "groups"


class JointProductQuantizer(CodebookQuantizer):
    """Codes `a` that minimise `eᵀ M e`, `e_g = c_{g, a_g} − x_g`, with `M_gg = I` for each group.

    A search goes through the groups and looks ahead: errors of groups to come can make up for those
    of a code, as far as the metric has it. Then sweeps give each group the codeword nearest to
    `x_g − Σ_h e_h M_hg`, the best one as the others are, so that no sweep raises the error. Rounds
    of learning code all samples, then move codewords to the means of these targets. Reading is that
    of a product code.

    State: `codewords`, and `coupling` `[U, n, n]` in fp16, M without its diagonal blocks, where
    errors of the n channels of a unit were coupled.
    """

    Config = JointProductConfig
    config: JointProductConfig
    coupling_: torch.Tensor
    coupled_: Coupling

    def couple(self, metric: torch.Tensor) -> None:
        """Before `fit`: the metric `[U, n, n]` of U units' channels, those of M / U subvectors."""
        self.coupling_ = metric.to(torch.float16)

    def prepare(self, subspaces: int, dim: int) -> None:
        """Codewords are always learned: raises NotFittedError."""
        raise self.needs_fit()

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        """Codes `[N, M, 1]` (int32). Raises NotFittedError, or StateError on another shape."""
        if not hasattr(self, "coupled_"):
            return super().encode(x)
        effort = self.config.sweeps, self.config.width
        return encode_joint(self._checked(x), self._codewords(), self.coupled_, *effort)

    def state(self) -> dict[str, torch.Tensor]:
        """`codewords`, and `coupling` where there is one."""
        coupling = {"coupling": self.coupling_} if hasattr(self, "coupling_") else {}
        return {**super().state(), **coupling}

    def load_state(self, state: dict[str, torch.Tensor]) -> None:
        """Take over `codewords` and `coupling`. Raises StateError where they do not fit."""
        rest = dict(state)
        metric = rest.pop("coupling", None)
        super().load_state(rest)
        if metric is None:
            return
        channels = self.codewords_.shape[0] * self.codewords_.shape[3]
        units = metric.shape[0] if metric.ndim == 3 else 0
        fits = units and metric.shape[1:] == (channels // units,) * 2
        if not fits or channels % units or metric.dtype != torch.float16:
            raise StateError(
                f"coupling is float16 [U, n, n] of {channels} channels, given {metric.dtype} "
                f"{list(metric.shape)}"
            )
        self._take(metric, self.codewords_.shape[3])

    def _fit(self, samples: torch.Tensor, weights: torch.Tensor | None, seed: int) -> None:
        learner = LEARNERS.build(self.config.learner)
        learner.fit(samples, 2**self.config.code_bits, weights, seed=seed)
        self.health_ = learner.health_
        books = learner.codewords_.clone()
        if hasattr(self, "coupling_"):
            self._take(self.coupling_, samples.shape[2])
            self._improve(samples, weights, books)
        self.keep(books)

    def _improve(
        self, samples: torch.Tensor, weights: torch.Tensor | None, books: torch.Tensor
    ) -> None:
        """Learn codewords `[M, 1, K, d]` in place, in rounds over all groups."""
        step = step_for("auto", samples.device)
        for _ in range(self.config.rounds):
            codes = encode_joint(samples, books, self.coupled_, sweeps=1)
            errors = decode(codes, books) - samples
            for group in self._groups(len(books)):
                targets = self._targets(samples, errors, group).contiguous()
                own = weights if weights is None or weights.ndim == 1 else weights[:, group]
                found = step(targets, books[group, 0], own).all_reduced()
                books[group, 0] = found.means(books[group, 0])
                codes = encode(targets, books[group])
                errors[:, group] = decode(codes, books[group]) - samples[:, group]

    def _take(self, metric: torch.Tensor, dim: int) -> None:
        self.coupling_, self.coupled_ = metric, coupling(metric, dim)

    def _groups(self, subspaces: int) -> list[torch.Tensor]:
        """Subvectors that are coded at once: group g of every unit."""
        per_unit = subspaces // len(self.coupling_)
        return list(torch.arange(subspaces).view(-1, per_unit).T)

    def _targets(self, x: torch.Tensor, errors: torch.Tensor, group: torch.Tensor) -> torch.Tensor:
        """What the codewords of a group in each unit are to be near to, `[N, U, d]`."""
        units, dim = len(self.coupling_), x.shape[2]
        first = int(group[0]) * dim
        columns = self.coupling_[:, :, first : first + dim].float()  # [U, n, d]
        pushed = torch.einsum("nui,uid->nud", errors.reshape(len(x), units, -1), columns)
        return x[:, group] - pushed
