"""Trellis-coded channels whose bits go where they are needed: QTIP, for KV vectors.

QTIP (arXiv 2406.11235) codes weights that a random rotation has made alike. KV vectors in their
eigenbasis are the opposite: channels of very different variances, and tokens of very different
lengths. So a pair of channels gets bits by its variance, and a token by its length, which is stored
with it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from pydantic import Field

from vqkv.codebooks.base import Health
from vqkv.errors import SchemeError, StateError
from vqkv.kernels.decode.trellis import Strings, decode_trellis
from vqkv.kernels.decode.trellis_naive import states_of
from vqkv.kernels.encode.trellis import encode_trellis
from vqkv.layouts import PAGE_TOKENS
from vqkv.quantizers.base import Quantizer, QuantizerConfig
from vqkv.quantizers.shared_bits import SharedBits, growth

#: Bits of a token's length, and its steps: quarter octaves, from 2⁻² to 2^1.75 of the usual one.
SCALE_BITS, SCALE_STEP = 4, 0.25
SCALES = 2**SCALE_BITS
#: Bits of a state that are older than a pair's own: fewer are hardly a trellis.
LEAST_MEMORY = 2
#: Root mean square of a channel, in parts of the strongest one's, below which it does not matter.
LEAST_SPREAD = 1e-4
#: Vectors that the table learns from, at most, and how many an entry's start counts for.
LEARNING_VECTORS, PRIOR = 16384, 20.0
#: Of finding lengths by channels' spread, and the spread of what is divided by them.
ROUNDS = 2


class TrellisConfig(QuantizerConfig):
    """Settings of `Trellis`.

    Attributes:
        rate: bits per channel on average, all included.
        memory: bits of a state; the table has 2^memory entries, and encoding takes as many steps
            per pair of channels.
        run: tokens in a row that share their bits, and are only coded together.
        iterations: of learning the table.
    """

    type: Literal["trellis"] = "trellis"
    rate: float = Field(gt=0, le=8)
    memory: int = Field(default=12, ge=4, le=14)
    run: int = Field(default=PAGE_TOKENS, ge=1, le=PAGE_TOKENS)
    iterations: int = Field(default=6, ge=1)

    def stages(self, dim: int) -> int:
        """Bytes of a vector. Raises SchemeError where `dim` or `rate` does not give whole ones."""
        total = self.rate * dim
        if dim % 2 or total % 8:
            remedy = "" if dim % 2 else f"; give a multiple of {8 / dim:g}"
            raise SchemeError(
                f"quantizer.rate: 'trellis' codes pairs of channels in whole bytes; {self.rate:g} "
                f"bits of {dim} channels are {total:g}{remedy}"
            )
        if PAGE_TOKENS % self.run:
            raise SchemeError(
                f"quantizer.run: {self.run} tokens do not divide a page of {PAGE_TOKENS}"
            )
        if self.header_bytes >= total / 8 * self.run:
            raise SchemeError(f"quantizer.rate: {total:g} bits of a vector are all for its length")
        if 2 * self.rate > self.memory - LEAST_MEMORY:
            raise SchemeError(
                f"quantizer.memory: {self.rate:g} bits per channel need at least "
                f"{math.ceil(2 * self.rate) + LEAST_MEMORY}, given {self.memory}"
            )
        return int(total) // 8

    def bits(self) -> int:
        """8: codes are bytes."""
        return 8

    @property
    def token_group(self) -> int:
        """`run`."""
        return self.run

    @property
    def header_bytes(self) -> int:
        """Of a run: its tokens' lengths."""
        return -(-self.run * SCALE_BITS // 8)


class Trellis(Quantizer):
    """Pairs of channels `x_p ≈ σ s_p ∘ T[state_p]`, strongest first, a token's σ in 4 bits.

    A pair adds k_p bits to the state, which keeps the last L: `state_p = (state_{p−1} 2^{k_p} +
    bits_p) mod 2^L`, from 0 on for each token. So any state is L bits in a row of the code, and
    decoding has no order; encoding finds the best bits of all pairs together (Viterbi). The table T
    `[2^L, 2]` is one for all pairs; it starts as Gaussian noise and learns as k-means does, from
    the best bits under the last one.

    A run of tokens has `rate` bits per channel for all of them, and shares them out byte by byte to
    whichever token gains most (`SharedBits`): lengths come first in the code, and say how many
    bytes each token has.

    State: `table` (fp16), `order` `[M, d]` (int16, strongest channels first), `spread` `[M, d]`
    (fp32, their root mean squares), `grown` `[M, 8 B]` (int16, the pair that gets each next bit of
    a token) and `gains` `[M, B]` (int16, what each next byte gains, in eighths of octaves).
    """

    Config = TrellisConfig
    config: TrellisConfig
    table_: torch.Tensor
    order_: torch.Tensor
    spread_: torch.Tensor
    shared_: list[SharedBits]
    units_: list[torch.Tensor]

    def _fit(self, samples: torch.Tensor, weights: torch.Tensor | None, seed: int) -> None:
        self.config.stages(samples.shape[2])
        self._share_out(samples.square().mean(0))
        for _ in range(ROUNDS):  # long tokens no longer make up most of it
            scaled = [self._scaled(samples[:, m], m) for m in range(samples.shape[1])]
            self._share_out(torch.stack([x.square().mean(0) for x in scaled]))
        self._learn(samples, weights, seed)

    def _share_out(self, energy: torch.Tensor) -> None:
        """Order, spread and bits of channels by energies `[M, d]`."""
        order = energy.argsort(dim=1, descending=True, stable=True)
        spread = energy.gather(1, order).sqrt()
        # A channel that never moved may move yet; it must not look infinitely long then.
        spread = spread.maximum(LEAST_SPREAD * spread[:, :1]).clamp_min(1e-30)
        self.order_, self.spread_ = order.short(), spread
        variances = spread.unflatten(1, (-1, 2)).prod(2)
        most = self._most_bytes(energy.shape[1])
        grown = [growth(book.tolist(), most, self._most_bits) for book in variances]
        self._share([(pairs.to(energy.device), gains.to(energy.device)) for pairs, gains in grown])

    def _share(self, grown: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> None:
        """Of each book, by order and spread: who gets which bits, and the `units_`.

        These are s `[B + 1, P, 2]` of the pairs of a token of so many bytes: what is decoded varies
        less than what is coded, by its error, and not at all without bits.
        """
        self.shared_ = [SharedBits(*book, self.order_.shape[1] // 2) for book in grown]
        self.units_ = []
        for shared, spread in zip(self.shared_, self.spread_, strict=True):
            left = (1 - torch.exp2(-shared.widths.float())).sqrt()
            self.units_.append(spread.unflatten(0, (-1, 2)) * left.unsqueeze(-1))

    def prepare(self, subspaces: int, dim: int) -> None:
        """Variances are always learned: raises NotFittedError."""
        raise self.needs_fit()

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        """Codes `[N, M, S]` (int32), bytes of whole runs. Raises NotFittedError, StateError."""
        x = self._checked(x).float()
        if not len(x):
            size = self.config.stages(x.shape[2])
            return x.new_empty(0, x.shape[1], size, dtype=torch.int32)
        return torch.stack([self._encode(x[:, m], m) for m in range(x.shape[1])], 1)

    def decode(self, codes: torch.Tensor) -> torch.Tensor:
        """Vectors `[N, M, d]` (fp32). Raises NotFittedError, or StateError on a part of a run."""
        self._fitted()
        if len(codes) % self.config.run:
            raise StateError(
                f"runs of {self.config.run} tokens are decoded whole, given {len(codes)} tokens"
            )
        if not len(codes):
            return self.spread_.new_empty(0, *self.order_.shape)
        return torch.stack([self._decode(codes[:, m], m) for m in range(codes.shape[1])], 1)

    def planned_bytes(self, subspaces: int, dim: int) -> int:
        """Of the table; per channel 6 bytes; per byte that a token may have, 18."""
        each = 6 * dim + 18 * self._most_bytes(dim)
        return (4 << self.config.memory) + subspaces * each

    def state(self) -> dict[str, torch.Tensor]:
        """`table`, `order`, `spread`, `grown`, `gains`. Raises NotFittedError."""
        self._fitted()
        return {
            "table": self.table_,
            "order": self.order_,
            "spread": self.spread_,
            "grown": torch.stack([shared.pairs for shared in self.shared_]),
            "gains": torch.stack([shared.gains for shared in self.shared_]),
        }

    def load_state(self, state: dict[str, torch.Tensor]) -> None:
        """Take over what `state` returned. Raises StateError where it does not fit."""
        types = {
            "table": torch.float16,
            "order": torch.int16,
            "spread": torch.float32,
            "grown": torch.int16,
            "gains": torch.int16,
        }
        given = {name: tensor.dtype for name, tensor in state.items()}
        if given != types:
            raise StateError(f"a trellis has {types}, given {given}")
        table, order, spread, grown, gains = (state[name] for name in types)
        books, dim = order.shape if order.ndim == 2 and order.shape[1] % 2 == 0 else (0, 0)
        fits = (
            table.shape == (2**self.config.memory, 2)
            and books > 0
            and spread.shape == order.shape
            and gains.shape == (books, self._most_bytes(dim))
            and grown.shape == (books, 8 * self._most_bytes(dim))
            and bool((order.long().sort(1).values == torch.arange(dim, device=order.device)).all())
            and bool(((grown >= 0) & (grown < dim // 2)).all())
            and bool((gains[:, 1:] <= gains[:, :-1]).all())
            and bool((_counts(grown, dim // 2) <= self._most_bits).all())
            and bool((spread > 0).all())
        )
        if not fits:
            shapes = {name: list(tensor.shape) for name, tensor in state.items()}
            raise StateError(
                f"a trellis of {self.config.rate:g} bits with {self.config.memory} bits of memory "
                f"has other tensors than {shapes}, or other orders and bits"
            )
        self.table_, self.order_, self.spread_ = table, order, spread
        self._share(list(zip(grown, gains, strict=True)))
        self.health_ = []

    # -- learning --------------------------------------------------------------------------

    def _learn(self, samples: torch.Tensor, weights: torch.Tensor | None, seed: int) -> None:
        step = -(-len(samples) // LEARNING_VECTORS)
        samples = samples[::step]
        if weights is None:
            weights = torch.ones(len(samples), device=samples.device)
        else:
            weights = weights[::step].float()
        # Samples make up runs, the last one whole with some of them twice.
        filled = torch.arange(-(-len(samples) // self.config.run) * self.config.run)
        rows = (filled % len(samples)).to(samples.device)
        size = len(rows)
        generator = torch.Generator().manual_seed(seed)
        start = torch.randn(2**self.config.memory, 2, generator=generator).to(samples.device)
        self.table_ = start.half()
        inertia: list[float] = []
        for _ in range(self.config.iterations):
            sums = torch.zeros(len(start), 5, device=samples.device)
            error = 0.0
            for m in range(samples.shape[1]):
                x = samples[rows, m]
                given = (weights if weights.ndim == 1 else weights[:, m])[rows]
                found, wrong = self._moved(x, given / given.mean(), m)
                sums += found
                error += wrong / size
            inertia.append(error)
            prior = PRIOR * sums[:, 2:4].sum(0) / sums[:, 4].sum()
            moved = (sums[:, :2] + prior * self.table_.float()) / (sums[:, 2:4] + prior)
            self.table_ = moved.half()
        used = sums[:, 4]
        shares = used[used > 0] / used.sum()
        gain = 1 - inertia[-1] / inertia[-2] if len(inertia) > 1 and inertia[-2] else None
        dead = int((used == 0).sum())
        entropy = float(-(shares * shares.log2()).sum())
        self.health_ = [Health(tuple(inertia), entropy, dead, dead, gain)]

    def _moved(self, x: torch.Tensor, weights: torch.Tensor, m: int) -> tuple[torch.Tensor, float]:
        """Of each entry of the table what it is chosen for: weighted sums of both channels, the
        weights of both, and uses, `[2^L, 5]`; and the weighted squared error."""
        codes = self._encode(x, m)
        scale, strings = self._read(codes, m)
        states = states_of(strings, self.config.memory)
        coded = self.shared_[m].widths[strings.counts] > 0  # [N, P]
        units = (self._scales(scale)[:, None, None] * self.units_[m][strings.counts])[coded]
        # An error in units of the table counts by what a unit is, as it does in the search.
        heavy = weights.unsqueeze(1).expand_as(states)[coded].unsqueeze(1) * units.square()
        moved = heavy * self._pairs(x, m)[coded] / units
        found = torch.cat([moved, heavy, torch.ones_like(heavy[:, :1])], 1)
        sums = torch.zeros(len(self.table_), 5, device=x.device)
        sums.index_add_(0, states[coded], found)
        return sums, float((x - self._decode(codes, m)).square().sum(1) @ weights)

    # -- coding ----------------------------------------------------------------------------

    def _encode(self, x: torch.Tensor, m: int) -> torch.Tensor:
        """Bytes `[N, S]` (int32) of vectors `[N, d]`."""
        pairs, table = self._pairs(x, m), self.table_.float()
        scale = self._scale_codes(pairs, m)
        scaled = pairs / self._scales(scale)[:, None, None]
        size = self.config.stages(x.shape[1]) * self.config.run
        offsets, bytes_ = self._offsets(scale, m)
        runs = x.new_zeros(len(x) // self.config.run, size, dtype=torch.int32)
        header = scale.view(-1, self.config.run)
        if self.config.run % 2:
            header = torch.nn.functional.pad(header, (0, 1))
        runs[:, : self.config.header_bytes] = header[:, ::2] << SCALE_BITS | header[:, 1::2]
        flat = runs.view(-1)
        for count in bytes_.unique().tolist():
            if not count:
                continue
            rows = (bytes_ == count).nonzero().squeeze(1)
            widths = self.shared_[m].widths[count]
            coded = widths > 0
            units = self.units_[m][count, coded]
            given = scaled[rows][:, coded] / units
            # Relative costs: sums of them stay far from what fp32 holds.
            cost = (units / units.amax()).square()
            codes = encode_trellis(given, cost, table, widths[coded])
            place = offsets[rows].unsqueeze(1) + torch.arange(count, device=x.device)
            flat[place] = _as_bytes(codes, widths[coded])
        return runs.view(len(x), -1)

    def _decode(self, codes: torch.Tensor, m: int) -> torch.Tensor:
        """Vectors `[N, d]` of bytes `[N, S]`; pairs without bits are 0."""
        scale, strings = self._read(codes, m)
        pairs = decode_trellis(strings, self.units_[m], self.table_.float())
        x = pairs.new_empty(len(pairs), self.order_.shape[1])
        x[:, self.order_[m].long()] = pairs.flatten(1) * self._scales(scale).unsqueeze(1)
        return x

    def _read(self, codes: torch.Tensor, m: int) -> tuple[torch.Tensor, Strings]:
        """Of bytes `[N, S]` tokens' lengths, as codes `[N]`, and where the rest of them lies."""
        runs = codes.reshape(-1, codes.shape[1] * self.config.run)
        header = runs[:, : self.config.header_bytes]
        both = torch.stack([header >> SCALE_BITS, header & (SCALES - 1)], 2).flatten(1)
        scale = both[:, : self.config.run].flatten()
        return scale, Strings(runs.flatten(), *self._offsets(scale, m), self.shared_[m].ends)

    def _offsets(self, scale: torch.Tensor, m: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Where each token's bytes begin in all runs together, and how many it has, `[N]`."""
        size = self.config.stages(self.order_.shape[1]) * self.config.run
        octaves = 2 * SCALE_STEP * (scale.view(-1, self.config.run) - SCALES // 2)
        bytes_ = self.shared_[m].bytes_of(octaves, size - self.config.header_bytes)
        first = torch.arange(len(bytes_), device=scale.device).unsqueeze(1) * size
        offsets = first + self.config.header_bytes + bytes_.cumsum(1) - bytes_
        return offsets.flatten(), bytes_.flatten()

    def _scale_codes(self, pairs: torch.Tensor, m: int) -> torch.Tensor:
        """How long vectors are, as pairs `[N, P, 2]`, by the channels that usually get bits."""
        spread = self.spread_[m].unflatten(0, (-1, 2))
        usual = self.shared_[m].widths[self.config.stages(self.order_.shape[1])] > 0
        energy = (pairs[:, usual] / spread[usual]).square()
        # Of vectors that are 0 the logarithm is −∞, and the code 0.
        steps = (energy.mean((1, 2)).log2() / (2 * SCALE_STEP)).round()
        codes: torch.Tensor = (steps + SCALES // 2).clamp(0, SCALES - 1).int()
        return codes

    def _scaled(self, x: torch.Tensor, m: int) -> torch.Tensor:
        return x / self._scales(self._scale_codes(self._pairs(x, m), m)).unsqueeze(1)

    def _scales(self, codes: torch.Tensor) -> torch.Tensor:
        return torch.exp2((codes.float() - SCALES // 2) * SCALE_STEP)

    def _pairs(self, x: torch.Tensor, m: int) -> torch.Tensor:
        """Vectors `[N, d]` as pairs `[N, P, 2]`, strongest first."""
        pairs: torch.Tensor = x[:, self.order_[m].long()].unflatten(1, (-1, 2))
        return pairs

    @property
    def _most_bits(self) -> int:
        return self.config.memory - LEAST_MEMORY

    def _most_bytes(self, dim: int) -> int:
        """The most bytes that a token gets: three times the usual, or all that its pairs take."""
        return min(3 * self.config.stages(dim), self._most_bits * dim // 2 // 8) if dim else 0

    def _fitted(self) -> None:
        if not hasattr(self, "table_"):
            raise self.needs_fit()

    def _checked(self, x: torch.Tensor) -> torch.Tensor:
        """Raises NotFittedError, or StateError on another shape or a run that is not whole."""
        self._fitted()
        if x.ndim != 3 or x.shape[1:] != self.order_.shape or len(x) % self.config.run:
            books, dim = self.order_.shape
            raise StateError(
                f"vectors are [N, {books}, {dim}], N whole runs of {self.config.run} tokens, given "
                f"{list(x.shape)}"
            )
        return x


def _counts(pairs: torch.Tensor, count: int) -> torch.Tensor:
    """How often each of so many numbers comes in each row."""
    found = torch.zeros(len(pairs), count, dtype=torch.int64, device=pairs.device)
    return found.scatter_add_(1, pairs.long(), torch.ones_like(pairs, dtype=torch.int64))


def _as_bytes(codes: torch.Tensor, widths: torch.Tensor) -> torch.Tensor:
    """Bits `[N, n]` of so many each, in a row: `[N, bytes]` (int32)."""
    widths = widths.long()
    pair = torch.arange(len(widths), device=codes.device).repeat_interleave(widths)
    ends = widths.cumsum(0)
    place = torch.arange(len(pair), device=codes.device)
    bits = ((codes[:, pair] >> (ends[pair] - 1 - place)) & 1).unflatten(1, (-1, 8))
    packed: torch.Tensor = (bits << torch.arange(7, -1, -1, device=codes.device)).sum(2).int()
    return packed
