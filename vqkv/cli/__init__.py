"""The command line: `vqkv calibrate`, `evaluate`, `generate`, `plan`, `schemes`, `inspect`, `demo`."""

from vqkv.cli.app import app

__all__ = ["app"]
