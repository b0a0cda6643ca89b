"""What the layers of one cache share about its rows."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from vqkv.cache.decoded import Decoded
from vqkv.cache.rope import RotaryAdapter
from vqkv.errors import CacheError


@dataclass(eq=False)  # compared and hashed by identity: an attachment keeps track of them
class Rows:
    """Left padding and token positions of each row, and the model's rotary embedding.

    Attributes:
        pads: padded slots at the start of each row; empty until a row is known, meaning none.
        positions: of each slot, as `ForwardCapture.positions`; None while no attached model said.
        rotary: the attached model's rotary embedding; None while no model is attached.
        attend: the attached model's attention reads codes.
        decoded: reconstructions that the running forward shares.
        shared: what layers share that read codes, see `vqkv.cache.fused`.
        readings: by layer, how its codes are read where they lie; it goes before they move.
        steps: what `vqkv.cache.steps` made for these rows; they survive a crop.
    """

    pads: list[int] = field(default_factory=list)
    positions: torch.Tensor | None = None
    rotary: RotaryAdapter | None = None
    attend: bool = False
    decoded: Decoded = field(default_factory=Decoded)
    shared: dict[Any, Any] = field(default_factory=dict)
    readings: dict[int, Any] = field(default_factory=dict)
    steps: dict[int, Any] = field(default_factory=dict)

    @property
    def known(self) -> int:
        """Rows that an attached model told of; 0 where none did."""
        return len(self.pads) if self.positions is None else len(self.positions)

    def pads_of(self, batch: int) -> list[int]:
        """Padded slots of each of `batch` rows."""
        return self.pads if len(self.pads) == batch else [0] * batch

    def note(self, start: int, positions: torch.Tensor | None, pads: list[int] | None) -> None:
        """Take in the positions of the slots from `start` on, and the padding so far.

        A forward that failed may have left positions behind; they give way. A forward that came
        without a mask says nothing of padding: what earlier ones said stays.

        Raises:
            CacheError: another number of rows than before.
        """
        if pads is not None:
            self.pads = pads
        if positions is None:
            return
        if self.positions is None:
            self.positions = positions
        elif len(self.positions) != len(positions):
            raise CacheError(
                f"the cache holds {len(self.positions)} rows, given {len(positions)}: reset it, "
                "or start a new one"
            )
        else:
            self.positions = _after(self.positions[:, :start], positions)

    def crop(self, length: int) -> None:
        """Forget slots from `length` on."""
        self.forget_readings()
        if self.positions is not None:
            self.positions = self.positions[:, :length].clone()  # frees the rest's memory

    def select(self, rows: torch.Tensor) -> None:
        """Keep these rows, in this order."""
        self.forget_readings()
        self.steps.clear()
        if self.positions is not None:
            self.positions = self.positions[rows.to(self.positions.device)]
        if self.pads:
            self.pads = [self.pads[row] for row in rows.tolist()]

    def reset(self) -> None:
        """Forget all rows."""
        self.pads, self.positions = [], None
        self.decoded.clear()
        self.forget_readings()
        self.steps.clear()

    def forget_readings(self) -> None:
        """Forget how codes were read."""
        self.shared.clear()
        self.readings.clear()

    @property
    def nbytes(self) -> int:
        """Bytes of the positions."""
        return 0 if self.positions is None else self.positions.nbytes

    def __getstate__(self) -> dict[str, Any]:
        """What a copy keeps: not what an attached model lends, which it will lend again."""
        return {"pads": self.pads, "positions": self.positions}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Of a copy."""
        Rows.__init__(self, **state)


def _after(before: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Positions after others; those of text are the same along all axes, where others have some."""
    axes = before.shape[2:] or positions.shape[2:]
    both = (
        each if each.shape[2:] == axes else each[..., None].expand(*each.shape, *axes)
        for each in (before, positions)
    )
    return torch.cat([*both], 1)
