"""Compile shipped kernels without a GPU and report what they issue, as JSON.

    python -m tests.kernels.offline > tests/kernels/budgets.json

renews the budgets: what `tests/kernels/test_offline.py` then holds every kernel to.
"""

from __future__ import annotations

import os

os.environ["TRITON_INTERPRET"] = "0"

import json
import sys
import tempfile
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from tests.kernels.sass import Disassembly, nvidia_tool
from vqkv.kernels.gpu.attend import attend_split, merge_splits
from vqkv.kernels.gpu.configs import (
    AttendConfig,
    DecodeConfig,
    EncodeConfig,
    HeadsConfig,
    RestConfig,
    SearchConfig,
    Words,
)
from vqkv.kernels.gpu.decode import decode_pages, decode_vectors
from vqkv.kernels.gpu.encode import encode_codes, encode_pair
from vqkv.kernels.gpu.encode_heads import encode_heads
from vqkv.kernels.gpu.encode_joint import encode_jointly, prepare_books
from vqkv.kernels.gpu.rest import attend_rest
from vqkv.kernels.gpu.shipped import SHIPPED, Config
from vqkv.layouts import PAGE_TOKENS

CAPABILITIES = (80, 90)

KERNELS: dict[type, Any] = {
    AttendConfig: attend_split,
    EncodeConfig: encode_codes,
    SearchConfig: encode_jointly,
    HeadsConfig: encode_heads,
    DecodeConfig: decode_pages,
    RestConfig: attend_rest,
}
Encoders = EncodeConfig | SearchConfig | HeadsConfig
#: Types of pointers.
POINTERS = {
    **dict.fromkeys(("x", "key_x", "value_x", "states"), "*fp16"),
    **dict.fromkeys(("codes", "key_codes", "value_codes"), "*u8"),
    **dict.fromkeys(
        ("books", "words", "key_books", "value_books", "matrices", "coupling", "errors"), "*fp16"
    ),
    **dict.fromkeys(("start", "stop", "pages", "pairs"), "*i32"),
    **dict.fromkeys(
        ("units", "query", "page_turns", "offset_turns", "output", "lse", "key_mean"), "*fp32"
    ),
    **dict.fromkeys(("key_means", "bias", "null"), "*fp32"),
    "hidden": "*u8",
    **dict.fromkeys(("means", "maps", "source_maps", "offsets", "source"), "*fp32"),
    **dict.fromkeys(("merged", "merged_lse", "merged_key_mean", "decoded"), "*fp32"),
}


#: Pointers to exact states.
STATES = ("sink_keys", "sink_values", "tail_keys", "tail_values")


def compiled(config: Config, capability: int) -> Any:
    """A kernel for a GPU, as a launch with aligned tensors would have it."""
    kernel, constants = KERNELS[type(config)], config.constants()
    pointers = POINTERS
    if isinstance(config, Encoders):
        whole_lines = False
    elif isinstance(config, RestConfig):
        whole_lines = True
        pointers = POINTERS | dict.fromkeys(STATES, "*bf16" if config.half else "*fp32")
    else:
        token = config.keys if isinstance(config, AttendConfig) else config.words
        whole_lines = token.subvectors * token.stages % 16 == 0
    return build(kernel, constants, config.options(), capability, whole_lines, pointers)


def build(
    kernel: Any,
    constants: dict[str, int],
    options: dict[str, int],
    capability: int,
    whole_lines: bool = False,
    pointers: dict[str, str] = POINTERS,
) -> Any:
    """Compile with aligned pointers, and strides divisible by 16 where tokens are `whole_lines`."""
    signature, attributes = {}, {}
    for index, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
            continue
        signature[name] = pointers.get(name, "i32")
        stride = name.endswith(("_row", "_head", "_token"))
        if name in pointers or (stride and whole_lines):
            attributes[(index,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constants, attributes)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def build_helpers(capability: int) -> None:
    """Compile what has no budget: small kernels, and one whose integer arguments are all 1, for
    which Triton has a variant too."""
    pair = {"KS": 1, "KK": 256, "KD": 4, "VS": 2, "VK": 256, "VD": 8, "VECTORS": 16, "BLOCKS": 1}
    shape = {"S": 1, "K": 256, "DIM": 4, "ROWS": 64}
    for kernel, constants in (
        (merge_splits, {"D": 128, "SPLITS": 66, "KEY_SUMS": True}),
        (decode_vectors, shape),
        (encode_pair, pair),
        (prepare_books, {"K": 256, "DIM": 4, "SIZE": 256, "DEPTH": 16}),
    ):
        build(kernel, constants, {"num_warps": 4}, capability)
    config = SHIPPED["attend/80/d4/rope"]
    ones = {name: 1 for name in attend_split.arg_names if name not in POINTERS}
    build(attend_split, ones | config.constants(), config.options(), capability)


def report(config: Config, capability: int) -> dict[str, Any]:
    """What a kernel holds and issues. Instructions are of a warp, for one token of one head (or one
    vector in one subspace, encoding; of heads coded together one vector in one head, loops over
    groups and other heads counted once)."""
    binary = compiled(config, capability)
    sass, registers = disassembled(binary.asm["cubin"])
    tokens = _vectors(config) if isinstance(config, Encoders) else PAGE_TOKENS
    warps = config.options()["num_warps"]
    loads = sass.global_loads()
    return {
        "instructions": round(len(sass.main_loop) * warps / tokens, 1),
        "registers": registers,
        "shared_bytes": binary.metadata.shared,
        "spills": sass.spills,
        "past_l1": sass.past_l1,
        "unset_uniforms": sass.unset_uniforms,
        "lost_products": sass.lost_products,
        "matrix": "wgmma" if sass.count("HGMMA") else "mma" if sass.count("HMMA") else None,
        "gathers": gathers(config) // (32 * warps),
        "wide_loads": sum(loads[width] for width in loads if width >= gather_bytes(config)),
    }


def _vectors(config: Encoders) -> int:
    """That a program takes at a time."""
    return config.search.vectors if isinstance(config, HeadsConfig) else config.vectors


def gathers(config: Config) -> int:
    """Loads of codewords of one page, or none where they are no gathers."""

    def of(plane: Words) -> int:
        loads = max(1, 2 * plane.dim // 16)
        return plane.width // plane.dim * plane.stages * loads * PAGE_TOKENS

    if isinstance(config, AttendConfig):
        return of(config.keys) + of(config.values)
    return of(config.words) if isinstance(config, DecodeConfig) else 0


def gather_bytes(config: Config) -> int:
    """Of one load of a codeword in fp16."""
    if isinstance(config, Encoders | RestConfig):
        return 16
    plane = config.keys if isinstance(config, AttendConfig) else config.words
    return min(16, 2 * plane.dim)


def disassembled(cubin: bytes) -> tuple[Disassembly, int]:
    """Of a binary, and its registers per thread."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = nvidia_tool("cuobjdump", "-res-usage", file.name)
        sass = Disassembly(nvidia_tool("nvdisasm", "-c", file.name))
    return sass, int(usage.split("REG:")[1].split()[0])


def main() -> None:
    """Print reports by GPU and name."""
    reports: dict[str, Any] = {"triton": triton.__version__}
    for capability in CAPABILITIES:
        build_helpers(capability)
        reports[f"sm_{capability}"] = {
            name: report(config, capability) for name, config in SHIPPED.items()
        }
    json.dump(reports, sys.stdout, indent=2)
    print()


if __name__ == "__main__":
    main()
