"""What is said of families of models."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks.families import WAYS, apart, families

SAME = {f"{rope}/{read}": "same" for rope, read in WAYS}


@pytest.mark.parametrize(
    "family, found",
    [
        ("llama", {"layers": 2, "compressed": 2, "ways": SAME}),
        # Layers of both kinds, and a model that sees.
        ("gemma3", {"layers": 4, "compressed": 2, "ways": SAME}),
        ("deepseek_v3", {"refused": "latent attention is not supported"}),
        ("bert", {"left_out": "an encoder"}),
    ],
)
def test_each_family_is_tried_in_a_process_of_its_own(family: str, found: dict[str, Any]) -> None:
    assert family in families()
    row = apart(family)
    assert row.pop("family") == family and row.keys() == found.keys()
    for name, value in found.items():
        assert value in row[name] if isinstance(value, str) else row[name] == value


def test_what_does_not_go_is_told_apart_from_what_does() -> None:
    ways = apart("gemma2")["ways"]
    assert (ways["pre/decode"], ways["post/decode"]) == ("same", "same")
    assert "softcap" in ways["pre/attend"] and "softcap" in ways["post/attend"]
