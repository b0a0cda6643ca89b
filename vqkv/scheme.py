"""Schemes: the config of everything that turns a model's cache into codes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from vqkv.codebooks.gaussian import gaussian_grid
from vqkv.errors import SchemeError, StateError
from vqkv.groupings import Contiguous, GroupingChoice, RopePairs, Strided, Whole
from vqkv.layouts import ACROSS_LAYERS, Rope, Sharing, Stream
from vqkv.predictors import PREDICTORS, PredictorChoice, PredictorConfig
from vqkv.predictors.copy import CopyConfig
from vqkv.quantizers import QUANTIZERS, QuantizerChoice, QuantizerConfig
from vqkv.quantizers.codebook import CodebookQuantizer
from vqkv.registry import Config
from vqkv.transforms import TRANSFORMS, Metric, TransformChoice
from vqkv.transforms.pair_metric import PairMetricConfig
from vqkv.transforms.spectral import SpectralConfig

if TYPE_CHECKING:
    from vqkv.geometry import Geometry  # imports transformers, which a scheme can do without

STREAMS: tuple[Stream, ...] = ("keys", "values")


class SegmentConfig(Config):
    """A part of each head's channels, in the grouping's order, with a quantizer of its own."""

    share: float = Field(gt=0, le=1, description="Part of each head's channels, in order.")
    dim: int | None = Field(
        default=None, ge=1, description="Subvector dim; the grouping's if left out."
    )
    quantizer: QuantizerChoice


class StreamConfig(Config):
    """How one stream is coded: prediction, transforms, grouping, then quantizer."""

    predictor: PredictorChoice | None = Field(
        default=None, description="Subtracts what streams decoded earlier tell."
    )
    transforms: tuple[TransformChoice, ...] = ()
    grouping: GroupingChoice
    sharing: Sharing = Field(
        default="group",
        description="Which subvectors read one codebook: each its own, or all of a head, a layer, "
        "or the model; `subspace`: those in the same place of every head of the model.",
    )
    quantizer: QuantizerChoice | None = None
    segments: tuple[SegmentConfig, ...] = ()

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if (self.quantizer is None) == (not self.segments):
            given = "neither" if self.quantizer is None else "both"
            raise ValueError(
                f"give either `quantizer`, for all channels, or `segments`; given {given}"
            )
        total = sum(segment.share for segment in self.all_segments)
        if abs(total - 1) > 1e-6:
            raise ValueError(f"the shares of all segments add up to 1, given {total:g}")
        if not self.grouping.head_local and self.sharing in ("head", "subspace"):
            raise ValueError(
                f"sharing {self.sharing!r} needs groups within heads; {self.grouping.type} groups "
                "cross them: use 'group', 'layer' or 'model'"
            )
        self._check_metrics()
        self._check_pairs()
        self._check_coupling()
        dims = {self.dim_of(segment) for segment in self.segments}
        if isinstance(self.grouping, Strided) and dims - {self.grouping.dim}:
            raise ValueError(
                f"strided groups have one dim, {self.grouping.dim}; segments give {sorted(dims)}"
            )
        for segment in self.all_segments:
            _check_learner(segment.quantizer, self.dim_of(segment))
            if self.sharing in ("layer", "model"):
                check_runs(segment.quantizer, books=1)
        return self

    @field_validator("predictor")
    @classmethod
    def _from_streams_before(cls, predictor: PredictorConfig | None) -> PredictorConfig | None:
        sources = predictor.sources if predictor else ()
        for index, source in enumerate(sources):
            if source.back == 0 and source.stream == "values":
                raise ValueError(
                    f"sources.{index}: values with `back` 0, a layer's own values, are coded last "
                    "and predict nothing in it; give `back` of at least 1, or for values "
                    "`{stream: keys, back: 0}`"
                )
        if len(set(sources)) < len(sources):
            raise ValueError("sources: each stream is named once")
        return predictor

    def _check_pairs(self) -> None:
        """Codewords that commute with RoPE need keys that it has not turned, pairs side by side."""
        wanting = [s.quantizer.type for s in self.all_segments if s.quantizer.needs_rope_pairs]  # type: ignore[attr-defined]
        if not wanting:
            return
        if not isinstance(self, KeysConfig) or self.rope != "pre":
            given = "post-RoPE keys" if isinstance(self, KeysConfig) else "values"
            raise ValueError(
                f"quantizer: {wanting[0]!r} codes keys before RoPE turns them (rope: pre), "
                f"given {given}"
            )
        paired = isinstance(self.grouping, RopePairs) or (
            isinstance(self.grouping, Whole) and self.grouping.scope == "pairs"
        )
        if not paired:
            raise ValueError(
                f"grouping: {wanting[0]!r} needs RoPE pairs side by side: use "
                "{type: whole, scope: pairs} or {type: rope_pairs}, given "
                f"{self.grouping.type!r}"
            )

    def _check_metrics(self) -> None:
        """A metric is of the stream as it is, so nothing may have bent its space before."""
        own: Metric = "query" if isinstance(self, KeysConfig) else "output"
        for index, config in enumerate(self.transforms):
            metric = TRANSFORMS.build(config).metric
            if metric is None:
                continue
            if metric not in (own, "fisher"):
                raise ValueError(
                    f"transforms.{index}: the metric of {'keys' if own == 'query' else 'values'} "
                    f"is {own!r} or 'fisher', given {metric!r}"
                )
            for before in self.transforms[:index]:
                if not TRANSFORMS.get(before.type).keeps_metric:
                    raise ValueError(
                        f"transforms.{index}: a transform in the {metric!r} metric cannot follow "
                        f"{before.type!r}, which changes the space: put it first"
                    )

    def _check_coupling(self) -> None:
        """Codes are chosen together in a metric whose blocks a transform has made unit ones."""
        last = self.transforms[-1] if self.transforms else None
        plain = self.sharing == "group" and not self.segments
        groups_apart = (
            isinstance(last, PairMetricConfig)
            and isinstance(self.grouping, Contiguous)
            and self.grouping.dim == last.dim
            and all(s.quantizer.bits() == last.code_bits for s in self.all_segments)
        )
        heads_apart = (
            isinstance(last, SpectralConfig)
            and len(self.transforms) == 1
            and (last.metric, last.scope) == ("fisher", "head")
            and self.grouping.head_local
        )
        for segment in self.all_segments:
            couples = segment.quantizer.couples
            if couples == "groups" and not (plain and groups_apart):
                needed = (
                    "groups that are apart in a metric: a last transform {type: pair_metric, "
                    "dim: d, code_bits: b}, the grouping {type: contiguous, dim: d} of the same d, "
                    "codes of b bits"
                )
            elif couples == "heads" and not (plain and heads_apart):
                needed = (
                    "heads in which errors cost their squares: one transform {type: spectral, "
                    "metric: fisher}, a grouping within heads"
                )
            else:
                continue
            kind = segment.quantizer.type  # type: ignore[attr-defined]
            raise ValueError(
                f"quantizer: {kind!r} needs {needed}, sharing 'group', and no segments"
            )

    def dim_of(self, segment: SegmentConfig) -> int:
        """d: channels of a subvector in one of the segments."""
        return segment.dim or self.grouping.dim

    @property
    def all_segments(self) -> tuple[SegmentConfig, ...]:
        """The segments, where a single quantizer is one segment of all channels."""
        if self.quantizer is not None:
            return (SegmentConfig(share=1.0, quantizer=self.quantizer),)
        return self.segments

    @property
    def data_free(self) -> bool:
        """No part of it learns from data."""
        return (
            (self.predictor is None or not PREDICTORS.get(self.predictor.type).needs_data)
            and not self.grouping.needs_data
            and not any(TRANSFORMS.get(t.type).needs_data for t in self.transforms)
            and all(segment.quantizer.data_free for segment in self.all_segments)
        )


class KeysConfig(StreamConfig):
    """How keys are coded, and whether before or after RoPE turns them."""

    rope: Rope = Field(description="Code keys before (pre) or after (post) rotary embedding.")

    @field_validator("predictor")
    @classmethod
    def _from_earlier_layers(cls, predictor: PredictorConfig | None) -> PredictorConfig | None:
        for index, source in enumerate(predictor.sources if predictor else ()):
            if source.back == 0:
                raise ValueError(
                    f"sources.{index}: keys are decoded before this layer's {source.stream}, so "
                    "they are predicted from layers before: `back` is at least 1, given 0"
                )
        return predictor


class Residency(Config):
    """Which tokens stay exact: the first `sinks` of each row and the latest `window` or more.

    One rule for all layers, so that a stream and those it is predicted from code the same tokens.
    """

    sinks: int = Field(default=4, ge=0)
    window: int = Field(default=128, ge=0)


class DistillationConfig(Config):
    """Codewords go on to follow the gradient of what the model makes of them.

    The loss is the KL divergence of the model's predictions from the exact model's where each
    state is read as its reconstruction. One step of Adam per window of the calibration text.
    """

    passes: int = Field(default=2, ge=1, description="Over the calibration text.")
    step: float = Field(
        default=0.04,
        gt=0,
        le=1,
        description="Of a codeword's channel, in rms errors of its stream; falls to 0 by the end.",
    )


class CalibrationConfig(Config):
    """What learners see: at most `samples` tokens, drawn at random. Statistics use all tokens.

    With `fisher` weights a subvector counts as much as the squared gradient of the model's loss by
    it (CQ, arXiv 2405.03917, section 3.3), from a backward pass over the calibration text. A few
    subvectors then carry most of the weight, on other text others would: a `weight_power` below 1
    lets them count less.
    """

    samples: int = Field(default=32768, ge=1)
    weights: Literal["none", "fisher"] = "none"
    weight_power: float = Field(
        default=1.0, gt=0, le=1, description="That squared gradients are raised to."
    )
    distillation: DistillationConfig | None = None

    @model_validator(mode="after")
    def _check_power(self) -> CalibrationConfig:
        if self.weights == "none" and self.weight_power != 1:
            raise ValueError(
                "`weight_power` is of `weights`, which are none: `weights: fisher`, or "
                "`weight_power: 1`"
            )
        return self


class LayerOverride(Config):
    """Other settings for some layers; what is left out stays as in the scheme."""

    layers: tuple[int, ...] = Field(
        min_length=1,
        description="Indices among a model's compressed layers, those with full attention; -1 is "
        "the last.",
    )
    keys: KeysConfig | None = None
    values: StreamConfig | None = None


class Scheme(Config):
    """A whole scheme. Frozen; what a scheme file holds once `extends` is resolved."""

    schema_version: Literal[1] = 1
    name: str = Field(min_length=1)
    description: str = ""
    keys: KeysConfig
    values: StreamConfig
    residency: Residency = Residency()
    calibration: CalibrationConfig = CalibrationConfig()
    layers: tuple[LayerOverride, ...] = ()

    @model_validator(mode="before")
    @classmethod
    def _complete_overrides(cls, given: Any) -> Any:
        """Merge each layer override onto the scheme's own streams, so it says just what differs."""
        if not isinstance(given, Mapping) or not isinstance(given.get("layers"), list | tuple):
            return given
        completed = [
            {
                **override,
                **{
                    stream: merge(given[stream], override[stream])
                    for stream in STREAMS
                    if isinstance(override.get(stream), Mapping)
                    and isinstance(given.get(stream), Mapping)
                },
            }
            if isinstance(override, Mapping)
            else override
            for override in given["layers"]
        ]
        return {**given, "layers": completed}

    @field_validator("layers")
    @classmethod
    def _once(cls, layers: tuple[LayerOverride, ...]) -> tuple[LayerOverride, ...]:
        named = [layer for override in layers for layer in override.layers]
        twice = sorted({layer for layer in named if named.count(layer) > 1})
        if twice:
            raise ValueError(f"each layer is overridden once; given twice: {twice}")
        return layers

    @model_validator(mode="after")
    def _first_layer_needs_no_other(self) -> Self:
        named = [override for override in self.layers if 0 in override.layers]
        for stream in STREAMS:
            overrides = (getattr(override, stream) for override in named)
            config = next((c for c in overrides if c is not None), getattr(self, stream))
            if config.predictor and any(source.back for source in config.predictor.sources):
                raise ValueError(
                    f"{stream}.predictor: nothing comes before layer 0: add an override such as "
                    f"`layers: [{{layers: [0], {stream}: {{predictor: null}}}}]`"
                )
        return self

    @model_validator(mode="after")
    def _overrides_differ(self) -> Self:
        for index, override in enumerate(self.layers):
            if override.keys in (None, self.keys) and override.values in (None, self.values):
                raise ValueError(
                    f"layers.{index}: changes nothing for layers {list(override.layers)}: say "
                    "under `keys` or `values` what differs, or leave it out"
                )
        return self

    @model_validator(mode="after")
    def _samples_fill_codebooks(self) -> Self:
        """Subvectors that share no codebook bring one sample each per token."""
        for path, config in self._named_streams():
            if config.sharing == "group" and not config.data_free:
                for segment in config.all_segments:
                    check_samples(segment.quantizer, self.calibration.samples, path)
        return self

    @model_validator(mode="after")
    def _runs_of_tokens(self) -> Self:
        for config in self._streams():
            transforms = [TRANSFORMS.build(t).token_group for t in config.transforms]
            quantizers = [segment.quantizer.token_group for segment in config.all_segments]
            if max(transforms, default=1) > 1 and not config.data_free:
                raise ValueError(
                    "transforms over runs of tokens are for streams that learn nothing: windows of "
                    "calibration text do not end with a run; leave out what learns"
                )
            if max(quantizers) > 1 and config.sharing != "group":
                raise ValueError(
                    f"sharing: a quantizer over runs of tokens codes each subvector by itself, "
                    f"which is 'group', given {config.sharing!r}"
                )
            if max([*transforms, *quantizers]) > 1 and self.residency.window == 0:
                raise ValueError(
                    "residency.window: runs of tokens need a window in which a run is exact until "
                    "it is whole, given 0"
                )
        return self

    @model_validator(mode="after")
    def _has_codewords_to_distil(self) -> Self:
        if self.calibration.distillation:
            _check_codewords(self._streams(), "calibration.distillation")
        return self

    @model_validator(mode="after")
    def _one_way_to_fit(self) -> Self:
        predicted = any(config.predictor for config in self._streams())
        across = {config.sharing for config in self._streams()} & set(ACROSS_LAYERS)
        if predicted and across:
            raise ValueError(
                f"sharing {min(across)!r} fits all layers together, predictors fit them one after "
                "another: share codebooks by 'group', 'head' or 'layer'"
            )
        return self

    @property
    def data_free(self) -> bool:
        """Usable without calibration."""
        return all(config.data_free for config in self._streams())

    def stream(self, place: int, stream: Stream, count: int) -> StreamConfig:
        """The config of one stream of the compressed layer at `place` among `count`."""
        for override in self.layers:
            config = getattr(override, stream)
            if config is not None and place in (i % count for i in override.layers):
                chosen: StreamConfig = config
                return chosen
        return self.keys if stream == "keys" else self.values

    def check(self, geometry: Geometry) -> None:
        """Refuse a model that the scheme cannot code. Raises SchemeError with the path in it."""
        count = len(geometry.compressed)
        named = [place for override in self.layers for place in override.layers]
        outside = [place for place in named if not -count <= place < count]
        if outside:
            raise SchemeError(
                f"{self.name}: layers: {outside} are not in a model of {count} compressed layers "
                f"(0 to {count - 1}, or -{count} to -1)"
            )
        for place, layer in enumerate(geometry.compressed):
            for stream in STREAMS:
                self._check_sources(place, layer, stream, geometry)
        self._check_distillation(geometry)
        meant = [place % count for place in named]
        twice = sorted({place for place in meant if meant.count(place) > 1})
        if twice:
            raise SchemeError(
                f"{self.name}: layers: each layer is overridden once; {named} name {twice} twice "
                f"in a model of {count} compressed layers"
            )

    def _check_distillation(self, geometry: Geometry) -> None:
        """Some layer of this very model has codewords to distil."""
        if self.calibration.distillation:
            count = len(geometry.compressed)
            used = (self.stream(p, stream, count) for p in range(count) for stream in STREAMS)
            _check_codewords(used, f"{self.name}: calibration.distillation")

    def _check_sources(self, place: int, layer: int, stream: Stream, geometry: Geometry) -> None:
        """The sources of the compressed layer at `place` exist."""
        count = len(geometry.compressed)
        config = self.stream(place, stream, count)
        for source in config.predictor.sources if config.predictor else ():
            if source.back > place:
                raise SchemeError(
                    f"{self.name}: {stream} of layer {layer}: predictor: needs {source.stream} "
                    f"{source.back} compressed layers back, but only {place} come before; override "
                    "this layer with `predictor: null` or nearer sources"
                )
            origin = geometry.compressed[place - source.back]
            before = self.stream(place - source.back, source.stream, count)
            both_keys = isinstance(config, KeysConfig) and isinstance(before, KeysConfig)
            alike = both_keys or isinstance(config.predictor, CopyConfig)
            if alike and _rotated(config) != _rotated(before):
                raise SchemeError(
                    f"{self.name}: {stream} of layer {layer}: predictor: they are coded "
                    f"{_rope_side(config)}, the {source.stream} of layer {origin} "
                    f"{_rope_side(before)}, and rotation differs from token to token: code both on "
                    "the same side"
                )

    def to_dict(self) -> dict[str, Any]:
        """As plain values; `Scheme.model_validate` takes them back."""
        return self.model_dump(mode="json")

    def fingerprint(self) -> str:
        """SHA-256 of what decides results: everything but the name and the description."""
        return fingerprint(self.to_dict())

    def _streams(self) -> list[StreamConfig]:
        return [config for _, config in self._named_streams()]

    def _named_streams(self) -> Iterator[tuple[str, StreamConfig]]:
        """Every stream config with its path in the file."""
        yield "keys", self.keys
        yield "values", self.values
        for index, override in enumerate(self.layers):
            for stream in STREAMS:
                config = getattr(override, stream)
                if config is not None:
                    yield f"layers.{index}.{stream}", config


def fingerprint(scheme: Mapping[str, Any]) -> str:
    """The fingerprint of a resolved scheme in plain values, as an artefact stores it."""
    decisive = {k: v for k, v in scheme.items() if k not in ("name", "description")}
    canonical = json.dumps(decisive, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()


def _rotated(config: StreamConfig) -> bool:
    """What is coded has been turned by RoPE."""
    return isinstance(config, KeysConfig) and config.rope == "post"


def _rope_side(config: StreamConfig) -> str:
    """For messages; values are never turned."""
    return f"{config.rope}-RoPE" if isinstance(config, KeysConfig) else "without RoPE"


def _check_learner(quantizer: QuantizerConfig, dim: int) -> None:
    """Refuse learners whose codewords are not of the quantizer's shape. Raises ValueError."""
    for nested in learners_of(quantizer):
        stages = getattr(nested, "stages", 1)
        if stages != 1:
            raise ValueError(
                f"quantizer.learner: codewords of one stage are needed, given {stages} stages: "
                f"use {{type: residual, depth: {stages}}} as the quantizer"
            )
        if getattr(nested, "type", None) == "uniform" and dim != 1:
            raise ValueError(f"the uniform learner is scalar: set grouping.dim to 1, given {dim}")
        if getattr(nested, "type", None) == "gaussian":
            try:
                gaussian_grid(dim, 2 ** quantizer.bits())
            except StateError as error:
                raise ValueError(f"quantizer.learner: {error}") from error


def check_samples(quantizer: QuantizerConfig, samples: int, where: str) -> None:
    """Refuse a codebook of more codewords than the `samples` vectors that it would learn from.

    Raises:
        SchemeError: `calibration.samples` is too few for it; begins with `where`.
    """
    codewords = 1 << quantizer.bits()
    learns = next(learners_of(quantizer), None) is not None
    if samples < quantizer.least_samples():
        raise SchemeError(
            f"{where}: {quantizer.type} learns from {quantizer.least_samples()} vectors or more, "  # type: ignore[attr-defined]
            f"but `calibration.samples` gives it {samples}: raise it"
        )
    if learns and samples < codewords:
        raise SchemeError(
            f"{where}: a codebook of {quantizer.bits()} bits has {codewords} codewords and needs "
            f"as many samples, but `calibration.samples` gives it {samples}: raise it, lower "
            "code_bits, or share codebooks"
        )


def check_runs(config: Config, books: int) -> None:
    """Refuse learners side by side that cannot share `books` codebooks equally.

    Raises:
        SchemeError: their number does not divide that of the codebooks.
    """
    side_by_side = getattr(config, "learners", ())
    if side_by_side and books % len(side_by_side):
        raise SchemeError(
            f"quantizer.learner: {len(side_by_side)} learners side by side share the codebooks "
            f"equally, which are {books} here: name as many learners as divide that, or change "
            "`sharing`"
        )
    for learner in (getattr(config, "learner", None), *side_by_side):
        if learner is not None:
            check_runs(learner, books // max(1, len(side_by_side)))


def _check_codewords(configs: Iterable[StreamConfig], where: str) -> None:
    """Raises SchemeError, which begins with `where`, if no stream has codewords to distil."""
    used = [segment.quantizer for config in configs for segment in config.all_segments]
    if not any(map(learns_codewords, used)):
        found = sorted({quantizer.type for quantizer in used})  # type: ignore[attr-defined]
        raise SchemeError(
            f"{where}: moves learned codewords, which product, residual, joint_product and "
            f"joint_heads quantizers have; given {', '.join(found)}"
        )


def learns_codewords(quantizer: QuantizerConfig) -> bool:
    """Whether it fits `CodebookQuantizer.codewords_`, which distillation can move on."""
    kind = QUANTIZERS.get(quantizer.type)  # type: ignore[attr-defined]
    return issubclass(kind, CodebookQuantizer) and not quantizer.data_free


def learners_of(config: Config) -> Iterator[Config]:
    """The configs of a quantizer's learner and of those that it repeats or sets side by side."""
    for learner in (getattr(config, "learner", None), *getattr(config, "learners", ())):
        if learner is not None:
            yield learner
            yield from learners_of(learner)


def merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """`over` onto `base`, block by block; a block whose `type` changes is replaced whole."""
    if "type" in over and "type" in base and over["type"] != base["type"]:
        return dict(over)
    merged = dict(base)
    for key, value in over.items():
        if isinstance(value, Mapping) and isinstance(merged.get(key), Mapping):
            merged[key] = merge(merged[key], value)
        else:
            merged[key] = value
    # A stream has either a quantizer or segments: naming one drops the other.
    for named, dropped in (("quantizer", "segments"), ("segments", "quantizer")):
        if over.get(named) and not over.get(dropped):
            merged.pop(dropped, None)
    return merged
