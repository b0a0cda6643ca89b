"""Which variant of the kernel a launch needs: rules from shapes, since CUDA graphs fix a launch."""

from __future__ import annotations

from dataclasses import dataclass

from vqkv.kernels.gpu.configs import MOST_SPLITS
from vqkv.layouts import Layout

#: Head dims and channels of a codeword whose subvectors come in eighths of 1, 2 or 4.
HEAD_DIMS, DIMS = (64, 128), (4, 8)
#: A byte names one of them.
CODEWORDS = 256
#: Query rows that a launch reads codes for; more need another.
MOST_ROWS = 16
#: Of every entry in shared memory: no lanes of a warp meet in a bank.
KEY_COPIES, VALUE_COPIES = 2, 4
#: The first GPU whose blocks may have so much shared memory; consumer GPUs after it have less.
HOPPER, MOST_SHARED_BYTES = 90, 227 * 1024
#: Pages that eight warps read at once, a tile each: on an H200 a second tile, which then has no
#: tokens, took up to a twelfth longer in `fast-2bit`. And pages up to which what more warps take to
#: begin is guessed to outweigh how fast they are then.
FEW_PAGES, SOME_PAGES = 2, 15


def most_pages(pages: int) -> int | None:
    """For a block of so many: `FEW_PAGES`, `SOME_PAGES`, or None, as there may be any number."""
    return next((most for most in (FEW_PAGES, SOME_PAGES) if pages <= most), None)


@dataclass(frozen=True)
class AttendVariant:
    """One compiled variant of `attend.cu`.

    `key_token` and `value_token` are the bytes from one token's codes to the next's; `most_pages`,
    of `most_pages`, those that a block has at most.
    """

    head_dim: int
    dim: int
    rows: int
    key_token: int
    value_token: int
    rope: bool = False
    key_sums: bool = False
    paged: bool = False
    most_pages: int | None = None

    @property
    def name(self) -> str:
        """Of the kernel and of its source."""
        return "attend"

    @property
    def padded_rows(self) -> int:
        """4, 8 or 16."""
        return max(4, 1 << (self.rows - 1).bit_length())

    @property
    def warps(self) -> int:
        """Of a block, which has a multiprocessor for itself.

        As measured on an H200: more of them are slower to begin and to add up, and where keys are
        turned hardly faster between. After RoPE 12 were faster than 16 for d = 8; for d = 4 they
        have not been measured.
        """
        few = self.padded_rows > 8 or self.key_sums or self.rope or self.most_pages is not None
        return 8 if few else 12

    @property
    def tiles(self) -> int:
        """That a warp reads at a time: one's instructions fill waits of the other's.

        Two, where there are registers for both, and pages. With key sums of d = 4 one was a tenth
        faster on an H200, in a kernel that took more registers; two are the choice of the tests'
        model of a multiprocessor.
        """
        return 2 if self.padded_rows <= 8 and self.most_pages != FEW_PAGES else 1

    @property
    def threads(self) -> int:
        """Of a block."""
        return 32 * self.warps

    @property
    def chunk(self) -> int:
        """Pages whose turned queries are made between two barriers.

        The more, the fewer barriers; two chunks of them have to fit.
        """
        if not self.rope:
            return 0
        batch, page = self.tiles * self.warps // 4, 2 * self.padded_rows * self.head_dim
        fitting = (MOST_SHARED_BYTES - self._tables_and_rows) // (2 * page)
        return min(64 // self.padded_rows, fitting) // batch * batch

    @property
    def shared_bytes(self) -> int:
        """Tables of both streams, queries, what warps found, and two chunks of turned queries."""
        return self._tables_and_rows + 4 * self.chunk * self.padded_rows * self.head_dim

    @property
    def _tables_and_rows(self) -> int:
        tables = (KEY_COPIES + VALUE_COPIES) * CODEWORDS * self.head_dim
        columns = max(8, self.padded_rows)
        return tables + 4 * self.padded_rows * self.head_dim + 8 * self.warps * columns

    def macros(self) -> tuple[tuple[str, int], ...]:
        """What the source is compiled with."""
        values = {
            "HEAD_DIM": self.head_dim,
            "DIM": self.dim,
            "ROWS": self.padded_rows,
            "WARPS": self.warps,
            "TILES": self.tiles,
            "CHUNK": self.chunk,
            "KEY_TOKEN": self.key_token,
            "VALUE_TOKEN": self.value_token,
            "ROPE": self.rope,
            "KEY_SUMS": self.key_sums,
            "PAGED": self.paged,
        }
        return tuple(values.items())


@dataclass(frozen=True)
class MergeVariant:
    """One compiled variant of `merge.cu`."""

    head_dim: int
    key_sums: bool = False

    @property
    def name(self) -> str:
        """Of the kernel and of its source."""
        return "merge"

    @property
    def threads(self) -> int:
        """One for each channel."""
        return self.head_dim

    @property
    def shared_bytes(self) -> int:
        """A weight for each split."""
        return 4 * MOST_SPLITS

    def macros(self) -> tuple[tuple[str, int], ...]:
        """What the source is compiled with."""
        return (("HEAD_DIM", self.head_dim), ("KEY_SUMS", self.key_sums))


Variant = AttendVariant | MergeVariant


def odd_shape(layout: Layout) -> str | None:
    """Why the kernel does not read a stream of this layout, or None."""
    segment = layout.segments[0]
    if layout.head_dim not in HEAD_DIMS:
        return f"head dim {layout.head_dim} is none of {HEAD_DIMS}"
    if segment.dim not in DIMS or segment.stages != 1:
        return (
            f"subvectors of {segment.dim} channels in {segment.stages} stages; "
            f"{DIMS} channels in one stage are read"
        )
    return None
