"""Rotary embeddings as a model applies them, and undone."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Literal

import torch
from torch import nn

from vqkv.errors import ModelError

#: Channels of one head that rotate together.
Pairs = tuple[tuple[int, int], ...]
#: Half: (i, i + R/2) of R rotary channels. Interleaved: (2i, 2i + 1).
Pairing = Literal["half", "interleaved"]


def rope_pairs(pairing: Pairing, rotary_dim: int) -> Pairs:
    """The pairs of the first `rotary_dim` channels."""
    half = rotary_dim // 2
    if pairing == "half":
        return tuple((i, i + half) for i in range(half))
    return tuple((2 * i, 2 * i + 1) for i in range(half))


def channel_units(head_dim: int, pairs: Pairs) -> torch.Tensor:
    """RoPE pairs, then the channels beyond them two by two, `[D / 2, 2]`."""
    paired = {channel for pair in pairs for channel in pair}
    rest = [channel for channel in range(head_dim) if channel not in paired]
    return torch.tensor([*(c for pair in pairs for c in pair), *rest]).view(-1, 2)


#: `(keys, cos, sin) -> keys`.
RotaryFunction = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def rotary_function(attention: nn.Module) -> RotaryFunction:
    """The `apply_rotary_pos_emb` in the module of an attention class.

    Some families give it queries and keys together, some one tensor at a time.

    Raises:
        ModelError: there is none, as in Llama 4.
    """
    function = getattr(inspect.getmodule(type(attention)), "apply_rotary_pos_emb", None)
    if function is None:
        raise ModelError(
            f"{type(attention).__name__} has no apply_rotary_pos_emb beside it, so what rotates "
            "its keys is unknown; models that rotate as Llama does have one"
        )
    if list(inspect.signature(function).parameters)[1] == "cos":
        return lambda keys, cos, sin: function(keys, cos, sin)
    return lambda keys, cos, sin: function(keys, keys, cos, sin)[1]


class Rotation:
    """The `apply_rotary_pos_emb` of an attention class, for keys.

    With c = cos and s = sin, a pair (i, j) becomes (c xᵢ - s xⱼ, c xⱼ + s xᵢ). Where a model scales
    its tables (YaRN), c² + s² is not 1, and undoing divides by it.

    Attributes:
        pairing: found by rotating basis vectors.
        rotary_dim: channels that rotate; the others pass through.
    """

    pairing: Pairing
    rotary_dim: int

    def __init__(self, attention: nn.Module, table_width: int, head_dim: int) -> None:
        """Finds out what the function does to D channels.

        Args:
            attention: an attention module.
            table_width: W of the tables that it is handed.
            head_dim: D.

        Raises:
            ModelError: there is no such function, or it is no rotation of channel pairs.
        """
        self._function = rotary_function(attention)
        self._sliced: int | None = None
        try:
            self._choose_slice(table_width, head_dim)
            self.pairing, self.rotary_dim = self._probe(table_width, head_dim)
        except (RuntimeError, TypeError, ValueError) as error:
            raise ModelError(
                f"the apply_rotary_pos_emb of {type(attention).__name__} does not rotate pairs of "
                f"its {head_dim} channels by tables {table_width} wide: {error}"
            ) from error

    @property
    def pairs(self) -> Pairs:
        """Channels of a head that rotate together."""
        return rope_pairs(self.pairing, self.rotary_dim)

    def rotate(self, keys: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        """Post-RoPE keys `[B, H, T, D]` of pre-RoPE ones, in fp32; tables are `[B or 1, T, W]`."""
        # The tables of a model spread over devices may come from another than the layer's.
        keys, cos, sin = keys.float(), cos.to(keys.device).float(), sin.to(keys.device).float()
        if self._sliced is None:
            return self._function(keys, cos, sin)
        turning, still = keys[..., : self._sliced], keys[..., self._sliced :]
        return torch.cat([self._function(turning, cos, sin), still], dim=-1)

    def unrotate(self, keys: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        """Pre-RoPE keys `[B, H, T, D]` of post-RoPE ones, in fp32; tables are `[B or 1, T, W]`.

        Exact with the tables that rotated them, also where those were rounded to bf16.
        """
        cos, sin = cos.to(keys.device).float(), sin.to(keys.device).float()
        # Rotating ones by (c² + s², 0) spreads the scale over channels as the model does: it is 1
        # where channels pass through.
        ones = keys.new_ones((), dtype=torch.float32).expand(cos.shape[0], 1, *keys.shape[-2:])
        scale = self.rotate(ones, cos.square() + sin.square(), torch.zeros_like(sin))
        return self.rotate(keys, cos, -sin) / scale

    def _choose_slice(self, table_width: int, head_dim: int) -> None:
        """Partial rotary: some functions pass channels through, some are handed a slice."""
        key, table = torch.ones(1, 1, 1, head_dim), torch.ones(1, 1, table_width)
        try:
            rotated = self.rotate(key, table, table)
        except RuntimeError:
            rotated = None
        if rotated is None or rotated.shape != key.shape:
            self._sliced = table_width

    def _probe(self, table_width: int, head_dim: int) -> tuple[Pairing, int]:
        """Rotates every basis vector by the angle of the 3-4-5 triangle."""
        table = torch.ones(1, head_dim, table_width)
        images = self.rotate(torch.eye(head_dim)[None, None], 0.6 * table, 0.8 * table)[0, 0]
        rotary_dim = int((images.diagonal() < 0.9).sum())
        for pairing in ("half", "interleaved"):
            expected = torch.eye(head_dim)
            for i, j in rope_pairs(pairing, rotary_dim):
                expected[i, i] = expected[j, j] = 0.6
                # The sign is the direction of rotation, which differs between families.
                expected[i, j] = expected[j, i] = 0.8
            if rotary_dim and torch.allclose(images.abs(), expected, atol=1e-5):
                return pairing, rotary_dim
        raise ValueError("its pairs are neither half-split nor interleaved")
