"""Beam search in torch, stage by stage, on what the kept sums leave over."""

from __future__ import annotations

import torch

from vqkv.kernels.select import Kernel, anywhere

#: Scores and channels of residuals held at a time; each bounded to about 16 MiB.
MAX_HELD = 1 << 22


def encode_beam(x: torch.Tensor, codewords: torch.Tensor, width: int) -> torch.Tensor:
    """Codes `[N, M, S]`."""
    books, _, size, dim = codewords.shape
    rows = max(1, MAX_HELD // (width * books * max(size, dim)))
    return torch.cat([_beam(part, codewords, width) for part in x.split(rows)])


def _beam(x: torch.Tensor, codewords: torch.Tensor, width: int) -> torch.Tensor:
    count, books, dim = x.shape
    size = codewords.shape[2]
    residual = x.transpose(0, 1).unsqueeze(2)  # [M, N, B, d], B growing up to width
    codes = torch.zeros(books, count, 1, 0, dtype=torch.int32, device=x.device)
    for stage in codewords.unbind(1):  # [M, K, d]
        beams = residual.shape[2]
        flat = residual.reshape(books, count * beams, dim)
        # ‖r − c‖² = ‖r‖² − 2⟨r, c⟩ + ‖c‖²
        scores = torch.baddbmm(
            stage.square().sum(-1).unsqueeze(1), flat, stage.transpose(1, 2), alpha=-2
        )
        scores = scores + flat.square().sum(-1, keepdim=True)
        kept = min(width, beams * size)
        chosen = scores.view(books, count, beams * size).topk(kept, largest=False).indices
        parent, code = chosen // size, chosen % size  # [M, N, B]
        codes = torch.cat(
            [
                codes.gather(2, parent.unsqueeze(-1).expand(-1, -1, -1, codes.shape[3])),
                code.unsqueeze(-1).int(),
            ],
            -1,
        )
        # By rows: `gather` would look every channel up.
        parents = parent + beams * torch.arange(books * count, device=x.device).view(books, -1, 1)
        picked = code + size * torch.arange(books, device=x.device).view(-1, 1, 1)
        chosen_residual = flat.flatten(0, 1)[parents.flatten()]
        chosen_codeword = stage.flatten(0, 1)[picked.flatten()]
        residual = (chosen_residual - chosen_codeword).view(books, count, kept, dim)
    best = residual.square().sum(-1).argmin(2)  # [M, N]
    index = best[..., None, None].expand(-1, -1, 1, codes.shape[3])
    return codes.gather(2, index)[:, :, 0].transpose(0, 1)


KERNEL = Kernel("encode_beam", "naive", encode_beam, anywhere, speed=0)
