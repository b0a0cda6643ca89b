"""How kernels are launched: static rules from shapes alone, since CUDA graphs fix a launch.

Figures behind the rules come from offline compilation, see `docs/kernels.md`; nothing is tuned at
run time.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

#: Query rows of a program: the least that wgmma takes well, and the most that registers hold.
LEAST_ROWS, MOST_ROWS = 16, 32
#: Pages below which a split costs more than it gives.
LEAST_PAGES = 2
MOST_SPLITS = 128
#: Programs that a multiprocessor holds at a time, by registers: 128 threads of 128 to 168.
RESIDENT, RESIDENT_TURNED = 4, 3


@dataclass(frozen=True)
class Words:
    """How codes of one stream are read: M, S, K, d, and the bytes read at once."""

    subvectors: int
    stages: int
    codewords: int
    dim: int
    word: int

    def constants(self, prefix: str) -> dict[str, int]:
        """Compile-time arguments of a kernel."""
        names = ("M", "S", "K", "D", "WORD")
        values = (self.subvectors, self.stages, self.codewords, self.dim, self.word)
        return {prefix + name: value for name, value in zip(names, values, strict=True)}


@dataclass(frozen=True)
class AttendConfig:
    """One compiled variant of split-KV attention on codes."""

    head_dim: int
    rows: int
    keys: Words
    values: Words
    paged: bool = False
    rope: bool = False
    key_sums: bool = False
    num_warps: int = 4
    # With more, Triton copies gathers of 16 bytes past L1, where the codebooks are.
    num_stages: int = 1

    def constants(self) -> dict[str, int]:
        """Compile-time arguments of `attend_split`."""
        return {
            "D": self.head_dim,
            "ROWS": self.rows,
            **self.keys.constants("K"),
            **self.values.constants("V"),
            "PAGED": self.paged,
            "ROPE": self.rope,
            "KEY_SUMS": self.key_sums,
        }

    def options(self) -> dict[str, int]:
        """Of the compiler."""
        return {name: asdict(self)[name] for name in ("num_warps", "num_stages")}


def word_bytes(stages: int, *aligned: int) -> int:
    """Bytes read at once: 4, 2 or 1, that divide every one of `aligned`, and whole subvectors."""
    for word in (4, 2, 1):
        if word % stages == 0 and all(number % word == 0 for number in aligned):
            return word
    return 0


def block_rows(rows: int) -> int:
    """Query rows of a program, a power of two, where a KV head has `rows`."""
    padded = 1 << (rows - 1).bit_length()
    return min(max(padded, LEAST_ROWS), MOST_ROWS)


def split_count(programs: int, pages: int, multiprocessors: int, resident: int) -> int:
    """Into how many splits the pages of each of `programs` go.

    The fewest that keep the GPU within a tenth as full as any number does: splits cost partial
    results, and a last wave of few programs leaves multiprocessors idle.
    """
    slots = multiprocessors * resident
    most = max(1, min(pages // LEAST_PAGES, MOST_SPLITS))

    def fullness(splits: int) -> float:
        waves = -(-programs * splits // slots)
        return programs * splits / (waves * slots)

    best = max(fullness(splits) for splits in range(1, most + 1))
    return next(s for s in range(1, most + 1) if fullness(s) >= 0.9 * best)
