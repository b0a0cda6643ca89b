"""The texts that come with the package: two to calibrate on, two to evaluate on."""

from __future__ import annotations

from importlib import resources
from pathlib import Path

from vqkv.errors import TextError

BUNDLED_TEXTS = ("emma", "persuasion", "python-library", "python-tutorial")

CALIBRATION_MIX = ("emma", "python-tutorial")
"""A novel and technical prose, half each by tokens."""

EVALUATION_TEXTS = ("persuasion", "python-library")
"""The same two kinds of prose; no calibration sees these."""


def bundled_text(name: str) -> Path:
    """The path of the bundled text called `name`.

    Raises:
        TextError: No text of that name comes with the package.
    """
    if name not in BUNDLED_TEXTS:
        raise TextError(f"no bundled text is called {name!r}; there are {', '.join(BUNDLED_TEXTS)}")
    # pip installs packages as plain folders, so the resource is a file with a path.
    return Path(str(resources.files("vqkv").joinpath("data", f"{name}.txt")))
