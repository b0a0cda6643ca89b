"""Scheme files: YAML to `Scheme`, presets, `extends`, and errors that name the place."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from vqkv.codebooks import LEARNERS
from vqkv.errors import SchemeError
from vqkv.groupings import GROUPINGS
from vqkv.predictors import PREDICTORS
from vqkv.quantizers import QUANTIZERS
from vqkv.registry import did_you_mean, explain, schema_with_members
from vqkv.scheme import Scheme, merge
from vqkv.transforms import TRANSFORMS


def preset_names() -> list[str]:
    """Names of the presets that come with the package."""
    names = [Path(entry.name) for entry in (files("vqkv") / "presets").iterdir()]
    return sorted(name.stem for name in names if name.suffix == ".yaml")


def load_scheme(name_or_path: str | Path) -> Scheme:
    """A preset by name, or a YAML file by path.

    Raises:
        SchemeError: no such preset or file, no YAML, or a scheme that cannot work; the message
            gives the path inside the file, what was given, and what would be right.
    """
    return scheme_from_dict(_resolved(str(name_or_path), Path(), ()), str(name_or_path))


def scheme_from_dict(data: Any, where: str = "scheme") -> Scheme:
    """A scheme from plain values, with `extends` already resolved. Raises SchemeError."""
    try:
        return Scheme.model_validate(data)
    except ValidationError as error:
        raise SchemeError(explain(error, where)) from error


def scheme_schema() -> dict[str, Any]:
    """The JSON schema of scheme files, plugin members included, for editors.

    Blocks may be partial, as a base or the scheme's own streams can complete them; loading is
    what finds a missing field.
    """
    schema = schema_with_members(Scheme, (PREDICTORS, GROUPINGS, TRANSFORMS, QUANTIZERS, LEARNERS))
    for definition in schema["$defs"].values():
        definition.pop("required", None)
    schema["$defs"]["Scheme"] |= {"required": ["name"]}
    schema["$defs"]["Scheme"]["properties"]["extends"] = {
        "type": "string",
        "description": "A preset's name or a file's path; this file's blocks merge onto it.",
    }
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}


class _Loader(yaml.SafeLoader):
    """Refuses a name that is given twice in a block; YAML itself keeps the last in silence."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        """A block, as it is written: merge keys are resolved later, and may repeat names."""
        node = super().compose_mapping_node(anchor)
        names = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in names:
                    raise yaml.composer.ComposerError(
                        "in a block",
                        node.start_mark,
                        f"{key.value!r} is given twice",
                        key.start_mark,
                    )
                names.add(key.value)
        return node


def _resolved(name: str, folder: Path, above: tuple[str, ...]) -> dict[str, Any]:
    """The plain values of a scheme, with what it extends merged in."""
    where, text, folder = _read(name, folder, above)
    if where in above:
        raise SchemeError(f"{where}: extends itself, by way of {' -> '.join((*above, where))}")
    try:
        data = yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        raise SchemeError(f"{where}: not YAML: {error}") from error
    if data is None:
        raise SchemeError(f"{where}: holds no scheme, it is empty")
    if not isinstance(data, dict):
        raise SchemeError(f"{where}: a scheme is a mapping, given {type(data).__name__}")
    base = data.pop("extends", None)
    if base is None:
        return data
    if not isinstance(base, str):
        raise SchemeError(f"{where}: extends: a preset's name or a path, given {base!r}")
    inherited = _resolved(base, folder, (*above, where))
    # Another scheme under the base's name would be mistaken for it.
    for own in ("name", "description"):
        inherited.pop(own, None)
    return merge(inherited, data)


def _read(name: str, folder: Path, above: tuple[str, ...]) -> tuple[str, str, Path]:
    """Where the scheme is, its text, and the folder that its own `extends` starts from."""
    if name in preset_names():
        text = (files("vqkv") / "presets" / f"{name}.yaml").read_text(encoding="utf-8")
        return name, text, Path()
    path = (folder / name).resolve()
    place = f"{above[-1]}: extends: " if above else ""
    if path.is_dir():
        raise SchemeError(f"{place}{name!r} is a folder: give a scheme file")
    if not path.is_file():
        raise SchemeError(
            f"{place}no preset or file is called {name!r}.{did_you_mean(name, preset_names())}"
        )
    try:
        return str(path), path.read_text(encoding="utf-8"), path.parent
    except UnicodeDecodeError as error:
        raise SchemeError(f"{path}: not UTF-8 text: {error}") from error
