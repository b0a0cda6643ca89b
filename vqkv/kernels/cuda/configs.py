"""Which variant of the kernel a launch needs: rules from shapes, since CUDA graphs fix a launch."""

from __future__ import annotations

from dataclasses import dataclass

from vqkv.layouts import Layout

#: Head dims and channels of a codeword whose subvectors come in eighths of 1, 2 or 4.
HEAD_DIMS, DIMS = (64, 128), (4, 8)
#: A byte names one of them.
CODEWORDS = 256
#: Query rows that a launch reads codes for; more need another.
MOST_ROWS = 16
#: Of every entry in shared memory. With two, look-ups of 32 lanes take two wavefronts at d = 4 and
#: four at d = 8, whatever the codes; four copies do not fit at D = 128.
COPIES = 2
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
    def padded_rows(self) -> int:
        """4, 8 or 16."""
        return max(4, 1 << (self.rows - 1).bit_length())

    @property
    def warps(self) -> int:
        """As many as registers are there for: sums, turned keys and turns take most of them."""
        if self.padded_rows > 8:
            return 8
        return 12 if self.key_sums else 16

    @property
    def threads(self) -> int:
        """Of a block."""
        return 32 * self.warps

    @property
    def shared_bytes(self) -> int:
        """Tables of both streams, queries, what warps found, and two chunks of turned queries."""
        tables = 2 * COPIES * CODEWORDS * self.head_dim
        columns = max(8, self.padded_rows)
        small = 4 * self.padded_rows * self.head_dim + 8 * self.warps * columns
        pages = self.warps // 4
        chunk = 64 // self.padded_rows // pages * pages
        turned = 4 * chunk * self.padded_rows * self.head_dim if self.rope else 0
        return tables + small + turned

    def macros(self) -> tuple[tuple[str, int], ...]:
        """What the source is compiled with."""
        values = {
            "HEAD_DIM": self.head_dim,
            "DIM": self.dim,
            "ROWS": self.padded_rows,
            "WARPS": self.warps,
            "COPIES": COPIES,
            "KEY_TOKEN": self.key_token,
            "VALUE_TOKEN": self.value_token,
            "ROPE": self.rope,
            "KEY_SUMS": self.key_sums,
            "PAGED": self.paged,
        }
        return tuple(values.items())


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
