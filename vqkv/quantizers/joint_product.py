"""Product codes that are chosen together: in a metric, errors of groups add up or cancel."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field

from vqkv.codebooks.assignment import step_for
from vqkv.kernels.decode import decode
from vqkv.kernels.encode import encode
from vqkv.kernels.encode.joint import Coupling, coupling, encode_joint
from vqkv.quantizers.coupled import CoupledConfig, CoupledQuantizer


class JointProductConfig(CoupledConfig):
    """Settings of `JointProductQuantizer`.

    Attributes:
        code_bits: of each code.
        learner: of the codewords that learning starts from, group by group.
        rounds: of learning, over all groups.
        width: choices of codes that the search before the sweeps keeps, when encoding.
        sweeps: of choosing each group's code anew, after it.
    """

    type: Literal["joint_product"] = "joint_product"
    width: int = Field(default=1, ge=1)

    @property
    def couples(self) -> Literal["groups"]:
        """Always groups."""
        return "groups"


class JointProductQuantizer(CoupledQuantizer):
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
    form = "[U, n, n]"
    coupled_: Coupling

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        """Codes `[N, M, 1]` (int32). Raises NotFittedError, or StateError on another shape."""
        if not hasattr(self, "coupled_"):
            return super().encode(x)
        effort = self.config.sweeps, self.config.width
        return encode_joint(self._checked(x), self._codewords(), self.coupled_, *effort)

    def _fits(self, shape: tuple[int, ...], channels: int) -> bool:
        units = shape[0] if len(shape) == 3 else 0
        return units > 0 and channels % units == 0 and shape[1:] == (channels // units,) * 2

    def _prepare_search(self, dim: int) -> None:
        self.coupled_ = coupling(self.coupling_, dim)

    def _improve(
        self, samples: torch.Tensor, weights: torch.Tensor | None, books: torch.Tensor
    ) -> None:
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
