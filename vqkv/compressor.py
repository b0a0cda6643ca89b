"""A compressor: one codec per stream of a model, fitted together, saved as one artefact."""

from __future__ import annotations

import copy
import hashlib
import logging
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, MutableMapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import torch
from einops import rearrange

from vqkv.codebooks.base import Health
from vqkv.codec import Codec, Encoded, take
from vqkv.drafts import DraftCodec
from vqkv.errors import ModelError, NotFittedError, SchemeError, StateError
from vqkv.folding import FoldedLayer, NotFoldable, fold
from vqkv.geometry import Geometry
from vqkv.layouts import ACROSS_LAYERS, Stream, coded_tokens
from vqkv.scheme import STREAMS, KeysConfig, Scheme, StreamConfig, check_samples
from vqkv.states import States
from vqkv.transforms import Metric

if TYPE_CHECKING:
    from vqkv.cache import VQCache

log = logging.getLogger(__name__)


#: Bytes of a value that is kept exactly.
EXACT_BYTES = 2

#: Layer, and which of its streams.
StreamKey = tuple[int, Stream]


class StateSource(ABC):
    """Where `fit` reads a model's states: captured ones on disk, or tensors in a test."""

    @abstractmethod
    def states(self, layer: int, stream: Stream) -> States:
        """Tokens of one stream; keys before or after RoPE, as that layer's scheme codes them."""

    def metric(self, layer: int, stream: Stream, kind: Metric) -> torch.Tensor:
        """`[H, D, D]`: an error e of a head of a stream costs `eᵀ M e`.

        Raises:
            StateError: this source knows none.
        """
        raise StateError(f"{type(self).__name__} has no {kind} metric of {stream} of layer {layer}")

    def across_heads(self, layer: int, stream: Stream, together: int) -> torch.Tensor:
        """`[B, h, D, h, D]`: the Fisher metric of each B-th part of the heads at once, h of them.

        Raises:
            StateError: this source knows none.
        """
        raise StateError(
            f"{type(self).__name__} has no metric of all heads' {stream} of layer {layer}"
        )

    def gradients(self, layer: int, stream: Stream) -> States:
        """Of the model's loss by each channel of each token of `states`, `[N, H, D]`.

        Raises:
            StateError: this source knows none.
        """
        raise StateError(f"{type(self).__name__} has no gradients of {stream} of layer {layer}")

    def kept(self, layer: int, stream: Stream, states: States) -> States:
        """The same states, computed once and kept until `forget`; here in memory."""
        return States.of(torch.cat(list(states.chunks())))

    def forget(self, layer: int, stream: Stream) -> None:
        """What `kept` keeps of a stream is needed no more."""
        return None  # here it goes with the states themselves


@dataclass(frozen=True)
class Provenance:
    """What an artefact says of how it was made."""

    base_model: str | None = None
    calibration: dict[str, Any] = field(default_factory=dict)

    def tokens_of(self, sha256: str) -> float:
        """How many tokens at the start of a text with this SHA-256 were calibrated on.

        Infinity where an artefact names the text, but not how many.
        """
        hashes, tokens = (self.calibration.get(key) for key in ("text_sha256", "tokens"))
        if not isinstance(hashes, list | tuple) or sha256 not in hashes:
            return 0
        if not isinstance(tokens, int):
            return math.inf
        return math.ceil(tokens / len(hashes))


@dataclass(frozen=True)
class FittedStream:
    """One stream's learned tensors and health, as `fit` checkpoints them."""

    tensors: dict[str, torch.Tensor]
    health: list[Health]


#: Called with (streams done, streams in all, what was just fitted).
Progress = Callable[[int, int, str], None]


class KVCompressor:
    """Codecs of all compressed streams of one model geometry.

    A data-free scheme is ready at once; any other needs `fit`.

    Args:
        scheme: what to do.
        geometry: of the model it is for.

    Raises:
        SchemeError: the scheme cannot code this geometry; the message names layer and stream.
        ModelError: the model has no full-attention layer, so there is nothing to compress.
    """

    def __init__(
        self, scheme: Scheme, geometry: Geometry, provenance: Provenance | None = None
    ) -> None:
        if not geometry.compressed:
            raise ModelError(
                f"{geometry.model_type}: no layer has full attention, so no layer's cache grows "
                "with the text and there is nothing to compress"
            )
        scheme.check(geometry)
        self.scheme = scheme
        self.geometry = geometry
        self.provenance = provenance or Provenance()
        self._codecs: dict[StreamKey, Codec] = {
            (layer, stream): Codec(
                _stream_config(scheme, geometry, place, stream),
                geometry.kv_heads,
                geometry.head_dim,
                geometry.pairs if stream == "keys" else (),
                where=f"{stream} of layer {layer}",
            )
            for place, layer in enumerate(geometry.compressed)
            for stream in STREAMS
        }
        for codec in self._codecs.values():
            _check_samples(codec, scheme)
        self._moved: dict[tuple[int, Stream, torch.device], Codec] = {}
        self._folded: dict[tuple[int, torch.device], FoldedLayer | str] = {}
        homes: dict[tuple[Stream, StreamConfig], int] = {}
        self._homes = {
            (layer, stream): homes.setdefault((stream, codec.config), layer)
            if codec.config.sharing in ACROSS_LAYERS
            else layer
            for (layer, stream), codec in self._codecs.items()
        }
        self._last_use = {
            used: layer for layer, stream in self._codecs for used in self.sources(layer, stream)
        }
        self.fitted = scheme.data_free

    # -- fitting ---------------------------------------------------------------------------

    def fit(
        self,
        source: StateSource,
        *,
        seed: int = 0,
        progress: Progress | None = None,
        checkpoint: MutableMapping[str, FittedStream] | None = None,
    ) -> Self:
        """Fit every stream, in model order, keys before values.

        Args:
            source: the states to learn from.
            seed: all randomness follows from it.
            progress: told of each stream.
            checkpoint: holds streams that are done already, and is given each new one.

        Raises:
            StateError: no tokens, NaN or infinity, or too few for the codebooks; names the stream.
        """
        checkpoint = {} if checkpoint is None else checkpoint
        families = [
            layers for layers in self._families() if not self._codecs[layers[0]].config.data_free
        ]
        total, done = sum(map(len, families)), 0
        reconstructions = Reconstructions(self, source)
        for family in families:
            names = {key: f"{key[0]}.{key[1]}" for key in family}
            if all(name in checkpoint for name in names.values()):
                for key, name in names.items():
                    reconstructions.forget_before(key)
                    self._restore(key, checkpoint[name])
            else:
                self._fit_family(source, reconstructions, family, seed)
                for key, name in names.items():
                    codec = self._codecs[key]
                    checkpoint[name] = FittedStream(codec.state(), codec.health)
            done += len(family)
            if progress is not None:
                progress(done, total, names[family[-1]])
        self._moved.clear()
        self._folded.clear()
        self.fitted = True
        return self

    def _families(self) -> list[list[StreamKey]]:
        """Streams by the codebooks that they read: one each, but for those the model shares."""
        families: dict[StreamKey, list[StreamKey]] = {}
        for layer, stream in self._codecs:
            families.setdefault((self._home(layer, stream), stream), []).append((layer, stream))
        return list(families.values())

    def sources(self, layer: int, stream: Stream) -> list[StreamKey]:
        """The streams that a stream is predicted from, in its predictor's order."""
        place = self.geometry.compressed.index(layer)
        return [
            (self.geometry.compressed[place - back], source)
            for source, back in self._codecs[layer, stream].layout.sources
        ]

    def last_use(self, layer: int, stream: Stream) -> int | None:
        """The last layer with a stream that is predicted from this one; None if there is none."""
        return self._last_use.get((layer, stream))

    def _fit_family(
        self,
        source: StateSource,
        reconstructions: Reconstructions,
        family: list[StreamKey],
        seed: int,
    ) -> None:
        """Fit streams that share codebooks, these from an equal share of each one's tokens."""
        calibration = self.scheme.calibration
        share = -(-calibration.samples // len(family))
        vectors, weights = [], []
        for key in family:
            codec = self._codecs[key]
            reconstructions.forget_before(key)
            states = codec.fit_predictor(source.states(*key), reconstructions.of(key))
            kind, together = codec.metric, codec.coupled_heads
            codec.fit_space(
                states,
                None if kind is None else source.metric(*key, kind),
                None if together is None else source.across_heads(*key, together),
            )
            vectors.append(codec.training_vectors(states, share, seed))
            if calibration.weights != "none":
                squares = codec.training_weights(states, source.gradients(*key), share, seed)
                weights.append([square.pow(calibration.weight_power) for square in squares])
        first, *others = (self._codecs[key] for key in family)
        first.fit_quantizers(_by_segment(vectors), seed, _by_segment(weights))
        for codec in others:
            codec.quantizers = first.quantizers

    def _restore(self, key: StreamKey, fitted: FittedStream) -> None:
        """Take over what was fitted before."""
        codec, home = self._codecs[key], self._codecs[self._home(*key), key[1]]
        codec.load_state(fitted.tensors)
        codec.quantizers = home.quantizers
        codec.health = list(fitted.health)

    # -- coding ----------------------------------------------------------------------------

    def codec(self, layer: int, stream: Stream, device: torch.device | str = "cpu") -> Codec:
        """The codec of one stream, with its codebooks on `device`.

        Raises:
            NotFittedError: the scheme needs calibration and has had none.
            StateError: that layer is not compressed.
        """
        if not self.fitted:
            raise NotFittedError(
                f"scheme {self.scheme.name!r} learns from data: calibrate it first, or load an "
                "artefact"
            )
        if (layer, stream) not in self._codecs:
            raise StateError(
                f"{stream} of layer {layer} are not compressed, "
                f"those of layers {list(self.geometry.compressed)} are"
            )
        device = torch.device(device)
        if device.type == "cpu":
            return self._codecs[layer, stream]
        key = (layer, stream, device)
        if key not in self._moved:
            moved = self._codecs[layer, stream].to(device)
            home = self._home(layer, stream)
            if home != layer:
                moved.quantizers = self.codec(home, stream, device).quantizers
            self._moved[key] = moved
        return self._moved[key]

    def folded(self, layer: int, device: torch.device | str = "cpu") -> FoldedLayer | str:
        """What attention on a layer's codes takes, or the reason why that cannot be.

        Raises:
            NotFittedError, StateError: as `codec` does.
        """
        key = (layer, torch.device(device))
        if key not in self._folded:
            keys, values = (self.codec(layer, stream, device) for stream in STREAMS)
            try:
                self._folded[key] = fold(keys, values)
            except NotFoldable as reason:
                self._folded[key] = str(reason)
        return self._folded[key]

    def with_residency(
        self, *, sinks: int | None = None, window: int | None = None
    ) -> KVCompressor:
        """The same codecs with other sinks or another window; None leaves as it is."""
        changes = {"sinks": sinks, "window": window}
        residency = self.scheme.residency.model_copy(
            update={name: value for name, value in changes.items() if value is not None}
        )
        other = copy.copy(self)
        other.scheme = self.scheme.model_copy(update={"residency": residency})
        return other

    def with_codecs(self, replace: Callable[[Codec], Codec]) -> KVCompressor:
        """The same compressor with each codec replaced by `replace(codec)`."""
        other = copy.copy(self)
        other._codecs = {key: replace(codec) for key, codec in self._codecs.items()}
        other._moved, other._folded = {}, {}
        return other

    def draft(self, stages: int) -> KVCompressor:
        """The same compressor, reading the first `stages` stages of what it stores: `DraftCodec`.

        Raises:
            SchemeError: no code has more stages, some cannot be left out, or streams are predicted.
        """
        layouts = [codec.layout for codec in self._codecs.values()]
        most = max(segment.stages for layout in layouts for segment in layout.segments)
        if not 1 <= stages < most:
            raise SchemeError(
                f"{self.scheme.name}: a draft leaves out some of the {most} stages that codes "
                f"have, given {stages} to read"
            )
        return self.with_codecs(lambda codec: DraftCodec(codec, stages))

    def codecs(self) -> Iterator[tuple[tuple[int, Stream], Codec]]:
        """Every (layer, stream) with its codec, in model order, keys before values."""
        yield from self._codecs.items()

    def encode(
        self, layer: int, stream: Stream, x: torch.Tensor, sources: Sequence[torch.Tensor] = ()
    ) -> Encoded:
        """Code states `[B, H, T, D]` as `B·T` tokens, row by row.

        A predicted stream needs its `sources`: what `decode` gave for the streams that `sources`
        names, `[B, H, T, D]` each.

        Raises:
            StateError: another shape, NaN or infinity, or other sources than the predictor's.
        """
        codec = self.codec(layer, stream, x.device)
        return codec.encode(_tokens(x), [_tokens(source) for source in sources])

    def decode(
        self,
        layer: int,
        stream: Stream,
        encoded: Encoded,
        batch: int = 1,
        sources: Sequence[torch.Tensor] = (),
    ) -> torch.Tensor:
        """States `[B, H, T, D]` (fp32) of what `encode` returned, with the same `sources`."""
        codec = self.codec(layer, stream, encoded.codes.device)
        tokens = codec.decode(encoded, [_tokens(source) for source in sources])
        return rearrange(tokens, "(b t) h d -> b h t d", b=batch)

    def identity(self) -> str:
        """SHA-256 of the scheme and of every learned tensor: which codebooks codes belong to."""
        digest = hashlib.sha256(self.scheme.fingerprint().encode())
        for stream, name, tensor in self.tensors():
            digest.update(f"{stream}.{name}".encode())
            digest.update(tensor.cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()

    def new_cache(self, config: Any) -> VQCache:
        """An empty cache for a model with this transformers config.

        Raises:
            ArtefactError: the compressor is for another geometry.
        """
        from vqkv.cache import VQCache  # the cache stands above the compressor

        return VQCache(self, config)

    # -- figures ---------------------------------------------------------------------------

    @property
    def bits_per_value(self) -> float:
        """Stored bits over cached scalars, mean over the compressed streams."""
        layouts = [codec.layout for codec in self._codecs.values()]
        return sum(layout.bits_per_value for layout in layouts) / len(layouts)

    @property
    def bytes_per_token(self) -> int:
        """Stored bytes per coded token, over all compressed streams."""
        return sum(codec.layout.bytes_per_token for codec in self._codecs.values())

    def side_bytes(self) -> dict[str, int]:
        """Bytes that do not grow with tokens, by what they are of, and their sum."""
        kinds = {
            "segments": "codebooks",
            "transforms": "transforms",
            "predictor": "predictors",
            "order": "orders",
        }
        found = dict.fromkeys(kinds.values(), 0)
        for _, name, tensor in self.tensors():
            found[kinds[name.partition(".")[0]]] += tensor.nbytes
        return {**found, "total": sum(found.values())}

    def planned_side_bytes(self) -> int:
        """What `side_bytes` will come to, known before `fit`."""
        return sum(
            codec.planned_bytes(codebooks=self._home(layer, stream) == layer)
            for (layer, stream), codec in self._codecs.items()
        )

    def nbytes(self) -> int:
        """Side bytes in all."""
        return self.side_bytes()["total"]

    @property
    def values_per_token(self) -> int:
        """Scalars that a token has in all compressed streams."""
        return 2 * self.geometry.kv_heads * self.geometry.head_dim * len(self.geometry.compressed)

    @property
    def pre_rope(self) -> bool:
        """Some layer's keys are coded before RoPE, so the model has to be attached."""
        return any(codec.layout.rope == "pre" for codec in self._codecs.values())

    @property
    def position_bytes(self) -> int:
        """Bytes of a token's position, which a cache keeps where history has to be rotated.

        Rows with images that count along several axes keep as many positions a token.
        """
        return torch.int32.itemsize if self.pre_rope else 0

    def row_bytes(self, tokens: int) -> int:
        """Cache bytes of one row of `tokens` tokens: codes, exact sinks and tail, positions.

        Exact values count 16 bits, whatever type the model caches them in. Room that a cache
        keeps for tokens to come is left out.
        """
        residency = self.scheme.residency
        coded = coded_tokens(tokens, residency.window)
        exact = tokens - coded + min(residency.sinks, coded)
        return (
            self.bytes_per_token * coded
            + EXACT_BYTES * self.values_per_token * exact
            + self.position_bytes * tokens
        )

    def effective_bits_per_value(self, tokens: int) -> float:
        """Bits per value of one row's cache and the side bytes, at a length in tokens."""
        return 8 * (self.row_bytes(tokens) + self.nbytes()) / (tokens * self.values_per_token)

    def report(self) -> dict[str, Any]:
        """What it stores, stream by stream, and how well its codebooks came out."""
        return {
            "scheme": self.scheme.name,
            "fingerprint": self.scheme.fingerprint(),
            "bits_per_value": self.bits_per_value,
            "bytes_per_token": self.bytes_per_token,
            "side_bytes": self.side_bytes(),
            "health": self.health(),
            "streams": [
                {"layer": layer, "stream": stream, "bits_per_value": codec.layout.bits_per_value}
                for (layer, stream), codec in self._codecs.items()
            ],
        }

    def health(self) -> dict[str, Any]:
        """Codebook health over all streams: usage entropy, dead codewords, distance from the end.

        As learners left them, before distillation. `last_gain` is how much of its distortion a
        codebook's last iteration still took away, mean and most; None where no learner says.
        """
        stages = [h for codec in self._codecs.values() for h in codec.health]
        learned = [h for h in stages if h.inertia]
        if not learned:
            return {"codebooks": 0}
        entropies = [h.entropy for h in learned]
        gains = [h.last_gain for h in learned if h.last_gain is not None]
        return {
            "codebooks": len(learned),
            "entropy_mean": sum(entropies) / len(entropies),
            "entropy_min": min(entropies),
            "dead_before": sum(h.dead_before for h in learned),
            "dead_after": sum(h.dead_after for h in learned),
            "inertia": sum(h.inertia[-1] for h in learned) / len(learned),
            "last_gain_mean": sum(gains) / len(gains) if gains else None,
            "last_gain_max": max(gains, default=None),
        }

    # -- state and artefacts ---------------------------------------------------------------

    def tensors(self) -> Iterator[tuple[str, str, torch.Tensor]]:
        """All learned tensors, as (stream such as `"3.keys"`, name in the codec, tensor).

        Codebooks that the model shares come once, with the first layer.
        """
        if not self.fitted:
            return
        for (layer, stream), codec in self._codecs.items():
            home = self._home(layer, stream)
            for name, tensor in codec.state().items():
                if home == layer or not name.startswith("segments."):
                    yield f"{layer}.{stream}", name, tensor

    def load_tensors(
        self, tensors: dict[str, torch.Tensor], health: dict[str, list[Health]]
    ) -> Self:
        """Take over tensors named `"3.keys.segments.0.codewords"`, and health by `"3.keys"`.

        Raises:
            StateError: a name or shape does not fit the scheme and geometry.
        """
        rest = dict(tensors)
        for layer, stream in self._codecs:
            key = f"{layer}.{stream}"
            mine = take(rest, f"{key}.")
            home = self._home(layer, stream)
            if home != layer:
                shared = self._codecs[home, stream].state()
                mine |= {name: t for name, t in shared.items() if name.startswith("segments.")}
            self._restore((layer, stream), FittedStream(mine, health.get(key, [])))
        if rest:
            raise StateError(f"unknown tensors: {sorted(rest)[:5]}")
        self._moved.clear()
        self._folded.clear()
        self.fitted = True
        return self

    def _home(self, layer: int, stream: Stream) -> int:
        """The layer whose codec has this stream's codebooks: its own, or the first alike."""
        return self._homes[layer, stream]

    def save_pretrained(self, folder: str | Path, *, overwrite: bool = False) -> Path:
        """Write the artefact: `config.json` and `codebooks.safetensors`, all or nothing.

        Raises:
            NotFittedError: there is nothing to save yet.
            ArtefactError: the folder exists and `overwrite` is off.
        """
        from vqkv.artefact import save

        return save(self, Path(folder), overwrite=overwrite)

    @classmethod
    def from_pretrained(cls, name_or_folder: str | Path, config: Any = None) -> KVCompressor:
        """Load an artefact from a folder or the Hugging Face hub.

        Args:
            name_or_folder: a local folder, else a hub id.
            config: a model's transformers config; given, the artefact has to fit it.

        Raises:
            ArtefactError: missing, damaged, or made for another geometry, norm or RoPE.
        """
        from vqkv.artefact import load

        return load(name_or_folder, config)

    def push_to_hub(self, repo_id: str, *, private: bool = False) -> str:
        """Upload the artefact to the Hugging Face hub; returns the commit's address."""
        from vqkv.artefact import push

        return push(self, repo_id, private=private)

    def __repr__(self) -> str:
        state = "fitted" if self.fitted else "not fitted"
        return (
            f"KVCompressor({self.scheme.name!r}, {len(self.geometry.compressed)} layers, "
            f"{self.bits_per_value:g} bits per value, {state})"
        )


class Reconstructions:
    """What fitted streams decode to, for the streams that are predicted from them."""

    def __init__(self, compressor: KVCompressor, source: StateSource) -> None:
        self._compressor = compressor
        self._source = source
        self._kept: dict[StreamKey, States] = {}
        order = [key for key, _ in compressor.codecs()]
        #: The last stream, in model order, that each one is a source of.
        self._last_use = {used: key for key in order for used in compressor.sources(*key)}
        self._place = {key: place for place, key in enumerate(order)}

    def of(self, key: StreamKey) -> list[States]:
        """Reconstructions of the sources of a stream, all of which have been fitted."""
        return [self._of(used) for used in self._compressor.sources(*key)]

    def forget_before(self, key: StreamKey) -> None:
        """Let go of what neither this stream nor any after it is predicted from.

        What a later stream needs is computed first: it may depend on what goes.
        """
        for used in [u for u, last in self._last_use.items() if self._place[u] < self._place[key]]:
            if self._place[self._last_use[used]] >= self._place[key]:
                self._of(used)
        for used in list(self._kept):
            if self._place[self._last_use[used]] < self._place[key]:
                del self._kept[used]
                self._source.forget(*used)

    def _of(self, key: StreamKey) -> States:
        if key not in self._kept:
            layer, stream = key
            codec = self._compressor._codecs[key]
            states = self._source.states(layer, stream)
            sources = self.of(key)

            decoded = States(states.tokens, lambda: states.beside(sources, codec.there_and_back))
            self._kept[key] = self._source.kept(layer, stream, decoded)
        return self._kept[key]


def _stream_config(scheme: Scheme, geometry: Geometry, place: int, stream: Stream) -> StreamConfig:
    """Of a compressed layer. Without RoPE keys are after it what they are before it."""
    config = scheme.stream(place, stream, len(geometry.compressed))
    if geometry.rope is None and isinstance(config, KeysConfig):
        return config.model_copy(update={"rope": "post"})
    return config


def _check_samples(codec: Codec, scheme: Scheme) -> None:
    """Refuse codebooks that the scheme's calibration cannot fill. Raises SchemeError."""
    if codec.config.data_free:
        return
    for segment, config in zip(codec.layout.segments, codec.config.all_segments, strict=True):
        vectors = scheme.calibration.samples * segment.subvectors // segment.books
        check_samples(config.quantizer, vectors, f"{scheme.name}: {codec.where}")


def _by_segment(streams: list[list[torch.Tensor]]) -> list[torch.Tensor]:
    """Of several streams, what belongs to each segment together."""
    return [torch.cat(segment) for segment in zip(*streams, strict=True)]


def _tokens(states: torch.Tensor) -> torch.Tensor:
    """States `[B, H, T, D]` as tokens `[B·T, H, D]`, row by row."""
    return rearrange(states, "b h t d -> (b t) h d")
