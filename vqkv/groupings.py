"""Groupings: which channels share a code.

A grouping orders the C = H·D channels of a token; runs of `dim` consecutive channels of that order
are the subvectors. Channel `h·D + i` is channel i of head h.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from einops import rearrange
from pydantic import Field

from vqkv.errors import NotFittedError, SchemeError
from vqkv.registry import Choice, Config, Registry
from vqkv.rotation import Pairs


@dataclass(frozen=True)
class ChannelStats:
    """What calibration tells a grouping.

    Attributes:
        energy: mean square of each channel after the transforms, `[H, D]`; None before calibration.
        pairs: the model's RoPE pairs within a head; empty without RoPE.
    """

    energy: torch.Tensor | None
    pairs: Pairs


class Grouping(Config, ABC):
    """Orders channels. `permutation` is its one method to write."""

    needs_data: ClassVar[bool] = False
    head_local: ClassVar[bool] = True

    type: str
    dim: int = Field(ge=1, le=4096)

    @abstractmethod
    def permutation(self, head_dim: int, heads: int, stats: ChannelStats) -> torch.Tensor:
        """Channel order `[U, C / U]` (int64): U is H where groups stay within heads, else 1.

        Raises:
            SchemeError: as `check` does.
            NotFittedError: it needs calibration's energy and there is none.
        """

    @abstractmethod
    def keeps_pairs(self, head_dim: int, pairs: Pairs) -> bool:
        """Whether both channels of every RoPE pair always share a subvector."""

    def resolved(self, heads: int, head_dim: int) -> Grouping:
        """The same with its `dim` known."""
        return self

    def check(self, head_dim: int, heads: int, pairs: Pairs) -> None:
        """Raises SchemeError where `dim` does not divide the channels it groups."""
        channels = head_dim if self.head_local else heads * head_dim
        if channels % self.dim:
            what = f"head dim {head_dim}" if self.head_local else f"{heads} × {head_dim} channels"
            divisors = [d for d in range(1, channels + 1) if channels % d == 0]
            raise SchemeError(
                f"grouping.dim: {self.dim} does not divide {what}; "
                f"one of {', '.join(map(str, divisors))} does"
            )


def _per_head(order: torch.Tensor, heads: int) -> torch.Tensor:
    """The same order `[D]` in every head, as `[H, D]` of channels `h·D + i`."""
    return order + order.numel() * torch.arange(heads).unsqueeze(1)


def _pairs_share_group(order: torch.Tensor, dim: int, pairs: Pairs) -> bool:
    group = torch.empty_like(order)
    group[order] = torch.arange(order.numel()) // dim
    return all(group[i] == group[j] for i, j in pairs)


class Contiguous(Grouping):
    """Neighbouring channels of a head. D = 8, dim 4: groups 0 1 2 3 and 4 5 6 7.

    RoPE pairs stay whole only in models that interleave them.
    """

    type: Literal["contiguous"] = "contiguous"

    def permutation(self, head_dim: int, heads: int, stats: ChannelStats) -> torch.Tensor:
        """`[H, D]`, the channels in their own order."""
        self.check(head_dim, heads, stats.pairs)
        return _per_head(torch.arange(head_dim), heads)

    def keeps_pairs(self, head_dim: int, pairs: Pairs) -> bool:
        """True where pairs are neighbours and `dim` is even."""
        return _pairs_share_group(torch.arange(head_dim), self.dim, pairs)


class Whole(Grouping):
    """All channels of a head, or of a token (`layer`), are one group: d = D or d = H·D.

    `pairs` is a head with its RoPE pairs side by side.
    """

    type: Literal["whole"] = "whole"
    scope: Literal["head", "pairs", "layer"] = "head"
    dim: Literal[0] = Field(default=0, description="Follows from the model.")

    def resolved(self, heads: int, head_dim: int) -> Grouping:
        """The grouping with its dim."""
        if self.scope == "layer":
            return AcrossHeads(dim=heads * head_dim)
        return RopePairs(dim=head_dim) if self.scope == "pairs" else Contiguous(dim=head_dim)

    def permutation(self, head_dim: int, heads: int, stats: ChannelStats) -> torch.Tensor:
        """`[H, D]` or `[1, C]`."""
        return self.resolved(heads, head_dim).permutation(head_dim, heads, stats)

    def keeps_pairs(self, head_dim: int, pairs: Pairs) -> bool:
        """Always: a group holds whole heads."""
        return True

    def check(self, head_dim: int, heads: int, pairs: Pairs) -> None:
        """Refuses what the resolved grouping does."""
        self.resolved(heads, head_dim).check(head_dim, heads, pairs)


class Strided(Grouping):
    """Channel i goes to group `i mod (D / dim)`. D = 8, dim 4: groups 0 2 4 6 and 1 3 5 7.

    Half-split RoPE pairs (i, i + D/2) stay whole where D / dim divides D / 2.
    """

    type: Literal["strided"] = "strided"

    def permutation(self, head_dim: int, heads: int, stats: ChannelStats) -> torch.Tensor:
        """`[H, D]`."""
        self.check(head_dim, heads, stats.pairs)
        return _per_head(self._order(head_dim), heads)

    def keeps_pairs(self, head_dim: int, pairs: Pairs) -> bool:
        """Follows from the stride."""
        return _pairs_share_group(self._order(head_dim), self.dim, pairs)

    def _order(self, head_dim: int) -> torch.Tensor:
        return rearrange(torch.arange(head_dim), "(d g) -> (g d)", d=self.dim)


class RopePairs(Grouping):
    """dim / 2 whole RoPE pairs a group. D = 8 half-split, dim 4: groups 0 4 1 5 and 2 6 3 7.

    Channels that do not rotate (partial rotary) follow in their own order.
    """

    type: Literal["rope_pairs"] = "rope_pairs"
    dim: int = Field(ge=2, le=4096, multiple_of=2)

    def permutation(self, head_dim: int, heads: int, stats: ChannelStats) -> torch.Tensor:
        """`[H, D]`; without pairs the channels' own order."""
        super().check(head_dim, heads, stats.pairs)
        units, rest = _pairs_and_rest(head_dim, stats.pairs)
        return _per_head(torch.cat([units.flatten(), rest]), heads)

    def keeps_pairs(self, head_dim: int, pairs: Pairs) -> bool:
        """True where `dim` is even."""
        return self.dim % 2 == 0

    def check(self, head_dim: int, heads: int, pairs: Pairs) -> None:
        """Also refuses streams that do not rotate."""
        super().check(head_dim, heads, pairs)
        if not pairs:
            raise SchemeError(
                "grouping.type: 'rope_pairs' groups channels that rotate together; values, and "
                "keys of a model without RoPE, have none: use 'contiguous'"
            )


class EnergyBalanced(Grouping):
    """Deals channels, or whole RoPE pairs, to groups in snake order of energy.

    Every group then holds strong and weak channels, and its codewords share out the bits. D = 8,
    dim 4, energies falling from channel 0 to 7: groups 0 3 4 7 and 1 2 5 6.
    """

    needs_data: ClassVar[bool] = True
    type: Literal["energy_balanced"] = "energy_balanced"
    pairs: bool = False

    def permutation(self, head_dim: int, heads: int, stats: ChannelStats) -> torch.Tensor:
        """`[H, D]`, another order in each head."""
        self.check(head_dim, heads, stats.pairs)
        if stats.energy is None:
            raise NotFittedError("energy_balanced groups need calibration: call fit first")
        rows = [self._order(head_dim, energy, stats.pairs) for energy in stats.energy]
        return torch.stack(rows) + head_dim * torch.arange(heads).unsqueeze(1)

    def keeps_pairs(self, head_dim: int, pairs: Pairs) -> bool:
        """True where so configured and `dim` is even; trivially true without RoPE."""
        return (self.pairs and self.dim % 2 == 0) or not pairs

    def check(self, head_dim: int, heads: int, pairs: Pairs) -> None:
        """Also refuses an odd `dim` for pairs."""
        super().check(head_dim, heads, pairs)
        if self.pairs and self.dim % 2:
            raise SchemeError(f"grouping.dim: whole pairs need an even dim, given {self.dim}")

    def _order(self, head_dim: int, energy: torch.Tensor, pairs: Pairs) -> torch.Tensor:
        if self.pairs and pairs:
            units, rest = _pairs_and_rest(head_dim, pairs)
            units = torch.cat([units, rest.view(-1, 2)])  # [D / 2, 2]
        else:
            units = torch.arange(head_dim).unsqueeze(1)  # [D, 1]
        strongest_first = energy[units].sum(1).argsort(descending=True, stable=True)
        groups = head_dim // self.dim
        dealt = rearrange(
            units[strongest_first], "(round group) channel -> round group channel", group=groups
        )
        dealt[1::2] = dealt[1::2].flip(1)
        order: torch.Tensor = rearrange(dealt, "round group channel -> (group round channel)")
        return order


class AcrossHeads(Grouping):
    """The same channel of several heads. H = 2, D = 4, dim 4: groups 0 4 1 5 and 2 6 3 7."""

    head_local: ClassVar[bool] = False
    type: Literal["across_heads"] = "across_heads"

    def permutation(self, head_dim: int, heads: int, stats: ChannelStats) -> torch.Tensor:
        """`[1, C]`."""
        self.check(head_dim, heads, stats.pairs)
        return rearrange(torch.arange(heads * head_dim), "(h d) -> 1 (d h)", h=heads)

    def keeps_pairs(self, head_dim: int, pairs: Pairs) -> bool:
        """True only without RoPE: a pair may straddle two groups."""
        return not pairs


def _pairs_and_rest(head_dim: int, pairs: Pairs) -> tuple[torch.Tensor, torch.Tensor]:
    """RoPE pairs `[P, 2]`, and the channels outside of them."""
    units = torch.tensor(pairs, dtype=torch.int64).view(-1, 2)
    paired = set(units.flatten().tolist())
    return units, torch.tensor([i for i in range(head_dim) if i not in paired], dtype=torch.int64)


GROUPINGS: Registry[type[Grouping]] = Registry(
    "vqkv.groupings",
    Grouping,
    {
        "contiguous": "vqkv.groupings:Contiguous",
        "whole": "vqkv.groupings:Whole",
        "strided": "vqkv.groupings:Strided",
        "rope_pairs": "vqkv.groupings:RopePairs",
        "energy_balanced": "vqkv.groupings:EnergyBalanced",
        "across_heads": "vqkv.groupings:AcrossHeads",
    },
)

GroupingChoice = Annotated[Grouping, Choice(GROUPINGS)]
