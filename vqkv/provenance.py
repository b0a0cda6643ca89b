"""What a benchmark's figures were taken on: machine, versions, commit."""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

PACKAGES = (
    *("vqkv", "torch", "transformers", "faiss-cpu", "scikit-learn", "numpy", "triton"),
    *("optimum-quanto", "hqq"),
)


def provenance() -> dict[str, Any]:
    """To be written beside the figures."""
    return {"machine": machine(), "versions": versions(), "commit": commit()}


def machine() -> dict[str, Any]:
    """CPU, cores, threads in use, system."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    fields = dict(line.split(":", 1) for line in lines if ":" in line)
    named = {name.strip(): value.strip() for name, value in fields.items()}
    return {
        "cpu": named.get("model name", platform.processor()),
        "cpu_family_model": f"{named.get('cpu family')}/{named.get('model')}",
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "system": platform.platform(),
    }


def versions() -> dict[str, str]:
    """Of Python and of what the figures depend on."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def commit() -> str:
    """Of the checkout, with `+` where it has changes; empty outside one, or without git."""
    if shutil.which("git") is None:
        return ""
    here = Path(__file__)

    def git(*arguments: str) -> str:
        run = subprocess.run(["git", *arguments], cwd=here.parent, capture_output=True, text=True)
        return run.stdout.strip() if run.returncode == 0 else ""

    # An installed package may lie inside of the checkout of something else.
    if not git("ls-files", here.name):
        return ""
    return git("rev-parse", "HEAD") + ("+" if git("status", "--porcelain") else "")


def write(path: Path, figures: dict[str, Any]) -> None:
    """Figures and their provenance as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({**provenance(), **figures}, indent=2) + "\n", encoding="utf-8")
