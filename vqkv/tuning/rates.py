"""Product codes at many rates, and schemes whose streams each have one of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from vqkv.compressor import StreamKey
from vqkv.errors import SchemeError
from vqkv.geometry import Geometry
from vqkv.layouts import Stream
from vqkv.scheme import STREAMS, Scheme, merge
from vqkv.scheme_files import scheme_from_dict

#: A stream's settings in plain values.
Plain = dict[str, Any]


class Step(NamedTuple):
    """A product code: subvectors of `dim` channels, `code_bits` each."""

    dim: int
    code_bits: int

    @property
    def rate(self) -> float:
        """Bits per value."""
        return self.code_bits / self.dim


def ladder(dims: tuple[int, ...], code_bits: tuple[int, ...]) -> tuple[Step, ...]:
    """Steps of rising rate; of those of one rate the one of most dims, which codes best."""
    best: dict[float, Step] = {}
    for dim in sorted(dims):
        for bits in code_bits:
            best[bits / dim] = Step(dim, bits)
    return tuple(best[rate] for rate in sorted(best))


def whole_bytes(steps: tuple[Step, ...], head_dim: int) -> tuple[Step, ...]:
    """Steps at which a head's codes fill whole bytes, so that none are paid for and unused."""
    return tuple(
        step
        for step in steps
        if head_dim % step.dim == 0 and head_dim // step.dim * step.code_bits % 8 == 0
    )


def with_steps(
    scheme: Scheme, name: str, steps: Mapping[StreamKey, Step], geometry: Geometry
) -> Scheme:
    """The scheme with a step of its own for each stream.

    What most layers have becomes the scheme's own; the others are overrides, alike ones together.

    Raises:
        SchemeError: a stream is not coded by one product quantizer.
    """

    def stepped(layer: int, stream: Stream) -> Plain:
        return _stepped(scheme, layer, stream, steps[layer, stream], geometry.layers)

    layers = geometry.compressed
    usual: dict[Stream, Plain] = {
        s: _commonest([stepped(layer, s) for layer in layers]) for s in STREAMS
    }
    overrides: list[dict[str, Any]] = []
    for layer in layers:
        found: dict[Stream, Plain] = {s: stepped(layer, s) for s in STREAMS}
        own = {str(s): config for s, config in found.items() if config != usual[s]}
        if not own:
            continue
        for override in overrides:
            if {key: value for key, value in override.items() if key != "layers"} == own:
                override["layers"].append(layer)
                break
        else:
            overrides.append({"layers": [layer], **own})
    named: Plain = {str(stream): config for stream, config in usual.items()}
    plain = {**scheme.to_dict(), "name": name, **named, "layers": overrides}
    return scheme_from_dict(plain, name)


def _stepped(scheme: Scheme, layer: int, stream: Stream, step: Step, layers: int) -> Plain:
    plain: Plain = scheme.stream(layer, stream, layers).model_dump(mode="json")
    quantizer = plain["quantizer"] or {"type": "segments"}
    if quantizer["type"] not in ("product", "joint_product"):
        raise SchemeError(
            f"{scheme.name}: {stream} of layer {layer}: rates are those of one product quantizer "
            f"for all channels, given {quantizer['type']}"
        )
    changed = merge(
        plain, {"grouping": {"dim": step.dim}, "quantizer": {"code_bits": step.code_bits}}
    )
    # Transforms that work group by group follow the groups.
    changed["transforms"] = [
        {**each, "dim": step.dim} if "dim" in each else each for each in changed["transforms"]
    ]
    return changed


def _commonest(configs: list[Plain]) -> Plain:
    return max(configs, key=configs.count)
