"""How kernels are launched: static rules from shapes alone, since CUDA graphs fix a launch.

Figures behind the rules come from offline compilation, see `docs/kernels.md`; nothing is tuned at
run time.
"""

from __future__ import annotations

from dataclasses import dataclass

from vqkv.layouts import PAGE_TOKENS, Layout

#: What kernels that read codes take: channels of a codeword, stages, head dims.
DIMS, STAGES, HEAD_DIMS = (2, 4, 8, 16, 32), (1, 2, 4), range(16, 257)
#: Query rows of a program, padded: as a matrix instruction has them.
ROWS = 16
#: 32-bit values a thread of 128 can keep through the loop without spilling what comes and goes.
MOST_KEPT = 100
#: With more, Triton copies gathers of 16 bytes past L1, where the codebooks are.
NUM_STAGES = 1
#: Pages below which a split costs more than it gives.
LEAST_PAGES = 2
MOST_SPLITS = 128
#: Blocks of a program that looks for nearest codewords, for at least so many vectors.
PROMPT_BLOCKS = ((32, 16384), (8, 1024))
#: Numbers of prepared codewords that a search over groups looks through at a time: it holds their
#: scores beside what else it holds.
SEARCHED = 2048
#: Vectors of a block that goes through all groups of a head. Blocks of 64 would take wgmma, and
#: ptxas 12.8 gets some kernels with wgmma wrong: seen on an H200, and right in the interpreter.
SEARCH_VECTORS = 32
#: Exact tokens, and rows of an output's map, that a program reads at a time: with fewer, more
#: registers hold addresses, and with eight warps a few tokens keep all of them busy.
REST_TOKENS, REST_DEPTH = 64, 64
#: Registers of a thread beside those kept, about, and of a multiprocessor.
PASSING, REGISTERS = 80, 65536


@dataclass(frozen=True)
class Words:
    """How codes of one stream are read: M, S, K, d, and the bytes read at once."""

    subvectors: int
    stages: int
    codewords: int
    dim: int
    word: int

    @property
    def width(self) -> int:
        """Channels in registers: words are padded to a power of two."""
        words = self.subvectors * self.stages // self.word
        return (1 << (words - 1).bit_length()) * (self.word // self.stages) * self.dim

    def constants(self, prefix: str) -> dict[str, int]:
        """Compile-time arguments of a kernel."""
        names = ("M", "S", "K", "D", "WORD")
        values = (self.subvectors, self.stages, self.codewords, self.dim, self.word)
        return {prefix + name: value for name, value in zip(names, values, strict=True)}


@dataclass(frozen=True)
class AttendConfig:
    """One compiled variant of split-KV attention on codes."""

    head_dim: int
    keys: Words
    values: Words
    paged: bool = False
    rope: bool = False
    key_sums: bool = False

    def constants(self) -> dict[str, int]:
        """Compile-time arguments of `attend_split`."""
        return {
            "D": self.head_dim,
            "ROWS": ROWS,
            **self.keys.constants("K"),
            **self.values.constants("V"),
            "PAGED": self.paged,
            "ROPE": self.rope,
            "KEY_SUMS": self.key_sums,
        }

    def options(self) -> dict[str, int]:
        """Of the compiler. Eight warps issue more instructions, but hold what four would spill."""
        return {"num_warps": 4 if self._kept() <= MOST_KEPT else 8, "num_stages": NUM_STAGES}

    def resident(self) -> int:
        """Programs that a multiprocessor holds at a time, by registers, about."""
        warps = self.options()["num_warps"]
        return max(1, REGISTERS // (32 * warps * (self._kept() * 4 // warps + PASSING)))

    def _kept(self) -> int:
        """32-bit values that a thread of 128 keeps through the loop."""
        sums = ROWS * (self.values.width + self.keys.width * self.key_sums)
        page = self.keys.width * PAGE_TOKENS // 2  # fp16: two a register
        turns = 2 * page if self.rope else 0  # of a page, and its turned keys
        return (sums + turns + page) // 128


@dataclass(frozen=True)
class EncodeConfig:
    """One compiled variant of the nearest codewords of one stream."""

    stages: int
    codewords: int
    dim: int
    vectors: int
    blocks: int

    def constants(self) -> dict[str, int]:
        """Compile-time arguments of `encode_codes`."""
        return {
            "S": self.stages,
            "K": self.codewords,
            "DIM": self.dim,
            "VECTORS": self.vectors,
            "BLOCKS": self.blocks,
        }

    def options(self) -> dict[str, int]:
        """Of the compiler."""
        return {"num_warps": 4, "num_stages": NUM_STAGES}


@dataclass(frozen=True)
class SearchConfig:
    """One compiled variant of a search over all groups of a head."""

    groups: int
    codewords: int
    dim: int
    vectors: int

    @property
    def size(self) -> int:
        """Codewords, padded to what a matrix instruction takes."""
        return max(16, 1 << (self.codewords - 1).bit_length())

    @property
    def depth(self) -> int:
        """Of a product with codewords: channels three times, a norm's halves, a constant."""
        return max(16, 1 << (3 * self.dim + 2).bit_length())

    def constants(self) -> dict[str, int]:
        """Compile-time arguments of `encode_jointly` and, of each head, `encode_heads`."""
        return {
            "GROUPS": self.groups,
            "K": self.codewords,
            "DIM": self.dim,
            "SIZE": self.size,
            "PART": min(self.size, SEARCHED // self.depth),
            "DEPTH": self.depth,
            "CHANNELS": max(16, 1 << (self.groups * self.dim - 1).bit_length()),
            "VECTORS": self.vectors,
        }

    def options(self) -> dict[str, int]:
        """Of the compiler. Errors in more than 128 channels do not fit into two warps."""
        return {"num_warps": 2 if self.groups * self.dim <= 128 else 4, "num_stages": NUM_STAGES}


@dataclass(frozen=True)
class HeadsConfig:
    """One compiled variant of a search over the heads of a set."""

    heads: int
    search: SearchConfig

    def constants(self) -> dict[str, int]:
        """Compile-time arguments of `encode_heads`."""
        return {**self.search.constants(), "HEADS": self.heads}

    def options(self) -> dict[str, int]:
        """Of the compiler."""
        return {"num_warps": 4, "num_stages": NUM_STAGES}


@dataclass(frozen=True)
class DecodeConfig:
    """One compiled variant of pages of codes to states."""

    head_dim: int
    words: Words
    paged: bool = False
    rope: bool = False

    def constants(self) -> dict[str, int]:
        """Compile-time arguments of `decode_pages`."""
        words = self.words
        return {
            "D": self.head_dim,
            "M": words.subvectors,
            "S": words.stages,
            "K": words.codewords,
            "DIM": words.dim,
            "WORD": words.word,
            "PAGED": self.paged,
            "ROPE": self.rope,
        }

    def options(self) -> dict[str, int]:
        """Of the compiler."""
        return {"num_warps": 4, "num_stages": NUM_STAGES}


@dataclass(frozen=True)
class RestConfig:
    """One compiled variant of what follows attention on codes."""

    head_dim: int
    half: bool = True  # exact states are of two bytes
    key_sums: bool = False
    bias: bool = True
    hidden: bool = False
    null: bool = False  # scores without a value

    def constants(self) -> dict[str, int]:
        """Compile-time arguments of `attend_rest`."""
        return {
            "D": self.head_dim,
            "WIDTH": max(16, 1 << (self.head_dim - 1).bit_length()),
            "ROWS": ROWS,
            "TOKENS": REST_TOKENS,
            "DEPTH": REST_DEPTH,
            "KEY_SUMS": self.key_sums,
            "BIAS": self.bias,
            "HIDDEN": self.hidden,
            "NULL": self.null,
        }

    def options(self) -> dict[str, int]:
        """Of the compiler. Loads of the next tokens wait in shared memory, where there is room."""
        return {"num_warps": 8, "num_stages": 2 if self.half else 1}


def word_bytes(stages: int, *aligned: int) -> int:
    """Bytes read at once: 4, 2 or 1, that divide every one of `aligned`, and whole subvectors."""
    for word in (4, 2, 1):
        if word % stages == 0 and all(number % word == 0 for number in aligned):
            return word
    return 0


def odd_shape(layout: Layout) -> str | None:
    """Why the kernels that read codes do not take a stream's shape, or None."""
    segment = layout.segments[0]
    if segment.dim not in DIMS or segment.stages not in STAGES:
        return (
            f"subvectors of {segment.dim} channels in {segment.stages} stages; "
            f"{DIMS} channels in {STAGES} stages are read"
        )
    if layout.head_dim not in HEAD_DIMS:
        return f"head dim {layout.head_dim} is not within 16 to 256"
    return None


def encode_blocks(vectors: int) -> tuple[int, int]:
    """Vectors of a block, and blocks of a program, that looks for nearest codewords.

    A program prepares its codewords once for all its blocks; scores of more vectors than 64 do not
    fit into registers.
    """
    if vectors <= 16:
        return 16, 1
    return 64, next((blocks for blocks, least in PROMPT_BLOCKS if vectors >= least), 1)


def split_count(programs: int, pages: int, multiprocessors: int, resident: int) -> int:
    """Into how many splits the pages of each of `programs` go.

    The fewest that read at most a twentieth longer than the best number does: splits cost partial
    results, a last wave of few programs leaves multiprocessors idle, and the longest split of a
    program is what the others wait for.
    """
    slots = multiprocessors * resident
    most = max(1, min(pages // LEAST_PAGES, MOST_SPLITS))

    def pages_in_turn(splits: int) -> int:
        waves = -(-programs * splits // slots)
        return waves * -(-pages // splits)

    best = min(pages_in_turn(splits) for splits in range(1, most + 1))
    return next(s for s in range(1, most + 1) if pages_in_turn(s) <= 1.05 * best)
