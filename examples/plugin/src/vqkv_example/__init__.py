"""An example of a vqkv plugin."""
