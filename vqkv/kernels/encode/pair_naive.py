"""Keys, then values, by whichever kernel encodes one stream."""

from __future__ import annotations

import torch

from vqkv.kernels.encode import encode
from vqkv.kernels.encode.pair import Pair
from vqkv.kernels.select import Kernel, anywhere


def encode_pair(
    keys: torch.Tensor,
    key_codewords: torch.Tensor,
    values: torch.Tensor,
    value_codewords: torch.Tensor,
) -> Pair:
    """Codes `[N, M, S]` (uint8) of each."""
    key_codes, value_codes = encode(keys, key_codewords), encode(values, value_codewords)
    return key_codes.to(torch.uint8), value_codes.to(torch.uint8)


KERNEL = Kernel("encode_pair", "naive", encode_pair, anywhere, speed=0)
