"""Codes at many rates, and schemes whose streams each have one of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from vqkv.compressor import StreamKey
from vqkv.errors import SchemeError
from vqkv.geometry import Geometry
from vqkv.layouts import Stream
from vqkv.scheme import STREAMS, Scheme, StreamConfig, merge
from vqkv.scheme_files import scheme_from_dict

#: A stream's settings in plain values.
Plain = dict[str, Any]


class ProductStep(NamedTuple):
    """A product code: subvectors of `dim` channels, `code_bits` each."""

    dim: int
    code_bits: int

    @property
    def kind(self) -> str:
        """The quantizer that it is a step of."""
        return "product"

    @property
    def rate(self) -> float:
        """Bits per value."""
        return self.code_bits / self.dim

    def whole(self, head_dim: int) -> bool:
        """Whether a head's codes fill whole bytes, so that none are paid for and unused."""
        return head_dim % self.dim == 0 and head_dim // self.dim * self.code_bits % 8 == 0

    def apply(self, stream: Plain) -> Plain | None:
        """The stream with this step; None where it has another kind of code."""
        if _quantizer(stream) not in ("product", "joint_heads", "joint_product"):
            return None
        changes = {"grouping": {"dim": self.dim}, "quantizer": {"code_bits": self.code_bits}}
        changed = merge(stream, changes)
        # Transforms that work group by group follow the groups.
        follow = {"dim": self.dim, "code_bits": self.code_bits}
        changed["transforms"] = [
            {name: follow.get(name, value) for name, value in each.items()}
            for each in changed["transforms"]
        ]
        return changed


class TrellisStep(NamedTuple):
    """A trellis code of so many bits per value."""

    rate: float

    @property
    def kind(self) -> str:
        """The quantizer that it is a step of."""
        return "trellis"

    def whole(self, head_dim: int) -> bool:
        """Whether a head's share of the bits is whole bytes."""
        return self.rate * head_dim % 8 == 0

    def apply(self, stream: Plain) -> Plain | None:
        """The stream with this step; None where it has another kind of code."""
        if _quantizer(stream) != "trellis":
            return None
        return merge(stream, {"quantizer": {"rate": self.rate}})


Step = ProductStep | TrellisStep


def ladder(dims: tuple[int, ...], code_bits: tuple[int, ...]) -> tuple[ProductStep, ...]:
    """Steps of rising rate; of those of one rate the one of most dims, which codes best."""
    best: dict[float, ProductStep] = {}
    for dim in sorted(dims):
        for bits in code_bits:
            best[bits / dim] = ProductStep(dim, bits)
    return tuple(best[rate] for rate in sorted(best))


def eighths(low: float, high: float) -> tuple[TrellisStep, ...]:
    """Trellis codes of rates an eighth of a bit apart."""
    return tuple(TrellisStep(n / 8) for n in range(round(8 * low), round(8 * high) + 1))


def whole_bytes(steps: Sequence[Step], head_dim: int) -> tuple[Step, ...]:
    """Steps whose codes of a head fill whole bytes."""
    return tuple(step for step in steps if step.whole(head_dim))


def with_steps(
    scheme: Scheme, name: str, steps: Mapping[StreamKey, Step], geometry: Geometry
) -> Scheme:
    """The scheme with a step of its own for each stream of a model.

    What most layers have becomes the scheme's own; the others are overrides, alike ones together.
    Sources of predictors that lie before the model's first compressed layer are left out.

    Raises:
        SchemeError: a stream is not coded by one quantizer of the steps' kind.
    """

    def stepped(place: int, stream: Stream) -> Plain:
        config, layer = scheme.stream(place, stream, len(layers)), layers[place]
        where = f"{scheme.name}: {stream} of layer {layer}"
        return _stepped(config, place, steps[layer, stream], where)

    layers = geometry.compressed
    places = range(len(layers))
    usual: dict[Stream, Plain] = {
        s: _commonest([stepped(place, s) for place in places]) for s in STREAMS
    }
    overrides: list[dict[str, Any]] = []
    for place in places:
        found: dict[Stream, Plain] = {s: stepped(place, s) for s in STREAMS}
        own = {str(s): config for s, config in found.items() if config != usual[s]}
        if not own:
            continue
        for override in overrides:
            if {key: value for key, value in override.items() if key != "layers"} == own:
                override["layers"].append(place)
                break
        else:
            overrides.append({"layers": [place], **own})
    named: Plain = {str(stream): config for stream, config in usual.items()}
    bits = sum(step.rate for step in steps.values()) / len(steps)
    told = {"name": name, "description": f"{scheme.name} at {bits:.4g} bits per value."}
    plain = {**scheme.to_dict(), **told, **named, "layers": overrides}
    return scheme_from_dict(plain, name)


def _stepped(config: StreamConfig, place: int, step: Step, where: str) -> Plain:
    """`place` counts compressed layers."""
    plain: Plain = config.model_dump(mode="json")
    predictor = plain["predictor"]
    if predictor is not None:
        sources = [source for source in predictor["sources"] if source["back"] <= place]
        plain["predictor"] = {**predictor, "sources": sources} if sources else None
    changed = step.apply(plain)
    if changed is None:
        raise SchemeError(
            f"{where}: rates of a {step.kind} quantizer for all channels do not fit "
            f"{_quantizer(plain)}"
        )
    return changed


def _quantizer(stream: Plain) -> str:
    kind: str = (stream["quantizer"] or {"type": "segments"})["type"]
    return kind


def _commonest(configs: list[Plain]) -> Plain:
    return max(configs, key=configs.count)
