"""What `vqkv bench` measures."""
