"""What product and residual quantizers share: codebooks and the nearest codeword."""

from __future__ import annotations

import torch

from vqkv.errors import StateError
from vqkv.kernels.decode import decode
from vqkv.kernels.encode import encode
from vqkv.quantizers.base import Quantizer


class CodebookQuantizer(Quantizer):
    """A quantizer whose state is `codewords_` `[M, S, K, d]` in fp16.

    Codewords are rounded to fp16 once, when learned, so that encoding compares against the very
    values that decoding returns.
    """

    codewords_: torch.Tensor

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        """Codes `[N, M, S]` (int32), greedy over stages.

        Raises:
            NotFittedError: before fit.
            StateError: `x` does not have the codebooks' M and d.
        """
        return encode(self._checked(x), self._codewords())

    def decode(self, codes: torch.Tensor) -> torch.Tensor:
        """Vectors `[N, M, d]` (fp32) of codes `[N, M, s]`, s ≤ S.

        Raises NotFittedError, or StateError on a wrong shape.
        """
        books = self._codewords()
        subspaces, stages = books.shape[:2]
        if codes.ndim != 3 or codes.shape[1] != subspaces or not 1 <= codes.shape[2] <= stages:
            upto = "up to " if stages > 1 else ""
            raise StateError(
                f"codes have shape [N, {subspaces}, {upto}{stages}], given {list(codes.shape)}"
            )
        return decode(codes, books[:, : codes.shape[2]])

    def gradient(self, codes: torch.Tensor, by_vectors: torch.Tensor) -> torch.Tensor:
        """By each codeword `[M, S, K, d]` (fp32), of a loss with a gradient by decoded vectors.

        Args:
            codes: `[N, M, S]`.
            by_vectors: `[N, M, d]`, by what these codes decode to; a codeword's is the sum over the
                vectors that it is part of.
        """
        subspaces, stages, count, dim = self._codewords().shape
        books = torch.arange(subspaces * stages, device=codes.device).view(subspaces, stages)
        places = (codes + books * count).flatten()
        spread = by_vectors.unsqueeze(2).expand(-1, -1, stages, -1).reshape(-1, dim)
        found = spread.new_zeros(subspaces * stages * count, dim, dtype=torch.float64)
        # In a fixed order on GPUs too, and on CPUs where it is fp64, which index_add_ is not.
        found.index_put_((places,), spread.double(), accumulate=True)
        return found.view(subspaces, stages, count, dim).float()

    def planned_bytes(self, subspaces: int, dim: int) -> int:
        """Codewords `[M, S, K, d]` in fp16."""
        return 2 * subspaces * self.config.stages(dim) * dim << self.config.bits()

    def state(self) -> dict[str, torch.Tensor]:
        """`codewords` `[M, S, K, d]` in fp16."""
        return {"codewords": self._codewords()}

    def load_state(self, state: dict[str, torch.Tensor]) -> None:
        """Take over `codewords`. Raises StateError on another name, rank, type or K."""
        if set(state) != {"codewords"}:
            raise StateError(f"state holds 'codewords' alone, given {sorted(state)}")
        codewords = state["codewords"]
        if codewords.ndim != 4 or codewords.dtype != torch.float16:
            raise StateError(
                f"codewords are float16 [M, S, K, d], given {codewords.dtype} "
                f"{list(codewords.shape)}"
            )
        expected = (self.config.stages(codewords.shape[3]), 2 ** self.config.bits())
        if tuple(codewords.shape[1:3]) != expected:
            raise StateError(
                f"codewords have S, K = {expected}, given {tuple(codewords.shape[1:3])}"
            )
        self.codewords_ = codewords

    def _checked(self, x: torch.Tensor) -> torch.Tensor:
        """The same vectors in fp32."""
        books = self._codewords()
        if x.ndim != 3 or x.shape[1:] != (books.shape[0], books.shape[3]):
            raise StateError(
                f"vectors have shape [N, {books.shape[0]}, {books.shape[3]}], given {list(x.shape)}"
            )
        return x.float()

    def keep(self, codewords: torch.Tensor) -> None:
        """Take codewords `[M, S, K, d]`, rounded. Raises StateError where fp16 cannot hold them."""
        rounded = codewords.to(torch.float16)
        if not bool(torch.isfinite(rounded).all()):
            raise StateError(
                f"codewords reach {float(codewords.abs().max()):.3g}, beyond fp16's 65504: "
                "scale the states with a channel_scale or token_scale transform"
            )
        self.codewords_ = rounded

    def _codewords(self) -> torch.Tensor:
        if not hasattr(self, "codewords_"):
            raise self.needs_fit()
        return self.codewords_
