"""One stream's fitted chain: predictor, transforms, grouping, quantizers, packed codes, back."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from einops import rearrange

from vqkv.codebooks.base import Health, check_finite
from vqkv.errors import NotFittedError, SchemeError, StateError
from vqkv.groupings import ChannelStats, Contiguous
from vqkv.kernels.pack import pack, unpack
from vqkv.layouts import Layout, Segment, SideField
from vqkv.predictors import PREDICTORS, Predictor
from vqkv.quantizers import QUANTIZERS, Quantizer
from vqkv.rotation import Pairs
from vqkv.scheme import KeysConfig, SegmentConfig, StreamConfig, check_runs
from vqkv.states import States
from vqkv.transforms import TRANSFORMS, Metric, Transform
from vqkv.transforms.roots import normed
from vqkv.transforms.statistics import moments


@dataclass(frozen=True)
class Encoded:
    """Stored tokens: packed codes `[N, U, bytes]` (uint8) and side scalars `[N, F]` (fp16)."""

    codes: torch.Tensor
    side: torch.Tensor

    @property
    def nbytes(self) -> int:
        """Bytes of both tensors."""
        return self.codes.nbytes + self.side.nbytes


class Codec:
    """Codes the tokens of one stream, `[N, H, D]`.

    Where the stream is predicted, `sources` are the reconstructions `[N, H, D]` of the same tokens
    in the streams that the predictor names, in its order.

    Args:
        config: the stream's settings.
        heads: H.
        head_dim: D.
        pairs: RoPE pairs of a head.
        where: what to call the stream in errors, such as `"keys of layer 3"`.

    Raises:
        SchemeError: the settings do not fit H and D.
    """

    def __init__(
        self,
        config: StreamConfig,
        heads: int,
        head_dim: int,
        pairs: Pairs = (),
        where: str = "stream",
    ) -> None:
        grouping = config.grouping.resolved(heads, head_dim)
        self.config = config = config.model_copy(update={"grouping": grouping})
        self.heads = heads
        self.head_dim = head_dim
        self.pairs = pairs
        self.where = where
        self.predictor: Predictor | None = (
            None if config.predictor is None else PREDICTORS.build(config.predictor)
        )
        self.transforms: list[Transform] = [
            TRANSFORMS.build(c).for_pairs(pairs) for c in config.transforms
        ]
        self.quantizers: list[Quantizer] = [
            QUANTIZERS.build(segment.quantizer) for segment in config.all_segments
        ]
        #: Of each learned stage, segment by segment.
        self.health: list[Health] = []
        with self._named_in_errors():
            self.layout = self._layout()
            if config.data_free:
                self._prepare()

    # -- fitting ---------------------------------------------------------------------------

    def fit(
        self,
        states: States,
        *,
        samples: int,
        seed: int = 0,
        sources: Sequence[States] = (),
        metric: torch.Tensor | None = None,
        across: torch.Tensor | None = None,
    ) -> Codec:
        """Fit the whole chain: statistics on all tokens, codebooks on at most `samples` of them.

        A data-free chain stays as it is. For `metric` and `across` see `fit_space`.

        Raises:
            StateError: no tokens, another shape, NaN or infinity, too few for the codebooks, or no
                metric though one is asked for; names the stream.
        """
        if not self.config.data_free:
            states = self.fit_predictor(states, sources)
            self.fit_space(states, metric, across)
            self.fit_quantizers(self.training_vectors(states, samples, seed), seed)
        return self

    def fit_predictor(self, states: States, sources: Sequence[States]) -> States:
        """Fit the predictor, where there is one, and return what it leaves over."""
        if not states.tokens:
            raise StateError(f"{self.where}: there are no tokens to learn from")
        states = states.map(self._checked)
        predictor = self.predictor
        if predictor is None:
            return states
        with self._named_in_errors():
            predictor.fit(states, sources)
        return States(
            states.tokens,
            lambda: states.beside(sources, lambda x, s: x - predictor.predict(s)),
        )

    @property
    def metric(self) -> Metric | None:
        """The metric that `fit_space` wants; the scheme makes sure that there is at most one."""
        return next((t.metric for t in self.transforms if t.metric), None)

    @property
    def coupled_heads(self) -> int | None:
        """Of how many heads `fit_space` wants to know what their errors do to each other."""
        for quantizer in self.quantizers:
            together = quantizer.config.coupled_heads(self.heads)
            if quantizer.config.couples == "heads" and together > 1:
                return together
        return None

    def fit_space(
        self,
        states: States,
        metric: torch.Tensor | None = None,
        across: torch.Tensor | None = None,
    ) -> None:
        """Fit the transforms in order, each on what those before it make, then the grouping.

        `metric` `[H, D, D]`, and `across` `[B, h, D, h, D]`, which is over sets of h heads, are for
        codecs that ask for them.
        """
        with self._named_in_errors():
            for transform in self.transforms:
                transform.fit(states, metric if transform.metric else None, self.pairs)
                states = states.map(partial(_transformed, transform))
            needs_data = self.config.grouping.needs_data
            self._set_order(moments(states).rms.square().cpu() if needs_data else None)
            for quantizer in self.quantizers:
                if quantizer.config.couples == "groups":
                    assert metric is not None, "the scheme sees to it"
                    quantizer.couple(self._coupling(metric))
                elif self.coupled_heads is not None:
                    quantizer.couple(self._coupling_of_heads(across))

    def training_vectors(self, states: States, samples: int, seed: int) -> list[torch.Tensor]:
        """What each segment's quantizer learns from: `[N', books, d]`."""
        with self._named_in_errors():
            z, _ = self._forward(states.sample(samples, seed))
        return [self._to_books(part, s) for part, s in self._split(z)]

    def training_weights(
        self, states: States, gradients: States, samples: int, seed: int
    ) -> list[torch.Tensor]:
        """Weights `[N', books]` of the `training_vectors`: squared gradients by them.

        `gradients` `[N, H, D]` are by the states. Through the transforms undone they are those by
        what is coded: an error of a scaled channel costs as much more as its scale is larger.
        """
        x = states.sample(samples, seed)
        with self._named_in_errors(), torch.enable_grad():
            z, side = self._transformed(x)
            z = z.detach().requires_grad_()
            (gradient,) = torch.autograd.grad(
                self._inverse(z, side), z, gradients.sample(samples, seed)
            )
        ordered = self._ordered(gradient.square())
        sums = [(part.sum(-1, keepdim=True), segment) for part, segment in self._split(ordered)]
        return [self._to_books(weight, segment).squeeze(-1) for weight, segment in sums]

    def fit_quantizers(
        self,
        vectors: list[torch.Tensor],
        seed: int,
        weights: list[torch.Tensor] | None = None,
    ) -> None:
        """Fit each segment's quantizer on the `training_vectors` of this stream, or of several."""
        given: Sequence[torch.Tensor | None] = weights or [None] * len(vectors)
        with self._named_in_errors():
            for quantizer, samples, weight in zip(self.quantizers, vectors, given, strict=True):
                quantizer.fit(samples, weight, seed=seed)
        self.health = [stage for quantizer in self.quantizers for stage in quantizer.health_]

    # -- coding ----------------------------------------------------------------------------

    def encode(self, x: torch.Tensor, sources: Sequence[torch.Tensor] = ()) -> Encoded:
        """Code tokens `[N, H, D]`.

        Raises:
            StateError: another shape, NaN or infinity, a token too large for its scale, or other
                sources than the predictor's.
            NotFittedError: before `fit`.
        """
        with self._named_in_errors():
            x = self._checked(x).float()
            if self.predictor is not None:
                x = x - self._predicted(sources, len(x))
            z, side = self._forward(x)
        packed = []
        for (part, segment), quantizer in zip(self._split(z), self.quantizers, strict=True):
            codes = self._codes(quantizer, self._to_books(part, segment))
            codes = self._from_books(codes, segment).flatten(2)  # [N, U, codes per unit]
            packed.append(pack(codes, segment.code_bits, self.layout))
        return Encoded(torch.cat(packed, -1), side)

    def decode(self, encoded: Encoded, sources: Sequence[torch.Tensor] = ()) -> torch.Tensor:
        """Reconstruct tokens, `[N, H, D]` in fp32.

        Raises:
            StateError: codes or side scalars of another layout, or other sources than the
                predictor's.
            NotFittedError: before `fit`.
        """
        given = (encoded.codes.shape[1:], encoded.side.shape[1:])
        expected = ((self.layout.units, self.layout.bytes_per_unit), (self.layout.side_count,))
        if given != expected:
            raise StateError(
                f"{self.where}: a token has codes {list(expected[0])} and side "
                f"{list(expected[1])}, given {list(given[0])} and {list(given[1])}"
            )
        parts = []
        start = 0
        for segment, quantizer in zip(self.layout.segments, self.quantizers, strict=True):
            packed = encoded.codes[..., start : start + segment.bytes_per_unit]
            start += segment.bytes_per_unit
            codes = unpack(packed, segment.code_bits, segment.codes_per_unit, self.layout)
            codes = codes.unflatten(-1, (segment.groups, segment.stages))
            vectors = self._vectors(quantizer, self._to_books(self._read(codes), segment))
            parts.append(self._from_books(vectors, segment).flatten(2))
        coded = torch.cat(parts, -1).flatten(1)
        z = torch.empty_like(coded)
        z[:, self._order().flatten()] = coded
        x = self._inverse(z.unflatten(1, (self.heads, self.head_dim)), encoded.side)
        if self.predictor is None:
            return x
        with self._named_in_errors():
            return x + self._predicted(sources, len(x))

    def there_and_back(
        self, x: torch.Tensor, sources: Sequence[torch.Tensor] = (), rows: int = 1
    ) -> torch.Tensor:
        """What tokens `[R · n, H, D]` of R rows are decoded to.

        A row's last run that is not whole is filled up, as later tokens of a longer text would.
        """
        missing = -(len(x) // rows) % self.layout.token_group
        if not missing:
            return self.decode(self.encode(x, sources), sources)

        def filled(tokens: torch.Tensor) -> torch.Tensor:
            by_row = tokens.unflatten(0, (rows, -1))
            return torch.cat([by_row, by_row[:, -1:].expand(-1, missing, -1, -1)], 1).flatten(0, 1)

        given = [filled(source) for source in sources]
        decoded = self.decode(self.encode(filled(x), given), given)
        whole: torch.Tensor = decoded.unflatten(0, (rows, -1))[:, :-missing].flatten(0, 1)
        return whole

    # -- state -----------------------------------------------------------------------------

    def state(self) -> dict[str, torch.Tensor]:
        """Everything learned, by flat name: `transforms.0.channels`, `segments.0.codewords`."""
        tensors: dict[str, torch.Tensor] = {}
        if self.predictor is not None:
            tensors |= {f"predictor.{k}": v for k, v in self.predictor.state().items()}
        for index, transform in enumerate(self.transforms):
            tensors |= {f"transforms.{index}.{k}": v for k, v in transform.state().items()}
        for index, quantizer in enumerate(self.quantizers):
            tensors |= {f"segments.{index}.{k}": v for k, v in quantizer.state().items()}
        if self.config.grouping.needs_data:
            tensors["order"] = self._order()
        return tensors

    def planned_bytes(self, *, codebooks: bool = True) -> int:
        """Bytes of `state`, known before `fit`; without codebooks where another codec has them."""
        planned = sum(part.planned_bytes(self.heads, self.head_dim) for part in self._learning())
        if self.config.grouping.needs_data:
            planned += 8 * self.heads * self.head_dim  # the order, int64
        if codebooks:
            planned += sum(
                self._quantizer_bytes(quantizer, segment)
                for quantizer, segment in zip(self.quantizers, self.layout.segments, strict=True)
            )
        return planned

    def load_state(self, tensors: dict[str, torch.Tensor]) -> Codec:
        """Take over what `state` returned. Raises StateError where names or shapes do not fit."""
        rest = dict(tensors)
        with self._named_in_errors():
            if self.predictor is not None:
                self.predictor.load_state(take(rest, "predictor."))
            for index, transform in enumerate(self.transforms):
                transform.load_state(take(rest, f"transforms.{index}."))
            for index, quantizer in enumerate(self.quantizers):
                quantizer.load_state(take(rest, f"segments.{index}."))
            self._check_shapes()
            if self.config.grouping.needs_data:
                self._take_order(rest.pop("order", None))
            else:
                self._set_order(None)
            if rest:
                raise StateError(f"state has unknown tensors {sorted(rest)}")
        return self

    def to(self, device: torch.device) -> Codec:
        """The same codec with its tensors on a device."""
        moved = Codec(self.config, self.heads, self.head_dim, self.pairs, self.where)
        moved.load_state({name: t.to(device) for name, t in self.state().items()})
        moved.order_ = self._order().to(device)
        moved.health = self.health
        return moved

    # -- inside ----------------------------------------------------------------------------

    def _layout(self) -> Layout:
        config = self.config
        config.grouping.check(self.head_dim, self.heads, self.pairs)
        for transform in self.transforms:
            transform.check(self.heads, self.head_dim)
        units = self.heads if config.grouping.head_local else 1
        channels = self.heads * self.head_dim // units
        return Layout(
            heads=self.heads,
            head_dim=self.head_dim,
            segments=tuple(
                self._segment(index, segment, units, channels)
                for index, segment in enumerate(config.all_segments)
            ),
            side=tuple(
                SideField(transform.config.type, count)
                for transform in self.transforms
                if (count := transform.side_count(self.heads, self.head_dim))
            ),
            rope=config.rope if isinstance(config, KeysConfig) else None,
            pairs_whole=all(
                self._keeps_pairs(config.dim_of(segment)) for segment in config.all_segments
            ),
            head_local=config.grouping.head_local
            and all(part.head_local for part in self._learning()),
            sharing=config.sharing,
            token_group=max(
                [
                    *(transform.token_group for transform in self.transforms),
                    *(segment.quantizer.token_group for segment in config.all_segments),
                ]
            ),
            commuting=self._commuting(),
            sources=tuple(
                (source.stream, source.back)
                for source in (config.predictor.sources if config.predictor else ())
            ),
        )

    def _commuting(self) -> bool:
        """Whether keys are sums of commuting units over whole heads, and scaled at most once."""
        config = self.config
        return (
            len(config.all_segments) == 1
            and config.all_segments[0].quantizer.commutes
            and config.dim_of(config.all_segments[0]) == self.head_dim
            and config.sharing == "head"
            and config.predictor is None
            and len(self.transforms) <= 1
            and all(transform.scales_heads for transform in self.transforms)
        )

    def _segment(self, index: int, config: SegmentConfig, units: int, channels: int) -> Segment:
        dim = self.config.dim_of(config)
        mine = config.share * channels
        if abs(mine - round(mine)) > 0.01 or round(mine) % dim:
            raise SchemeError(
                f"segments.{index}: share {config.share:g} of {channels} channels is {mine:g}, "
                f"which groups of dim {dim} do not fill"
            )
        groups = round(mine) // dim
        books = {"group": units * groups, "head": units, "subspace": groups}.get(
            self.config.sharing, 1
        )
        quantizer = config.quantizer
        check_runs(quantizer, books)
        return Segment(units, groups, dim, quantizer.stages(dim), quantizer.bits(), books)

    def _keeps_pairs(self, dim: int) -> bool:
        """Whether RoPE pairs lie whole in subvectors of `dim` channels, decoded."""
        grouping = self.config.grouping.model_copy(update={"dim": dim})
        runs = [run for t in self.transforms if (run := t.mixed_run(self.head_dim)) is not None]
        if not runs or not self.pairs:
            return grouping.keeps_pairs(self.head_dim, self.pairs)
        # A mixed run has to stay whole and in order; where it is all of a head, any order will do.
        in_order = isinstance(grouping, Contiguous) or dim == self.head_dim
        return grouping.head_local and in_order and dim % max(runs) == 0

    def _coupling(self, metric: torch.Tensor) -> torch.Tensor:
        """The metric of what is coded `[H, D, D]`, without the groups' own blocks."""
        rows = self._way_back(metric.device)
        coded = (rows @ normed(metric.double()) @ rows.mT).float()
        group = torch.arange(self.head_dim, device=metric.device) // self.config.grouping.dim
        return coded * (group.unsqueeze(0) != group.unsqueeze(1))

    def _coupling_of_heads(self, across: torch.Tensor | None) -> torch.Tensor:
        """How far errors of what is coded of one head push another's, `[B, h, n, h, n]`.

        The transform has made a head's own metric a multiple of the unit matrix.
        """
        if across is None:
            raise StateError("the metric across heads, that codes are chosen in, is needed")
        rows = self._way_back(across.device)
        order = (self._order() % self.head_dim).to(across.device)
        rows = rows.gather(1, order.unsqueeze(2).expand_as(rows)).unflatten(0, across.shape[:2])
        coded = torch.einsum("bhnd,bhdge,bgme->bhngm", rows, across.double(), rows)
        for head in range(across.shape[1]):
            own = coded[:, head, :, head].diagonal(dim1=1, dim2=2).mean(1).clamp_min(1e-30)
            coded[:, :, :, head] /= own[:, None, None, None]
            coded[:, head, :, head] = 0
        return coded.float()

    def _way_back(self, device: torch.device) -> torch.Tensor:
        """Each coded channel's unit vector through the last transform undone, `[H, D, D]`."""
        probes = torch.eye(self.head_dim, device=device)
        probes = probes.unsqueeze(1).expand(-1, self.heads, -1)  # [D, H, D]
        last = self.transforms[-1]  # those before keep the metric
        back = last.inverse(probes, None) - last.inverse(torch.zeros_like(probes), None)
        return back.transpose(0, 1).double()

    def _prepare(self) -> None:
        for quantizer, segment in zip(self.quantizers, self.layout.segments, strict=True):
            quantizer.prepare(segment.books, segment.dim)
        self._set_order(None)

    def _set_order(self, energy: torch.Tensor | None) -> None:
        stats = ChannelStats(energy, self.pairs)
        self.order_ = self.config.grouping.permutation(self.head_dim, self.heads, stats)

    def _take_order(self, order: torch.Tensor | None) -> None:
        channels = self.heads * self.head_dim
        expected = (self.layout.units, channels // self.layout.units)
        if order is None or order.shape != expected:
            given = None if order is None else list(order.shape)
            raise StateError(f"'order' has shape {list(expected)}, given {given}")
        if not torch.equal(order.flatten().sort().values.cpu(), torch.arange(channels)):
            raise StateError(f"'order' is no permutation of {channels} channels")
        self.order_ = order

    def _learning(self) -> list[Predictor | Transform]:
        """What stands before the grouping."""
        return [*([] if self.predictor is None else [self.predictor]), *self.transforms]

    def _check_shapes(self) -> None:
        for transform in self.transforms:
            channels = transform.state().get("channels")
            if channels is not None and channels.shape != (self.heads, self.head_dim):
                raise StateError(
                    f"channels have shape {[self.heads, self.head_dim]}, "
                    f"given {list(channels.shape)}"
                )
        for quantizer, segment in zip(self.quantizers, self.layout.segments, strict=True):
            books = quantizer.state().get("codewords")
            expected = (segment.books, segment.dim)
            if books is not None and (books.shape[0], books.shape[3]) != expected:
                raise StateError(
                    f"there are {segment.books} codebooks of dim {segment.dim}, "
                    f"given {books.shape[0]} of dim {books.shape[3]}"
                )
            what = f"{segment.books} codebooks of dim {segment.dim}"
            _check_bytes(quantizer, self._quantizer_bytes(quantizer, segment), what)
        for part in self._learning():
            planned = part.planned_bytes(self.heads, self.head_dim)
            _check_bytes(part, planned, f"{self.heads} heads of dim {self.head_dim}")

    def _quantizer_bytes(self, quantizer: Quantizer, segment: Segment) -> int:
        """What a quantizer's state takes: codebooks, and in fp16 how errors couple."""
        books = quantizer.planned_bytes(segment.books, segment.dim)
        if quantizer.config.couples == "groups":
            return books + 2 * self.heads * self.head_dim**2
        return books + 2 * self.heads * (self.coupled_heads or 0) * self.head_dim**2

    def _order(self) -> torch.Tensor:
        if not hasattr(self, "order_"):
            raise NotFittedError(f"{self.where}: the codec has not been fitted: call fit first")
        return self.order_

    def _checked(self, x: torch.Tensor) -> torch.Tensor:
        """The same tokens. Raises StateError on another shape, or NaN or infinity."""
        if x.ndim != 3 or x.shape[1:] != (self.heads, self.head_dim):
            raise StateError(
                f"states have shape [N, {self.heads}, {self.head_dim}], given {list(x.shape)}"
            )
        check_finite(x, "states", "[N, H, D]")
        return x

    @contextmanager
    def _named_in_errors(self) -> Iterator[None]:
        """Put the stream's name before what is wrong with it."""
        try:
            yield
        except (SchemeError, StateError) as error:
            raise type(error)(f"{self.where}: {error}") from error

    def _predicted(self, sources: Sequence[torch.Tensor], tokens: int) -> torch.Tensor:
        """Raises StateError where sources are missing or of another shape."""
        assert self.predictor is not None
        self._check_sources(sources, tokens)
        return self.predictor.predict(sources)

    def _check_sources(self, sources: Sequence[torch.Tensor], tokens: int) -> None:
        given = [list(source.shape) for source in sources]
        expected = [tokens, self.heads, self.head_dim]
        if given != [expected] * len(self.layout.sources):
            raise StateError(
                f"it is predicted from {len(self.layout.sources)} reconstructions {expected} of "
                f"{list(self.layout.sources)} (stream, layers back), given {given}"
            )

    def _forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Transformed, ordered channels `[N, U, C/U]`, and the side scalars `[N, F]`."""
        z, side = self._transformed(x)
        return self._ordered(z), side

    def _transformed(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """`z` `[N, H, D]` and the side scalars `[N, F]`."""
        sides = []
        for transform in self.transforms:
            x, side = transform.forward(x)
            if side is not None:
                sides.append(side)
        side = torch.cat(sides, 1) if sides else x.new_empty(x.shape[0], 0, dtype=torch.float16)
        return x, side

    def _ordered(self, x: torch.Tensor) -> torch.Tensor:
        """Channels of `[N, H, D]` in the grouping's order, `[N, U, C/U]`."""
        order = self._order()
        ordered: torch.Tensor = x.flatten(1)[:, order.flatten()].unflatten(1, order.shape)
        return ordered

    def _read(self, codes: torch.Tensor) -> torch.Tensor:
        """Of codes `[..., S]` the stages that are decoded: all."""
        return codes

    def _codes(self, quantizer: Quantizer, vectors: torch.Tensor) -> torch.Tensor:
        """What stands for vectors of one segment."""
        return quantizer.encode(vectors)

    def _vectors(self, quantizer: Quantizer, codes: torch.Tensor) -> torch.Tensor:
        """What codes of one segment stand for."""
        return quantizer.decode(codes)

    def _inverse(self, z: torch.Tensor, side: torch.Tensor) -> torch.Tensor:
        end = side.shape[1]
        for transform in reversed(self.transforms):
            start = end - transform.side_count(self.heads, self.head_dim)
            z = transform.inverse(z, side[:, start:end])
            end = start
        return z

    def _split(self, z: torch.Tensor) -> list[tuple[torch.Tensor, Segment]]:
        """Subvectors `[N, U, G, d]` of each segment."""
        sizes = [segment.groups * segment.dim for segment in self.layout.segments]
        return [
            (part.unflatten(2, (segment.groups, segment.dim)), segment)
            for part, segment in zip(z.split(sizes, 2), self.layout.segments, strict=True)
        ]

    def _to_books(self, x: torch.Tensor, segment: Segment) -> torch.Tensor:
        """`[N, U, G, ...]` to `[N', books, ...]`: subvectors of one codebook lie along N'."""
        match self.config.sharing:
            case "group":
                return x.flatten(1, 2)
            case "head":
                return rearrange(x, "n u g d -> (n g) u d")
            case "subspace":
                return x.flatten(0, 1)
            case _:
                return rearrange(x, "n u g d -> (n u g) 1 d")

    def _from_books(self, y: torch.Tensor, segment: Segment) -> torch.Tensor:
        """The way back, to `[N, U, G, ...]`."""
        units, groups = segment.units, segment.groups
        match self.config.sharing:
            case "group":
                return y.reshape(len(y), units, groups, *y.shape[2:])
            case "head":
                return rearrange(y, "(n g) u d -> n u g d", g=groups)
            case "subspace":
                return rearrange(y, "(n u) g d -> n u g d", u=units)
            case _:
                return rearrange(y, "(n u g) 1 d -> n u g d", u=units, g=groups)


def _transformed(transform: Transform, x: torch.Tensor) -> torch.Tensor:
    return transform.forward(x)[0]


def _check_bytes(part: Predictor | Transform | Quantizer, planned: int, what: str) -> None:
    """Raises StateError where a part holds other than the bytes that it plans for `what`."""
    state = part.state()
    held = sum(tensor.nbytes for tensor in state.values())
    if held != planned:
        shapes = {name: list(tensor.shape) for name, tensor in state.items()}
        raise StateError(
            f"{part.config.type}: its tensors take {planned} bytes for {what}, "  # type: ignore[union-attr]
            f"given {held} bytes in {shapes}"
        )


def take(tensors: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    """Move the tensors under a prefix out of `tensors`, prefix removed."""
    names = [name for name in tensors if name.startswith(prefix)]
    return {name.removeprefix(prefix): tensors.pop(name) for name in names}
