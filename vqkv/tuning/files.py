"""A found scheme as a short file: a preset, and what differs from it."""

from __future__ import annotations

from typing import Any

import yaml

from vqkv.scheme import STREAMS, Scheme
from vqkv.scheme_files import load_scheme


def scheme_file(scheme: Scheme, preset: str, remarks: list[str]) -> str:
    """YAML that `load_scheme` reads as `scheme`, with remarks above.

    Args:
        scheme: found from `preset`.
        preset: that the file extends.
        remarks: lines of comment.
    """
    own, base = scheme.to_dict(), load_scheme(preset).to_dict()
    plain = {
        "schema_version": own["schema_version"],
        "name": own["name"],
        "extends": preset,
        "description": own["description"],
    }
    for field in own:
        if field in base and field not in (*plain, "layers") and own[field] != base[field]:
            plain[field] = difference(base[field], own[field])
    plain["layers"] = [
        {
            "layers": override["layers"],
            **{
                stream: difference(own[stream], override[stream])
                for stream in STREAMS
                if override[stream] not in (None, own[stream])
            },
        }
        for override in own["layers"]
    ]
    comment = "".join(f"# {line}\n" for line in remarks)
    return comment + yaml.safe_dump(plain, sort_keys=False, default_flow_style=None, width=96)


def difference(base: Any, own: Any) -> Any:
    """What has to be merged onto `base` to get `own`."""
    if not isinstance(base, dict) or not isinstance(own, dict):
        return own
    if base.get("type") != own.get("type"):
        return own
    return {
        key: difference(base[key], value) if key in base else value
        for key, value in own.items()
        if key not in base or base[key] != value
    }
