"""Keys and values to bytes at once, as a cache appends them: one launch where there is a GPU."""

from __future__ import annotations

import torch

from vqkv.errors import KernelError
from vqkv.kernels.select import select
from vqkv.layouts import Layout

#: Codes, a byte each, `[N, M, S]` of keys and of values.
Pair = tuple[torch.Tensor, torch.Tensor]


def encode_pair(
    keys: torch.Tensor,
    key_codewords: torch.Tensor,
    values: torch.Tensor,
    value_codewords: torch.Tensor,
) -> Pair:
    """Greedy codes (uint8) of keys and values `[N, M, d]` under codebooks `[M, S, K, d]`.

    Sizes may differ between keys and values.

    Raises:
        KernelError: a codebook has more codewords than a byte can name.
    """
    for name, codewords in (("keys", key_codewords), ("values", value_codewords)):
        if codewords.shape[2] > 256:
            raise KernelError(f"{name}: a byte cannot name one of {codewords.shape[2]} codewords")
    layouts = tuple(Layout.of_codebook(*words.shape) for words in (key_codewords, value_codewords))
    kernel = select("encode_pair", layouts, keys.device).kernel
    codes: Pair = kernel(keys, key_codewords, values, value_codewords)
    return codes
