"""`python -m vqkv`."""

from vqkv.cli import app

app()
