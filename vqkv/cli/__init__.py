"""The command line, `vqkv`: a module per command."""

from vqkv.cli.app import app

__all__ = ["app"]
