"""The variants that are compiled and held to budgets before a release.

Others are compiled when they are first needed: head dims, dims and stages are free within what
`configs.odd_shape` allows. The names are those of the budgets.
"""

from __future__ import annotations

from vqkv.kernels.gpu.configs import (
    AttendConfig,
    DecodeConfig,
    EncodeConfig,
    HeadsConfig,
    RestConfig,
    SearchConfig,
    Words,
    word_bytes,
)

Config = AttendConfig | EncodeConfig | SearchConfig | HeadsConfig | DecodeConfig | RestConfig


def words(head_dim: int, dim: int, stages: int) -> Words:
    """Of 256 codewords, codes of a token right after those of the one before it."""
    width = head_dim // dim * stages
    return Words(head_dim // dim, stages, 256, dim, word_bytes(stages, width))


def attend(
    head_dim: int,
    dim: int,
    stages: int = 1,
    paged: bool = False,
    rope: bool = False,
    key_sums: bool = False,
) -> AttendConfig:
    """Keys and values coded alike."""
    plane = words(head_dim, dim, stages)
    return AttendConfig(head_dim, plane, plane, paged=paged, rope=rope, key_sums=key_sums)


SHIPPED: dict[str, Config] = {
    "attend/128/d2": attend(128, 2),
    "attend/128/d4": attend(128, 4),
    "attend/128/d4/paged": attend(128, 4, paged=True),
    "attend/128/d4/rope": attend(128, 4, rope=True),
    "attend/128/d4/rope/paged": attend(128, 4, rope=True, paged=True),
    "attend/128/d4/rope/key-sums": attend(128, 4, rope=True, key_sums=True),
    "attend/128/d8": attend(128, 8),
    "attend/128/d8/rope": attend(128, 8, rope=True),
    "attend/128/d8/two-stages": attend(128, 8, stages=2),
    "attend/128/d8/two-stages/rope": attend(128, 8, stages=2, rope=True),
    "attend/64/d4": attend(64, 4),
    "attend/64/d4/rope/key-sums": attend(64, 4, rope=True, key_sums=True),
    "attend/80/d4/rope": attend(80, 4, rope=True),
    "attend/256/d4": attend(256, 4),
    "attend/256/d4/rope/key-sums": attend(256, 4, rope=True, key_sums=True),
    "encode/d2": EncodeConfig(1, 256, 2, 64, 32),
    "encode/d4": EncodeConfig(1, 256, 4, 64, 32),
    "encode/d4/16-vectors": EncodeConfig(1, 256, 4, 16, 1),
    "encode/d8": EncodeConfig(1, 256, 8, 64, 32),
    "encode/d8/two-stages": EncodeConfig(2, 256, 8, 64, 32),
    "encode-joint/128/d4": SearchConfig(32, 256, 4, 32),
    "encode-joint/128/d8": SearchConfig(16, 256, 8, 32),
    "encode-joint/256/d4": SearchConfig(64, 256, 4, 32),
    "encode-joint/64/d4": SearchConfig(16, 256, 4, 32),
    "encode-heads/128/d4": HeadsConfig(8, SearchConfig(32, 256, 4, 32)),
    "encode-heads/128/d8": HeadsConfig(8, SearchConfig(16, 256, 8, 32)),
    "decode/128/d4": DecodeConfig(128, words(128, 4, 1)),
    "rest/64/key-sums": RestConfig(64, key_sums=True),
    "rest/64/key-sums/null": RestConfig(64, key_sums=True, null=True),
    "rest/128": RestConfig(128),
    "rest/128/key-sums": RestConfig(128, key_sums=True),
    "rest/128/key-sums/hidden": RestConfig(128, key_sums=True, hidden=True),
    "rest/128/key-sums/fp32": RestConfig(128, half=False, key_sums=True),
    "rest/256/key-sums": RestConfig(256, key_sums=True),
    "decode/128/d4/rope/paged": DecodeConfig(128, words(128, 4, 1), paged=True, rope=True),
}
