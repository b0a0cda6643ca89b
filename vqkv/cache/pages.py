"""Where coded tokens live: one append-only store per stream and layer."""

from __future__ import annotations

import torch

from vqkv.codec import Encoded
from vqkv.layouts import PAGE_TOKENS, Layout


class PageStore:
    """Coded tokens of B rows: codes `[B, U, T, bytes]` (uint8) and side `[B, T, F]` (fp16).

    T is the room for tokens, whole pages of them. It grows by a sixteenth, so copying stays cheap
    and at most that part of the bytes lies idle, but where `make_room` asked for more. How many
    tokens of each row are written, the layer knows.
    """

    def __init__(self, batch: int, layout: Layout, device: torch.device) -> None:
        self.codes = torch.empty(
            batch, layout.units, 0, layout.bytes_per_unit, dtype=torch.uint8, device=device
        )
        self.side = torch.empty(batch, 0, layout.side_count, dtype=torch.float16, device=device)

    @property
    def capacity(self) -> int:
        """Tokens there is room for, per row."""
        return self.codes.shape[2]

    @property
    def nbytes(self) -> int:
        """Bytes of both tensors, idle room included."""
        return self.codes.nbytes + self.side.nbytes

    def write(self, rows: torch.Tensor, start: int, encoded: Encoded) -> None:
        """Store `n` tokens for each of `rows` at `start`; `encoded` holds them row by row."""
        count = encoded.codes.shape[0] // len(rows)
        self.make_room(start + count)
        self.codes, self.side = writable(self.codes), writable(self.side)
        codes = encoded.codes.unflatten(0, (len(rows), count)).transpose(1, 2)
        self.codes[rows, :, start : start + count] = codes
        self.side[rows, start : start + count] = encoded.side.unflatten(0, (len(rows), count))

    def read(self, rows: torch.Tensor, start: int, stop: int) -> Encoded:
        """Tokens `start` to `stop` of each of `rows`, row by row."""
        codes = self.codes[:, :, start:stop][rows].transpose(1, 2).flatten(0, 1)
        return Encoded(codes, self.side[:, start:stop][rows].flatten(0, 1))

    def select(self, rows: torch.Tensor) -> None:
        """Keep these rows, in this order; repeats are allowed."""
        self.codes, self.side = self.codes[rows], self.side[rows]

    def to(self, device: torch.device | str) -> None:
        """Move both tensors."""
        self.codes = self.codes.to(device, non_blocking=True)
        self.side = self.side.to(device, non_blocking=True)

    def make_room(self, tokens: int) -> None:
        """Have room for so many tokens a row."""
        if tokens <= self.capacity:
            return
        wanted = max(tokens, self.capacity + self.capacity // 16)
        extra = -(-wanted // PAGE_TOKENS) * PAGE_TOKENS - self.capacity
        self.codes = torch.nn.functional.pad(self.codes, (0, 0, 0, extra))
        self.side = torch.nn.functional.pad(self.side, (0, 0, 0, extra))


def writable(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor, or a copy where it may not be written to.

    Torch forbids that once the inference mode has ended in which a tensor was made, as where a
    prefix is filled by `generate` in a server's inference mode and continued without.
    """
    locked = tensor.is_inference() and not torch.is_inference_mode_enabled()
    return tensor.clone() if locked else tensor
