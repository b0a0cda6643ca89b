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
#: Of every entry of values: each lane of a warp has a bank of its own.
VALUE_COPIES = 4
#: The first GPU whose blocks may have so much shared memory; consumer GPUs after it have less.
HOPPER, MOST_SHARED_BYTES = 90, 227 * 1024


@dataclass(frozen=True)
class AttendVariant:
    """One compiled variant of `attend.cu`.

    `key_token` and `value_token` are the bytes from one token's codes to the next's.
    """

    head_dim: int
    dim: int
    rows: int
    key_token: int
    value_token: int
    rope: bool = False
    key_sums: bool = False
    paged: bool = False

    @property
    def name(self) -> str:
        """Of the kernel and of its source."""
        return "attend"

    @property
    def padded_rows(self) -> int:
        """4, 8 or 16."""
        return max(4, 1 << (self.rows - 1).bit_length())

    @property
    def key_copies(self) -> int:
        """Of every entry of keys: the more, the fewer lanes meet in a bank.

        One at D = 128, where turns of queries need what else is left of L1.
        """
        return 4 if self.head_dim <= 64 else 1 if self.rope else 2

    @property
    def warps(self) -> int:
        """Of a block, which has a multiprocessor for itself.

        As measured on an H200: more of them are slower to begin and to add up, and hardly faster
        between. For d = 8 after RoPE 8 have not been measured with the loop as it is.
        """
        few = self.padded_rows > 8 or self.key_sums or self.rope or self.dim == 4
        return 8 if few else 12

    @property
    def tiles(self) -> int:
        """That a warp reads at a time: one's instructions fill waits of the other's.

        Two, where there are registers for both; at D = 64 by their number alone, not by times.
        """
        full = self.padded_rows > 8 or (self.key_sums and self.dim == 4 and self.head_dim > 64)
        return 1 if full else 2

    @property
    def threads(self) -> int:
        """Of a block."""
        return 32 * self.warps

    @property
    def shared_bytes(self) -> int:
        """Tables of both streams, queries, what warps found, and two chunks of turned queries."""
        tables = (self.key_copies + VALUE_COPIES) * CODEWORDS * self.head_dim
        columns = max(8, self.padded_rows)
        small = 4 * self.padded_rows * self.head_dim + 8 * self.warps * columns
        batch = self.tiles * self.warps // 4
        chunk = 64 // self.padded_rows // batch * batch
        turned = 4 * chunk * self.padded_rows * self.head_dim if self.rope else 0
        return tables + small + turned

    def macros(self) -> tuple[tuple[str, int], ...]:
        """What the source is compiled with."""
        values = {
            "HEAD_DIM": self.head_dim,
            "DIM": self.dim,
            "ROWS": self.padded_rows,
            "WARPS": self.warps,
            "TILES": self.tiles,
            "KEY_COPIES": self.key_copies,
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
