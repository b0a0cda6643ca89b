from __future__ import annotations

import json
import re
from importlib.resources import files
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from tests.conftest import make_geometry
from vqkv.compressor import KVCompressor
from vqkv.errors import SchemeError
from vqkv.layouts import Layout
from vqkv.scheme_files import load_scheme, preset_names, scheme_from_dict, scheme_schema

STREAM = """
  grouping: {type: contiguous, dim: 4}
  quantizer: {type: product, code_bits: 8}
"""
WHOLE = f"name: whole\nkeys:\n  rope: pre{STREAM}values:{STREAM}"


def write(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def refused(path: Path) -> str:
    with pytest.raises(SchemeError) as error:
        load_scheme(path)
    return str(error.value)


# -- presets -----------------------------------------------------------------------------------


def layouts(name: str, head_dim: int) -> list[Layout]:
    # 8 heads, so that presets that share scales or codes between heads have some to share.
    geometry = make_geometry(head_dim=head_dim, kv_heads=8, query_heads=8)
    compressor = KVCompressor(load_scheme(name), geometry)
    return [codec.layout for _, codec in compressor.codecs()]


def mean_bits(name: str, **shape: int) -> float:
    geometry = make_geometry(
        **shape, query_heads=shape["kv_heads"], compressed=tuple(range(shape["layers"]))
    )
    return KVCompressor(load_scheme(name), geometry).bits_per_value


def test_every_preset_file_is_listed() -> None:
    on_disk = {path.name.removesuffix(".yaml") for path in (files("vqkv") / "presets").iterdir()}
    assert set(preset_names()) == on_disk
    assert preset_names() == sorted(preset_names())
    assert {"cq-4c8b", "rvq-2.875", "scalar-4bit"} <= set(preset_names())


@pytest.mark.parametrize("name", preset_names())
def test_every_preset_loads_and_survives_a_round_trip(name: str) -> None:
    scheme = load_scheme(name)
    assert scheme.name == name
    assert scheme.description
    assert scheme.residency.sinks == 4
    again = scheme_from_dict(json.loads(json.dumps(scheme.to_dict())))
    assert again == scheme and again.fingerprint() == scheme.fingerprint()


def test_presets_are_different_schemes() -> None:
    prints = {load_scheme(name).fingerprint() for name in preset_names()}
    assert len(prints) == len(preset_names())


@pytest.mark.parametrize(
    ("name", "at_128", "at_64"),
    [
        ("aquakv-2", 2.078, 2.15),
        ("aquakv-2-e8p", 2.078, 2.15),
        ("calibquant-1", 1.0, 1.0),
        ("commvq-1", 1.047, 1.083),
        ("commvq-2", 2.0156, 2.021),
        ("cq-2c8b", 4.0, 4.0),
        ("cq-4c8b", 2.0, 2.0),
        ("cq-4c8b-fisher", 2.0, 2.0),
        ("cq-8c10b", 1.25, 1.25),
        ("cq-8c8b-fisher", 1.0, 1.0),
        ("cq-8c8b", 1.0, 1.0),
        ("fast-1bit", 1.0, 1.0),
        ("fast-2bit", 2.0, 2.0),
        ("gsrq-1", 1.125, 1.25),
        ("kivi-2", 3.0, 3.0),
        ("kivi-4", 5.0, 5.0),
        ("kvquant-2", 2.32, 2.375),
        ("kvquant-3", 3.32, 3.375),
        ("million-4", 4.0, 4.0),
        ("nova-2", 2.1875, 2.375),
        ("nsn-1", 1.5, 1.75),
        ("polarquant-4", 4.375, 4.5),
        ("qjl-3", 3.0625, 3.125),
        ("quantspec-8", 8.375, 8.5),
        ("rvq-2.875", 2.875, 3.0),
        ("scalar-1bit", 1.25, 1.5),
        ("scalar-2bit", 2.25, 2.5),
        ("scalar-4bit", 4.25, 4.5),
        ("spectral-1", 1.0, 1.0),
        ("recommended-3bit", 3.0, 3.0),
        ("recommended-2bit", 2.0, 2.0),
        ("recommended-1bit", 1.0, 1.0),
        ("spectral-2", 2.0, 2.0),
        ("spectral-predict-1", 1.09375, 1.1),
        ("spectral-predict-2", 2.0625, 2.067),
        ("tasq-1.25", 1.258, 1.292),
        ("truncate-4", 4.0, 4.0),
        ("turboquant-2.5", 2.625, 2.75),
        ("turboquant-3.5", 3.625, 3.75),
        ("vecinfer-2", 2.0, 2.0),
        ("vqkv-2.75", 2.75, 2.75),
    ],
)
def test_presets_store_the_bits_that_they_promise(name: str, at_128: float, at_64: float) -> None:
    assert mean_bits(name, head_dim=128, kv_heads=8, layers=32) == pytest.approx(at_128, abs=5e-4)
    assert mean_bits(name, head_dim=64, kv_heads=3, layers=30) == pytest.approx(at_64, abs=5e-4)
    text = (files("vqkv") / "presets" / f"{name}.yaml").read_text(encoding="utf-8")
    comment = " ".join(re.findall(r"^# (.*)$", text, flags=re.MULTILINE))
    for bits in (at_128, at_64):
        assert re.search(rf"(?<![\d.]){bits:g}(?![\d.]\d)", comment), (bits, comment)


def test_presets_with_bits_in_their_table_are_all_of_them() -> None:
    parametrised = test_presets_store_the_bits_that_they_promise.pytestmark[0].args[1]  # type: ignore[attr-defined]
    assert {row[0] for row in parametrised} == set(preset_names())


# -- examples ----------------------------------------------------------------------------------


def test_copied_layers_store_nothing_of_their_own() -> None:
    path = Path(__file__).parent.parent / "examples" / "schemes" / "copied.yaml"
    geometry = make_geometry(layers=30, compressed=tuple(range(30)))
    compressor = KVCompressor(load_scheme(path), geometry)
    stored = {key: codec.layout.bytes_per_token for key, codec in compressor.codecs()}
    assert {layer for (layer, _), size in stored.items() if size == 0} == {12, 16, 20, 24}
    assert compressor.bits_per_value == pytest.approx(2 * 26 / 30)
    assert compressor.sources(12, "values") == [(11, "values")]


# -- files -------------------------------------------------------------------------------------


def test_a_whole_file(tmp_path: Path) -> None:
    scheme = load_scheme(write(tmp_path, "a.yaml", WHOLE))
    assert scheme.name == "whole"
    assert load_scheme(str(tmp_path / "a.yaml")) == scheme


def test_extends_a_preset(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        "team.yaml",
        "name: ours\nextends: cq-4c8b\nkeys: {grouping: {dim: 8}}\nresidency: {window: 64}\n",
    )
    scheme, preset = load_scheme(path), load_scheme("cq-4c8b")
    assert (scheme.name, scheme.description) == ("ours", "")
    assert scheme.keys.grouping.dim == 8
    assert scheme.keys.quantizer == preset.keys.quantizer
    assert scheme.values == preset.values
    assert (scheme.residency.sinks, scheme.residency.window) == (4, 64)


def test_a_preset_that_extends_equals_itself_written_out() -> None:
    wide, narrow = load_scheme("cq-8c8b"), load_scheme("cq-4c8b")
    assert wide.keys.quantizer == narrow.keys.quantizer
    data = narrow.to_dict()
    data["keys"]["grouping"]["dim"] = data["values"]["grouping"]["dim"] = 8
    assert scheme_from_dict(data).fingerprint() == wide.fingerprint()


def test_extends_a_file_beside_it_and_a_changed_type_replaces_its_block(tmp_path: Path) -> None:
    write(tmp_path, "base.yaml", WHOLE)
    write(tmp_path, "sub/middle.yaml", "name: middle\nextends: ../base.yaml\nkeys: {rope: post}\n")
    path = write(
        tmp_path,
        "sub/top.yaml",
        "name: top\nextends: middle.yaml\n"
        "values: {quantizer: {type: residual, depth: 2, code_bits: 4}}\n",
    )
    scheme = load_scheme(path)
    assert scheme.keys.rope == "post"
    assert scheme.keys.quantizer is not None and scheme.keys.quantizer.bits() == 8
    assert scheme.values.quantizer is not None and scheme.values.quantizer.stages(4) == 2


def test_a_scheme_of_ones_own_needs_a_name_of_its_own(tmp_path: Path) -> None:
    path = write(tmp_path, "team.yaml", "extends: cq-4c8b\nresidency: {sinks: 0}\n")
    assert refused(path) == f"{path}: name: Field required"


@pytest.mark.parametrize("back", ["a.yaml", "./a.yaml", "../{folder}/a.yaml"])
def test_cycles_are_told(tmp_path: Path, back: str) -> None:
    path = write(tmp_path, "a.yaml", "name: a\nextends: b.yaml\n")
    write(tmp_path, "b.yaml", f"name: b\nextends: {back.format(folder=tmp_path.name)}\n")
    message = refused(path)
    assert "extends itself, by way of" in message
    assert message.count("a.yaml") == 3 and message.count("b.yaml") == 1


def test_errors_name_the_file_and_the_place(tmp_path: Path) -> None:
    path = write(
        tmp_path, "team.yaml", "name: x\nextends: cq-4c8b\nkeys: {quantizer: {code_bit: 4}}\n"
    )
    assert refused(path).startswith(f"{path}: keys.quantizer.code_bit: unknown field (given 4)")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name: [", "team.yaml: not YAML: "),
        ("name: x\nkeys: {rope: pre}\nkeys: {rope: post}\n", "'keys' is given twice"),
        ("name: x\nvalues:\n  grouping: {dim: 4, dim: 8}\n", "'dim' is given twice"),
        ("- a\n- b\n", "team.yaml: a scheme is a mapping, given list"),
        ("", "team.yaml: holds no scheme, it is empty"),
        ("extends: [a]\n", "team.yaml: extends: a preset's name or a path, given ['a']"),
        (
            "extends: cq-4c8\n",
            "team.yaml: extends: no preset or file is called 'cq-4c8'. Did you mean 'cq-4c8b'",
        ),
        ("extends: .\n", "team.yaml: extends: '.' is a folder: give a scheme file"),
        ("name: x\n2024-01-01: 5\n", "team.yaml: 2024-01-01: unknown field (given 5)"),
        (
            WHOLE + "calibration: {samples: .nan}\n",
            "team.yaml: calibration.samples: Input should be a finite number (given nan)",
        ),
        (
            WHOLE + "residency: {sinks: .inf}\n",
            "team.yaml: residency.sinks: Input should be a finite number (given inf)",
        ),
    ],
)
def test_files_that_are_no_schemes(tmp_path: Path, text: str, message: str) -> None:
    assert message in refused(write(tmp_path, "team.yaml", text))


def test_merge_keys_may_repeat_names(tmp_path: Path) -> None:
    anchored = WHOLE.replace("values:", "values: &base") + (
        "layers: [{layers: [0], values: {<<: *base, quantizer: {type: identity}}}]\n"
    )
    values = load_scheme(write(tmp_path, "a.yaml", anchored)).layers[0].values
    assert values is not None and values.quantizer is not None and values.quantizer.bits() == 16


def test_a_file_that_is_no_text(tmp_path: Path) -> None:
    path = tmp_path / "team.yaml"
    path.write_bytes(b"\xff\xfe\x00")
    assert "team.yaml: not UTF-8 text" in refused(path)


def test_an_unknown_preset_lists_near_misses() -> None:
    with pytest.raises(SchemeError, match=r"called 'scalar-3bit'\. Did you mean 'scalar-\dbit'"):
        load_scheme("scalar-3bit")


# -- the JSON schema ---------------------------------------------------------------------------


def faults(value: Any, schema: Any, root: dict[str, Any], path: str = "") -> list[str]:
    """What is wrong with a value, by the part of JSON schema that ours uses."""
    if "$ref" in schema:
        schema = root["$defs"][schema["$ref"].removeprefix("#/$defs/")]
    if "anyOf" in schema:
        each = [faults(value, option, root, path) for option in schema["anyOf"]]
        if all(each):
            return [f"{path}: fits no option"]
    found = []
    if "const" in schema and value != schema["const"]:
        found.append(f"{path}: is not {schema['const']}")
    if "enum" in schema and value not in schema["enum"]:
        found.append(f"{path}: is not in {schema['enum']}")
    kinds: dict[str, Any] = {
        "object": dict,
        "array": list,
        "string": str,
        "integer": int,
        "number": (int, float),
        "boolean": bool,
        "null": type(None),
    }
    if "type" in schema and not isinstance(value, kinds[schema["type"]]):
        return [*found, f"{path}: is no {schema['type']}"]
    if "maximum" in schema and value > schema["maximum"]:
        found.append(f"{path}: above {schema['maximum']}")
    if "minimum" in schema and value < schema["minimum"]:
        found.append(f"{path}: below {schema['minimum']}")
    if isinstance(value, dict):
        known = schema.get("properties", {})
        found += [
            f"{path}.{name}: missing" for name in schema.get("required", ()) if name not in value
        ]
        for name, item in value.items():
            if name in known:
                found += faults(item, known[name], root, f"{path}.{name}")
            elif schema.get("additionalProperties") is False:
                found.append(f"{path}.{name}: unknown")
    if isinstance(value, list):
        for index, item in enumerate(value):
            found += faults(item, schema.get("items", {}), root, f"{path}.{index}")
    return found


@pytest.fixture(scope="module")
def schema() -> dict[str, Any]:
    return scheme_schema()


def test_the_schema_is_json_and_complete(schema: dict[str, Any]) -> None:
    assert json.loads(json.dumps(schema)) == schema
    text = json.dumps(schema)
    for ref in re.findall(r'"#/\$defs/([^"]+)"', text):
        assert ref in schema["$defs"]
    for group, members in (("quantizers", 3), ("learners", 5), ("groupings", 5), ("transforms", 4)):
        assert len(schema["$defs"][f"vqkv.{group}"]["anyOf"]) >= members
    assert "member_of" not in text


@pytest.mark.parametrize("name", preset_names())
def test_the_schema_takes_every_preset_as_written_and_as_resolved(
    schema: dict[str, Any], name: str
) -> None:
    written = (files("vqkv") / "presets" / f"{name}.yaml").read_text(encoding="utf-8")
    assert faults(yaml.safe_load(written), schema, schema) == []
    assert faults(load_scheme(name).to_dict(), schema, schema) == []


@pytest.mark.parametrize(
    "text",
    [
        "nam: x\n",
        "description: no name\n",
        "name: x\nkeys: {quantizer: {type: prodct}}\n",
        "name: x\nkeys: {quantizer: {type: product, code_bits: 17}}\n",
        "name: x\nkeys: {quantizer: {type: product, depth: 2}}\n",
        "name: x\nkeys: {quantizer: {type: product, learner: {type: kmeans, iteration: 3}}}\n",
        "name: x\nlayers: [{layers: [0], values: {grouping: {type: contiguous, size: 4}}}]\n",
        "name: x\nkeys: {rope: before}\n",
        "name: x\nkeys: {transforms: [{type: token_scale, stat: mean}]}\n",
    ],
)
def test_the_schema_refuses_what_an_editor_should_mark(schema: dict[str, Any], text: str) -> None:
    assert faults(yaml.safe_load(text), schema, schema)


def test_the_schema_agrees_with_the_reference_validator(schema: dict[str, Any]) -> None:
    jsonschema.Draft202012Validator.check_schema(schema)
    for name in preset_names():
        jsonschema.validate(load_scheme(name).to_dict(), schema)


def test_what_layers_inherit_is_said_once(tmp_path: Path) -> None:
    layers = "layers: [{layers: [0], keys: {sharing: head}}, {layers: [1], keys: {rope: no}}]\n"
    path = write(tmp_path, "team.yaml", WHOLE.replace("code_bits", "code_bit") + layers)
    places = [line.split(": ")[1] for line in refused(path).splitlines()]
    wrong = [f"{stream}.quantizer.code_bit" for stream in ("keys", "values")]
    assert [place for place in places if place.endswith("code_bit")] == wrong
    assert "layers.1.keys.rope" in places
