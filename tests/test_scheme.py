from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

from tests.conftest import make_geometry
from vqkv.compressor import KVCompressor
from vqkv.errors import SchemeError
from vqkv.geometry import Geometry
from vqkv.scheme import Scheme, fingerprint, merge
from vqkv.scheme_files import load_scheme, scheme_from_dict

Plain = dict[str, Any]


def plain(**changes: Any) -> Plain:
    """A scheme in plain values; `keys__grouping__dim=8` changes one field, `...=None` drops it."""
    learner = {"type": "kmeans", "iterations": 20}
    stream = {
        "grouping": {"type": "contiguous", "dim": 4},
        "quantizer": {"type": "product", "code_bits": 8, "learner": learner},
    }
    data: Plain = json.loads(
        json.dumps({"name": "test", "keys": {"rope": "pre", **stream}, "values": stream})
    )
    for path, value in changes.items():
        *blocks, last = path.split("__")
        block = data
        for name in blocks:
            block = block.setdefault(name, {})
        if value is None:
            block.pop(last)
        else:
            block[last] = value
    return data


def scheme(**changes: Any) -> Any:
    # Any, as a quantizer's own fields are only known to its class.
    return scheme_from_dict(plain(**changes))


def refused(**changes: Any) -> str:
    with pytest.raises(SchemeError) as error:
        scheme_from_dict(plain(**changes), "team.yaml")
    return str(error.value)


PRODUCT = {"type": "product", "code_bits": 2}
FEWER_BITS = {"layers": [0], "values": {"quantizer": {"code_bits": 3}}}


# -- what is refused, and in which words -------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"keys__quantizer__code_bit": 8},
            "team.yaml: keys.quantizer.code_bit: unknown field (given 8). "
            "Did you mean 'code_bits'? Known: code_bits, learner, type.",
        ),
        (
            {"keys__quantizer__learner__iteration": 3},
            "team.yaml: keys.quantizer.learner.iteration: unknown field (given 3). "
            "Did you mean 'iterations'? Known: backend, init, iterations,",
        ),
        (
            {"value": {}},
            "team.yaml: value: unknown field (given {}). Did you mean 'values'?",
        ),
        (
            {"values__grouping__type": "contigous"},
            "team.yaml: values.grouping: no grouping is called 'contigous'. "
            "Did you mean 'contiguous'? Known: across_heads, contiguous, energy_balanced, ",
        ),
        (
            {"values__transforms": [{"type": "center"}, {"type": "token_scale", "stat": "mean"}]},
            "team.yaml: values.transforms.1.stat: Input should be 'std', 'rms', 'l2' or 'minmax' "
            "(given 'mean')",
        ),
        (
            {"keys__quantizer__code_bits": 17},
            "team.yaml: keys.quantizer.code_bits: Input should be less than or equal to 16 "
            "(given 17)",
        ),
        (
            {"keys__quantizer__code_bits": -1},
            "team.yaml: keys.quantizer.code_bits: Input should be greater than or equal to 0 "
            "(given -1)",
        ),
        (
            {"keys__quantizer__learner__iterations": 0},
            "team.yaml: keys.quantizer.learner.iterations: Input should be greater than or equal "
            "to 1 (given 0)",
        ),
        ({"keys__rope": None}, "team.yaml: keys.rope: Field required"),
        (
            {"keys__rope": "before"},
            "team.yaml: keys.rope: Input should be 'pre' or 'post' (given 'before')",
        ),
        ({"values__quantizer": None}, "for all channels, or `segments`; given neither"),
        (
            {"values__segments": [{"share": 1.0, "quantizer": PRODUCT}]},
            "team.yaml: values: give either `quantizer`, for all channels, or `segments`; "
            "given both",
        ),
        (
            {"values__quantizer": None, "values__segments": [{"share": 0.7, "quantizer": PRODUCT}]},
            "team.yaml: values: the shares of all segments add up to 1, given 0.7",
        ),
        (
            {"values__quantizer__learner": {"type": "uniform"}},
            "team.yaml: values: the uniform learner is scalar: set grouping.dim to 1, given 4",
        ),
        (
            {
                "values__quantizer__learner": {
                    "type": "product",
                    "learners": [{"type": "kmeans"}, {"type": "uniform"}],
                }
            },
            "team.yaml: values: the uniform learner is scalar: set grouping.dim to 1, given 4",
        ),
        (
            {"values__quantizer__learner": {"type": "residual", "stages": 3}},
            "team.yaml: values: quantizer.learner: codewords of one stage are needed, given 3 "
            "stages: use {type: residual, depth: 3} as the quantizer",
        ),
        (
            {
                "values__quantizer__learner": {
                    "type": "product",
                    "learners": [{"type": "residual", "stages": 2}],
                }
            },
            "codewords of one stage are needed, given 2 stages",
        ),
        (
            {"values__grouping__type": "across_heads", "values__sharing": "head"},
            "team.yaml: values: sharing 'head' needs groups within heads; across_heads groups "
            "cross them: use 'group', 'layer' or 'model'",
        ),
        (
            {"values__grouping__type": "across_heads", "values__sharing": "subspace"},
            "values: sharing 'subspace' needs groups within heads",
        ),
        (
            {
                "values__grouping__type": "strided",
                "values__quantizer": None,
                "values__segments": [
                    {"share": 0.5, "dim": 2, "quantizer": PRODUCT},
                    {"share": 0.5, "quantizer": PRODUCT},
                ],
            },
            "team.yaml: values: strided groups have one dim, 4; segments give [2, 4]",
        ),
        (
            {"layers": [{"layers": [0, -1]}]},
            "team.yaml: layers.0: changes nothing for layers [0, -1]: say under `keys` or `values` "
            "what differs",
        ),
        (
            {"layers": [FEWER_BITS, {"layers": [1], "keys": {"rope": "pre"}}]},
            "team.yaml: layers.1: changes nothing for layers [1]",
        ),
        (
            {"values__quantizer__code_bits": 16},
            "team.yaml: values: a codebook of 16 bits has 65536 codewords and needs as many "
            "samples, but `calibration.samples` gives it 32768: raise it, lower code_bits, or",
        ),
        (
            {
                "calibration": {"samples": 300},
                "layers": [{"layers": [0], "keys": {"quantizer": {"code_bits": 9}}}],
            },
            "team.yaml: layers.0.keys: a codebook of 9 bits has 512 codewords",
        ),
        (
            {"layers": [{"layers": [0, 1]}, {"layers": [1]}]},
            "team.yaml: layers: each layer is overridden once; given twice: [1]",
        ),
        (
            {"layers": [{"layers": [0], "keys": {"quantizer": {"code_bits": 99}}}]},
            "team.yaml: layers.0.keys.quantizer.code_bits: Input should be less than or equal",
        ),
        ({"schema_version": 2}, "team.yaml: schema_version: Input should be 1 (given 2)"),
        (
            {"values__quantizer__learner": {"type": "uniform", "low": float("nan"), "high": 1}},
            "team.yaml: values.quantizer.learner.low: Input should be a finite number (given nan)",
        ),
        (
            {
                "values__quantizer": None,
                "values__segments": [{"share": float("inf"), "quantizer": PRODUCT}],
            },
            "team.yaml: values.segments.0.share: Input should be",
        ),
        ({"residency__window": -1}, "team.yaml: residency.window: Input should be greater than"),
    ],
)
def test_refused_with_place_value_and_remedy(changes: Plain, message: str) -> None:
    assert message in refused(**changes)


def test_every_problem_is_told_at_once() -> None:
    lines = refused(
        keys__quantizer__code_bits=17,
        keys__quantizer__learner__iterations=0,
        values__grouping__dim=0,
        residency__sinks=-2,
    ).split("\n")
    assert [line.split(": ")[1] for line in lines] == [
        "keys.quantizer.code_bits",
        "keys.quantizer.learner.iterations",
        "values.grouping.dim",
        "residency.sinks",
    ]


def test_one_stage_is_no_residual() -> None:
    scheme(values__quantizer__learner={"type": "residual", "stages": 1})


def test_codebooks_that_more_subvectors_fill() -> None:
    # What shares a codebook fills it together; a grid that needs no data is full at once.
    scheme(values__quantizer__code_bits=16, values__sharing="layer")
    uniform = {"type": "uniform", "low": 0.0, "high": 1.0}
    scheme(
        values__quantizer={"type": "product", "code_bits": 16, "learner": uniform},
        values__grouping__dim=1,
    )


# -- geometry ----------------------------------------------------------------------------------


def test_check_refuses_layers_that_the_model_lacks(geometry: Geometry) -> None:
    fewer = {"values": {"quantizer": {"code_bits": 3}}}
    scheme(layers=[{"layers": [0, -1], **fewer}]).check(geometry)
    with pytest.raises(SchemeError, match=r"layers: \[7, -3\] are not in a model of 2 compressed"):
        scheme(layers=[{"layers": [0, 7, -3], **fewer}]).check(geometry)


def test_check_sees_through_negative_layers(geometry: Geometry) -> None:
    with pytest.raises(SchemeError, match=r"overridden once; \[1, -1\] name \[1\] twice"):
        again = {"layers": [-1], "values": {"quantizer": {"code_bits": 4}}}
        scheme(layers=[{**FEWER_BITS, "layers": [1]}, again]).check(geometry)


def test_overrides_count_the_layers_that_are_compressed(geometry: Geometry) -> None:
    hybrid = replace(geometry, layers=9, compressed=(2, 4, 6, 8))
    preset = KVCompressor(load_scheme("recommended-2bit"), hybrid)
    assert [len(preset.sources(layer, "keys")) for layer in hybrid.compressed] == [0, 2, 4, 6]
    fewer = KVCompressor(scheme(layers=[{**FEWER_BITS, "layers": [0, -1]}]), hybrid)
    bits = {key: codec.layout.bits_per_value for key, codec in fewer.codecs()}
    assert [bits[layer, "values"] for layer in hybrid.compressed] == [1, 2, 2, 1]


# -- overrides and merging ---------------------------------------------------------------------


def test_an_override_says_only_what_differs() -> None:
    made = scheme(
        values__transforms=[{"type": "center"}],
        layers=[{"layers": [0, -1], "values": {"quantizer": {"code_bits": 3}}}],
    )
    (override,) = made.layers
    assert override.keys is None
    assert override.values is not None
    assert override.values.quantizer.bits() == 3
    assert override.values.quantizer.learner == made.values.quantizer.learner
    assert override.values.transforms == made.values.transforms
    assert made.values.quantizer.bits() == 8
    assert made.stream(0, "values", 4) is override.values
    assert made.stream(3, "values", 4) is override.values
    assert made.stream(1, "values", 4) is made.values
    assert made.stream(0, "keys", 4) is made.keys


def test_merging_goes_block_by_block() -> None:
    base = {"a": {"type": "x", "p": 1, "q": {"r": 1, "s": 2}}, "b": [1, 2]}
    assert merge(base, {"a": {"q": {"r": 9}}}) == {
        "a": {"type": "x", "p": 1, "q": {"r": 9, "s": 2}},
        "b": [1, 2],
    }
    assert merge(base, {"a": {"type": "y"}}) == {"a": {"type": "y"}, "b": [1, 2]}
    assert merge(base, {"a": {"type": "x", "p": 2}})["a"]["q"] == {"r": 1, "s": 2}
    assert merge(base, {"b": [3]})["b"] == [3]
    assert base["a"] == {"type": "x", "p": 1, "q": {"r": 1, "s": 2}}


def test_a_changed_type_replaces_its_block() -> None:
    made = scheme(
        layers=[
            {
                "layers": [0],
                "values": {"quantizer": {"type": "residual", "depth": 2, "code_bits": 4}},
            }
        ]
    )
    assert made.layers[0].values is not None
    assert made.layers[0].values.quantizer.learner.iterations == 20  # the default, not merged
    with pytest.raises(SchemeError, match=r"layers.0.values.quantizer.code_bits: Field required"):
        scheme(layers=[{"layers": [0], "values": {"quantizer": {"type": "residual", "depth": 2}}}])


def test_naming_segments_drops_the_quantizer_and_back() -> None:
    segments = [{"share": 1.0, "quantizer": PRODUCT}]
    over = scheme(layers=[{"layers": [0], "values": {"segments": segments}}]).layers[0].values
    assert over is not None and over.quantizer is None and len(over.segments) == 1
    back = scheme(
        values__quantizer=None,
        values__segments=segments,
        layers=[{"layers": [0], "values": {"quantizer": PRODUCT}}],
    )
    over = back.layers[0].values
    assert over is not None and over.quantizer is not None and over.segments == ()


# -- what a scheme knows of itself -------------------------------------------------------------


def test_data_free_needs_every_part_to_be() -> None:
    fixed = {
        f"{stream}__{name}": value
        for stream in ("keys", "values")
        for name, value in (
            ("grouping__dim", 1),
            ("quantizer__learner", {"type": "uniform", "low": -1.0, "high": 1.0}),
        )
    }
    assert scheme(**fixed).data_free
    assert scheme(**fixed, keys__transforms=[{"type": "hadamard"}]).data_free
    assert not scheme(**fixed, keys__transforms=[{"type": "center"}]).data_free
    assert not scheme(**{**fixed, "keys__grouping__type": "energy_balanced"}).data_free
    assert not scheme(**{**fixed, "values__quantizer__learner": {"type": "kmeans"}}).data_free


# -- round trip and fingerprint ----------------------------------------------------------------


def shuffled(value: Any) -> Any:
    """The same values with every block's keys in reverse order."""
    if isinstance(value, dict):
        return {key: shuffled(value[key]) for key in reversed(list(value))}
    return [shuffled(item) for item in value] if isinstance(value, list) else value


RICH: Plain = {
    "keys__transforms": [{"type": "center"}, {"type": "hadamard", "sign_seed": None}],
    "values__quantizer": None,
    "values__segments": [
        {"share": 0.25, "dim": 2, "quantizer": {"type": "identity"}},
        {"share": 0.75, "quantizer": {"type": "residual", "depth": 2, "code_bits": 3}},
    ],
    "layers": [
        {"layers": [0], "keys": {"quantizer": {"code_bits": 5}}},
        {"layers": [-1], "values": {"quantizer": {"type": "product", "code_bits": 0}}},
    ],
}


@pytest.mark.parametrize("changes", [{}, RICH], ids=["plain", "rich"])
def test_survives_plain_values_and_json(changes: Plain) -> None:
    made = scheme(**changes)
    again = scheme_from_dict(json.loads(json.dumps(made.to_dict())))
    assert again == made
    assert again.to_dict() == made.to_dict()
    assert again.fingerprint() == made.fingerprint()


def test_fingerprint_ignores_key_order_name_and_description() -> None:
    made = scheme(**RICH)
    assert scheme_from_dict(shuffled(plain(**RICH))).fingerprint() == made.fingerprint()
    renamed = scheme(**RICH, name="other", description="words")
    assert renamed.fingerprint() == made.fingerprint()


def test_fingerprint_does_not_depend_on_what_is_left_to_defaults() -> None:
    explicit = scheme(
        keys__sharing="group",
        values__transforms=[],
        residency={"sinks": 4, "window": 128},
        calibration={"samples": 32768},
        keys__quantizer__learner={"type": "kmeans"},
    )
    assert explicit.fingerprint() == scheme().fingerprint()


def leaves(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], Any]]:
    if isinstance(value, dict | list):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        for key, item in items:
            yield from leaves(item, (*path, key))
    else:
        yield path, value


#: For fields whose values are names: another legal one.
OTHER = {
    "pre": "post",
    "group": "layer",
    "contiguous": "energy_balanced",
    "random": "kmeans++",
    "auto": "torch",
    "head": "layer",
    "float32": "float16",
}


def test_fingerprint_changes_with_every_decisive_field() -> None:
    made = scheme(**RICH)
    seen = {made.fingerprint()}
    changed = 0
    for path, value in leaves(made.to_dict()):
        data = made.to_dict()
        if path[0] in ("name", "description", "schema_version"):
            continue
        other: Any
        if isinstance(value, bool):
            other = not value
        elif isinstance(value, str):
            if value not in OTHER:
                continue
            other = OTHER[value]
        elif isinstance(value, int):
            other = value + 1
        else:
            continue
        block = data
        for step in path[:-1]:
            block = block[step]
        block[path[-1]] = other
        try:
            altered = Scheme.model_validate(data)
        except ValueError:
            continue  # the change alone makes no scheme that works
        assert altered.fingerprint() not in seen, path
        seen.add(altered.fingerprint())
        changed += 1
    assert changed > 30


def test_fingerprint_is_the_same_in_every_process() -> None:
    code = (
        "import json, sys; from vqkv.scheme_files import scheme_from_dict;"
        "print(scheme_from_dict(json.load(sys.stdin)).fingerprint())"
    )
    printed = {
        subprocess.run(
            [sys.executable, "-c", code],
            input=json.dumps(plain(**RICH)),
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
            timeout=120,
        ).stdout.strip()
        for seed in ("0", "4711")
    }
    assert printed == {scheme(**RICH).fingerprint()}


def test_fingerprints_do_not_drift() -> None:
    # Artefacts name their schemes by it: what one machine wrote, every other has to find.
    values = {"name": "x", "b": [1, 0.5, None, True], "a": {"z": "é", "y": 1e-05}}
    assert fingerprint(values) == (
        "6b1e893b0fc261c9035e3fa1a1961c7709d38d7ef235e0d0d4695b6d3b05fd2c"
    )


# -- predictors and metrics --------------------------------------------------------------------

BEFORE = [{"stream": "keys", "back": 1}]
SAME = [{"stream": "keys", "back": 0}]
SELF = {"stream": "values", "back": 0}


def predicted(**changes: Any) -> dict[str, Any]:
    return {"predictor": {"type": "linear", "sources": BEFORE}, **changes}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"keys": predicted()}, r"keys\.predictor: nothing comes before layer 0"),
        (
            {"keys": {"predictor": {"type": "linear", "sources": SAME}}},
            "keys are decoded before this layer's keys",
        ),
        (
            {"values": {"predictor": {"type": "linear", "sources": [SELF]}}},
            "own values, are coded last",
        ),
        (
            {"values": {"predictor": {"type": "linear", "sources": SAME * 2}}},
            "each stream is named once",
        ),
        (
            {
                "values": {"predictor": {"type": "linear", "sources": SAME}},
                "keys": {"sharing": "model"},
            },
            "sharing 'model' fits all layers together",
        ),
        (
            {
                "values": {"predictor": {"type": "linear", "sources": SAME}},
                "keys": {"sharing": "subspace"},
            },
            "sharing 'subspace' fits all layers together",
        ),
        (
            {"keys": {"transforms": [{"type": "spectral", "metric": "output"}]}},
            r"transforms\.0: the metric of keys is 'query' or 'fisher', given 'output'",
        ),
        (
            {
                "keys": {
                    "transforms": [
                        {"type": "channel_scale"},
                        {"type": "spectral", "metric": "query"},
                    ]
                }
            },
            r"transforms\.1: a transform in the 'query' metric cannot follow 'channel_scale'",
        ),
    ],
)
def test_predictors_and_metrics_that_cannot_work(changes: dict[str, Any], message: str) -> None:
    base = load_scheme("cq-4c8b").to_dict()
    with pytest.raises(SchemeError, match=message):
        scheme_from_dict(merge(base, changes))


def test_a_layer_with_too_few_before_it_is_refused_with_a_model() -> None:
    changes = {
        "values": {"predictor": {"type": "linear", "sources": [{"stream": "keys", "back": 2}]}},
        "layers": [{"layers": [0], "values": {"predictor": None}}],
    }
    scheme = scheme_from_dict(merge(load_scheme("cq-4c8b").to_dict(), changes))
    with pytest.raises(SchemeError, match="values of layer 1: predictor: needs keys 2 compressed"):
        scheme.check(make_geometry(layers=3, compressed=(0, 1, 2)))


def test_keys_are_not_predicted_across_rotation() -> None:
    changes = {
        "keys": predicted(),
        "layers": [{"layers": [0], "keys": {"rope": "post", "predictor": None}}],
    }
    scheme = scheme_from_dict(merge(load_scheme("cq-4c8b").to_dict(), changes))
    with pytest.raises(SchemeError, match="keys of layer 1: predictor: they are coded pre-RoPE"):
        scheme.check(make_geometry(layers=2, compressed=(0, 1)))


def test_sources_beyond_the_first_layer_are_refused() -> None:
    far = {"type": "linear", "sources": [{"stream": "keys", "back": 4}]}
    without = [{"layers": [0], "values": {"predictor": None}}]
    changes = {"values": {"predictor": far}, "layers": without}
    scheme = scheme_from_dict(merge(load_scheme("cq-4c8b").to_dict(), changes))
    with pytest.raises(SchemeError, match="needs keys 4 compressed layers back, but only 1 come"):
        scheme.check(make_geometry(layers=2, compressed=(0, 1)))


def test_copies_are_not_taken_across_rotation() -> None:
    """Nor from keys to values: these are never turned."""
    copied = {"predictor": {"type": "copy", "sources": BEFORE}}
    mixed = {
        "keys": {"rope": "post"},
        "layers": [{"layers": [1], "keys": {"rope": "pre", **copied}}],
    }
    crossed = {"keys": {"rope": "post"}, "layers": [{"layers": [1], "values": copied}]}
    for changes, message in (
        (mixed, "keys of layer 1: predictor: they are coded pre-RoPE, the keys of layer 0 post"),
        (crossed, "values of layer 1: predictor: they are coded without RoPE, the keys of layer 0"),
    ):
        made = scheme_from_dict(merge(load_scheme("cq-4c8b").to_dict(), changes))
        with pytest.raises(SchemeError, match=message):
            KVCompressor(made, make_geometry())
    same = merge(crossed, {"keys": {"rope": "pre"}})
    KVCompressor(scheme_from_dict(merge(load_scheme("cq-4c8b").to_dict(), same)), make_geometry())


def test_residency_is_one_rule_for_all_layers() -> None:
    """So what a stream is predicted from keeps the same tokens exact as the stream itself."""
    with pytest.raises(SchemeError, match=r"layers\.0\.residency: unknown field"):
        scheme(layers=[{**FEWER_BITS, "residency": {"sinks": 0}}])


@pytest.mark.parametrize(
    ("quantizer", "message"),
    [
        (
            {"type": "residual", "rate": 0.7, "code_bits": 8},
            r"keys of layer 0: quantizer\.rate: 0\.7 bits .* give a multiple of 2 up to 128",
        ),
        (
            {"type": "sign_sketch", "rate": 0.3},
            r"keys of layer 0: quantizer\.rate: 0\.3 signs for each of 4 channels are 1\.2",
        ),
    ],
)
def test_a_rate_that_the_head_dim_cannot_give(quantizer: Plain, message: str) -> None:
    with pytest.raises(SchemeError, match=message):
        KVCompressor(scheme(keys__quantizer=quantizer), make_geometry())


def test_learners_side_by_side_share_codebooks_equally() -> None:
    """3 learners, and 16 codebooks of each of 2 heads: refused before any model runs."""
    for learner in ({"type": "kmeans"}, {"type": "uniform", "low": 0.0, "high": 1.0}):
        product = {"type": "product", "learners": [learner] * 3}
        made = scheme(values__quantizer__learner=product, values__grouping__dim=1)
        with pytest.raises(
            SchemeError,
            match=r"values of layer 0: quantizer\.learner: 3 learners .* which are 32 here",
        ):
            KVCompressor(made, make_geometry())
    three = {"type": "product", "learners": [{"type": "kmeans"}] * 3}
    assert "team.yaml: values: quantizer.learner: 3 learners" in refused(
        values__quantizer__learner=three, values__sharing="layer"
    )
    nested = {"type": "product", "learners": [{"type": "kmeans"}, three]}
    with pytest.raises(SchemeError, match=r"3 learners .* which are 4 here"):
        KVCompressor(scheme(values__quantizer__learner=nested), make_geometry())


def test_too_few_samples_for_units() -> None:
    changes = {"calibration": {"samples": 10}, "values": {"quantizer": {"code_bits": 2}}}
    scheme = scheme_from_dict(merge(load_scheme("commvq-2").to_dict(), changes))
    with pytest.raises(SchemeError, match="rope_commutative learns from 64 vectors or more"):
        KVCompressor(scheme, make_geometry())
