"""Trellis-coded channels with a scale per vector: QTIP (arXiv 2406.11235), for vectors of unequal channels.

QTIP codes weights that a random rotation has made alike. A KV vector in its eigenbasis is the
opposite: channels of very different variances, and vectors of very different lengths. So channels get
bits by variance (reverse water-filling), and a vector its own scale.
"""

from __future__ import annotations

import heapq
import math
from typing import Literal

import torch
from pydantic import Field

from vqkv.codebooks.base import Health
from vqkv.errors import NotFittedError, SchemeError, StateError
from vqkv.kernels.encode.trellis import encode_trellis
from vqkv.quantizers.base import Quantizer, QuantizerConfig

#: Bits of a vector's scale, and its steps: quarter octaves of length, from 2⁻² to 2^1.75.
SCALE_BITS, SCALE_STEP = 4, 0.25
#: Bits of a state that are older than a pair's own: fewer are hardly a trellis.
LEAST_MEMORY = 2
#: A pair's error is about this times 2⁻ᵏ of its variance after k bits, by which bits are given out.
LOSS = 1.17
#: Vectors that the table learns from, at most, and how many an entry's start counts for.
LEARNING_VECTORS, PRIOR = 8192, 20.0
#: Of finding scales by channels' spread, and the spread of what is scaled.
ROUNDS = 2


class TrellisConfig(QuantizerConfig):
    """Settings of `Trellis`.

    Attributes:
        rate: bits per channel, that of the scale among them.
        memory: bits of a state; the table has 2^memory entries, and encoding takes as many steps
            per pair of channels.
        iterations: of learning the table.
    """

    type: Literal["trellis"] = "trellis"
    rate: float = Field(gt=0, le=8)
    memory: int = Field(default=12, ge=4, le=14)
    iterations: int = Field(default=4, ge=1)

    def stages(self, dim: int) -> int:
        """Bytes of a vector. Raises SchemeError where `dim` or `rate` does not give whole ones."""
        total = self.rate * dim
        if dim % 2 or total % 8:
            raise SchemeError(
                f"quantizer.rate: 'trellis' codes pairs of channels in whole bytes; {self.rate:g} "
                f"bits of {dim} channels are {total:g}"
            )
        if total - SCALE_BITS > (self.memory - LEAST_MEMORY) * dim // 2:
            raise SchemeError(
                f"quantizer.rate: {self.rate:g} bits per channel need a longer memory than "
                f"{self.memory} bits, at least {math.ceil(2 * self.rate) + LEAST_MEMORY}"
            )
        return int(total) // 8

    def bits(self) -> int:
        """8: codes are the bytes of a vector."""
        return 8


class Trellis(Quantizer):
    """Pairs of channels `x_p ≈ σ s_p ∘ T[state_p]`, strongest first, the scale σ in 4 bits.

    A pair adds k_p bits to the state, which keeps the last L: `state_p = (state_{p−1} 2^{k_p} +
    bits_p) mod 2^L`, from 0 on. So any state is L bits in a row of the code, and decoding has no
    order; encoding finds the best bits of all pairs together (Viterbi). k_p shares out `rate` by the
    pairs' variances. The table T `[2^L, 2]` is one for all pairs; it starts as Gaussian noise and
    learns as k-means does, from the best bits under the last one.

    State: `table` (fp16), `order` `[M, d]` (int16, strongest channels first), `spread` `[M, d]`
    (fp32, their root mean squares), `pair_bits` `[M, d / 2]` (uint8).
    """

    Config = TrellisConfig
    config: TrellisConfig
    table_: torch.Tensor
    spread_: torch.Tensor
    order_: torch.Tensor
    bits_: torch.Tensor

    def _fit(self, samples: torch.Tensor, weights: torch.Tensor | None, seed: int) -> None:
        self.config.stages(samples.shape[2])
        energy = samples.square().mean(0)  # [M, d]
        self._share_out(energy)
        # Long vectors do not make up most of it once all are scaled.
        for _ in range(ROUNDS):
            scaled = [self._scaled(samples[:, m], m) for m in range(samples.shape[1])]
            self._share_out(torch.stack([x.square().mean(0) for x in scaled]))
        self._learn(samples[:: -(-len(samples) // LEARNING_VECTORS)], weights, seed)

    def _share_out(self, energy: torch.Tensor) -> None:
        """Order, spread and bits of channels `[M, d]`."""
        order = energy.argsort(dim=1, descending=True, stable=True)
        ordered = energy.gather(1, order)
        pairs = ordered.unflatten(1, (-1, 2)).prod(2).sqrt()
        budget = int(self.config.rate * energy.shape[1]) - SCALE_BITS
        most = self.config.memory - LEAST_MEMORY
        shared = [shared_out(book.tolist(), budget, most) for book in pairs]
        self.order_, self.spread_ = order.short(), ordered.sqrt()
        self.bits_ = torch.tensor(shared, dtype=torch.uint8, device=energy.device)

    def _scaled(self, x: torch.Tensor, m: int) -> torch.Tensor:
        return x / self._scales(self._scale_codes(x, m)).unsqueeze(1)

    def prepare(self, subspaces: int, dim: int) -> None:
        """Variances are always learned: raises NotFittedError."""
        raise self.needs_fit()

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        """Codes `[N, M, S]` (int32), the bytes of each vector. Raises NotFittedError, StateError."""
        x = self._checked(x).float()
        books = [self._bytes(*self._searched(x[:, m], m), m) for m in range(x.shape[1])]
        return torch.stack(books, 1)

    def decode(self, codes: torch.Tensor) -> torch.Tensor:
        """Vectors `[N, M, d]` (fp32). Raises NotFittedError."""
        self._fitted()
        books = [self._vectors(*self._states(codes[:, m], m), m) for m in range(codes.shape[1])]
        return torch.stack(books, 1)

    def planned_bytes(self, subspaces: int, dim: int) -> int:
        """Of the table, and per channel 6 bytes, and one per pair."""
        return 2**self.config.memory * 4 + subspaces * (6 * dim + dim // 2)

    def state(self) -> dict[str, torch.Tensor]:
        """`table`, `spread`, `order`, `pair_bits`. Raises NotFittedError."""
        self._fitted()
        return {
            "table": self.table_,
            "spread": self.spread_,
            "order": self.order_,
            "pair_bits": self.bits_,
        }

    def load_state(self, state: dict[str, torch.Tensor]) -> None:
        """Take over what `state` returned. Raises StateError where it does not fit."""
        expected = {
            "table": torch.float16,
            "spread": torch.float32,
            "order": torch.int16,
            "pair_bits": torch.uint8,
        }
        given = {name: tensor.dtype for name, tensor in state.items()}
        if given != expected:
            raise StateError(f"a trellis has {expected}, given {given}")
        table, spread, order, bits = (state[name] for name in expected)
        dim = order.shape[-1]
        fits = (
            table.shape == (2**self.config.memory, 2)
            and order.ndim == 2
            and spread.shape == order.shape
            and bits.shape == (len(order), dim // 2)
            and bool((order.long().sort(1).values == torch.arange(dim, device=order.device)).all())
            and bool((bits.sum(1) == self.config.rate * dim - SCALE_BITS).all())
            and int(bits.max()) <= self.config.memory - LEAST_MEMORY
        )
        if not fits:
            shapes = {name: list(tensor.shape) for name, tensor in state.items()}
            raise StateError(
                f"a trellis of {self.config.rate:g} bits with {self.config.memory} bits of memory "
                f"has other tensors than {shapes}, or other orders and bits"
            )
        self.table_, self.spread_, self.order_, self.bits_ = table, spread, order, bits
        self.health_ = []

    # -- inside ----------------------------------------------------------------------------

    def _learn(self, samples: torch.Tensor, weights: torch.Tensor | None, seed: int) -> None:
        size = 2**self.config.memory
        generator = torch.Generator().manual_seed(seed)
        table = torch.randn(size, 2, generator=generator).to(samples.device)
        if weights is not None:
            weights = weights[:: -(-len(weights) // len(samples))].float()
        inertia: list[float] = []
        used = torch.zeros(size, device=samples.device)
        for _ in range(self.config.iterations):
            self.table_ = table.half()
            sums = torch.zeros(size, 3, device=samples.device)
            used.zero_()
            error = counted = 0.0
            for m in range(samples.shape[1]):
                codes, scale = self._searched(samples[:, m], m)
                states = self._states(self._bytes(codes, scale, m), m)[0]
                given = torch.ones(len(samples), device=samples.device)
                if weights is not None:
                    given = weights if weights.ndim == 1 else weights[:, m]
                # In units of the table an error of a long vector is as many times as large.
                heavy = given * self._scales(scale).square()
                targets = self._normed(samples[:, m], scale, m)
                each = heavy[:, None].expand_as(states).reshape(-1)
                moved = torch.cat([targets.flatten(0, 1) * each[:, None], each[:, None]], 1)
                sums.index_add_(0, states.flatten(), moved)
                used.index_add_(0, states.flatten(), torch.ones_like(each))
                decoded = self._vectors(states, scale, m)
                error += float((samples[:, m] - decoded).square().sum(1) @ given)
                counted += float(given.sum())
            inertia.append(error / counted)
            prior = PRIOR * sums[:, 2].sum() / used.sum()
            table = (sums[:, :2] + prior * table) / (sums[:, 2:] + prior)
        self.table_ = table.half()
        shares = used[used > 0] / used.sum()
        gain = 1 - inertia[-1] / inertia[-2] if len(inertia) > 1 and inertia[-2] else None
        entropy = float(-(shares * shares.log2()).sum())
        dead = int((used == 0).sum())
        self.health_ = [Health(tuple(inertia), entropy, dead, dead, gain)]

    def _searched(self, x: torch.Tensor, m: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Of vectors `[N, d]` the best bits of each coded pair `[N, n]`, and scales as codes `[N]`."""
        scale = self._scale_codes(x, m)
        widths = self._widths(m)
        cost = self._units(m).square()
        codes = encode_trellis(self._normed(x, scale, m), cost, self.table_.float(), widths)
        return codes, scale

    def _scale_codes(self, x: torch.Tensor, m: int) -> torch.Tensor:
        """Of vectors `[N, d]`: how much longer they are than usual, where they have bits."""
        energy = (self._pairs(x, m) / self._spread(m)).square().mean((1, 2))
        # Of vectors that are 0 the logarithm is −∞, and the code 0.
        steps = (energy.log2() / (2 * SCALE_STEP)).round()
        return (steps + 2 ** (SCALE_BITS - 1)).clamp(0, 2**SCALE_BITS - 1).int()

    def _normed(self, x: torch.Tensor, scale: torch.Tensor, m: int) -> torch.Tensor:
        """Coded pairs `[N, n, 2]` in units of the table."""
        return self._pairs(x, m) / (self._scales(scale)[:, None, None] * self._units(m))

    def _bytes(self, codes: torch.Tensor, scale: torch.Tensor, m: int) -> torch.Tensor:
        """Bits of all pairs in a row, then those of the scale: `[N, S]` (int32)."""
        widths = self._widths(m).long()
        pair = torch.arange(len(widths), device=codes.device).repeat_interleave(widths)
        ends = widths.cumsum(0)
        place = torch.arange(len(pair), device=codes.device)
        bits = (codes[:, pair] >> (ends[pair] - 1 - place)) & 1
        tail = torch.arange(SCALE_BITS - 1, -1, -1, device=codes.device)
        bits = torch.cat([bits, (scale[:, None] >> tail) & 1], 1).unflatten(1, (-1, 8))
        return (bits << torch.arange(7, -1, -1, device=codes.device)).sum(2).int()

    def _states(self, codes: torch.Tensor, m: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Of bytes `[N, S]` the states of coded pairs `[N, n]` and the scales' codes `[N]`."""
        codes = codes.long()
        last = self._widths(m).long().cumsum(0) - 1  # bit that ends each pair's state
        padded = torch.nn.functional.pad(codes, (2, 0))  # state 0 before the first bit
        byte = last // 8
        word = (padded[:, byte] << 16) | (padded[:, byte + 1] << 8) | padded[:, byte + 2]
        states = (word >> (7 - last % 8)) & (2**self.config.memory - 1)
        return states, codes[:, -1] & (2**SCALE_BITS - 1)

    def _vectors(self, states: torch.Tensor, scale: torch.Tensor, m: int) -> torch.Tensor:
        """Vectors `[N, d]`; channels without bits are 0."""
        units = self._scales(scale)[:, None, None] * self._units(m)
        pairs = self.table_.float()[states] * units
        x = pairs.new_zeros(len(states), self.order_.shape[1])
        x[:, self._channels(m)] = pairs.flatten(1)
        return x

    def _pairs(self, x: torch.Tensor, m: int) -> torch.Tensor:
        """The pairs that have bits, `[N, n, 2]`."""
        return x[:, self._channels(m)].unflatten(1, (-1, 2))

    def _channels(self, m: int) -> torch.Tensor:
        pairs = self.order_[m].long().unflatten(0, (-1, 2))
        return pairs[self.bits_[m] > 0].flatten()

    def _widths(self, m: int) -> torch.Tensor:
        """k `[n]` of pairs with bits."""
        return self.bits_[m][self.bits_[m] > 0]

    def _spread(self, m: int) -> torch.Tensor:
        """Root mean squares `[n, 2]` of pairs with bits."""
        pairs = self.spread_[m].unflatten(0, (-1, 2))
        return pairs[self.bits_[m] > 0].clamp_min(1e-30)

    def _units(self, m: int) -> torch.Tensor:
        """s `[n, 2]`: what is decoded varies less than what is coded, by its error."""
        error = torch.exp2(-self._widths(m).float())
        return self._spread(m) * (1 - error).sqrt().unsqueeze(1)

    def _scales(self, codes: torch.Tensor) -> torch.Tensor:
        return torch.exp2((codes.float() - 2 ** (SCALE_BITS - 1)) * SCALE_STEP)

    def _fitted(self) -> None:
        if not hasattr(self, "table_"):
            raise NotFittedError(str(self.needs_fit()))

    def _checked(self, x: torch.Tensor) -> torch.Tensor:
        """Raises NotFittedError, or StateError on another shape."""
        self._fitted()
        if x.ndim != 3 or x.shape[1:] != self.order_.shape:
            raise StateError(
                f"vectors are [N, {', '.join(map(str, self.order_.shape))}], given {list(x.shape)}"
            )
        return x


def shared_out(variances: list[float], budget: int, most: int) -> list[int]:
    """Bits of each pair, `budget` in all and at most `most`: one after the other to the pair whose
    error falls most by it. Variances fall, so bits do."""
    bits = [0] * len(variances)

    def gain(pair: int) -> float:
        after = LOSS * 2.0 ** -(bits[pair] + 1)
        before = 1.0 if not bits[pair] else 2 * after
        return variances[pair] * (before - after)

    heap = [(-gain(pair), pair) for pair in range(len(variances))]
    heapq.heapify(heap)
    for _ in range(budget):
        _, pair = heapq.heappop(heap)
        bits[pair] += 1
        if bits[pair] < most:
            heapq.heappush(heap, (-gain(pair), pair))
    return bits
