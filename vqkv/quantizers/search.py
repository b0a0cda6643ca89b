"""Better codes than greedy ones for codewords that add up: beam search and refinement."""

from __future__ import annotations

import torch

from vqkv.kernels.decode import decode
from vqkv.kernels.encode import encode
from vqkv.kernels.encode.beam import encode_beam


def beam_search(x: torch.Tensor, codewords: torch.Tensor, width: int) -> torch.Tensor:
    """Codes `[N, M, S]` of `x` `[N, M, d]` that are never worse than greedy ones, stage by stage.

    A greedy path may fall out of the beam of `width` partial sums and yet end better, so the
    greedy codes stay a candidate.
    """
    return better(x, codewords, encode(x, codewords), encode_beam(x, codewords, width))


def refine(
    x: torch.Tensor, codewords: torch.Tensor, codes: torch.Tensor, rounds: int
) -> torch.Tensor:
    """Codes that are never worse than `codes`: each stage chosen anew given all others, in turn.

    A stage's new code is the nearest to what the other stages leave over, so no step raises a
    vector's error but by rounding, and what that would make worse is not taken.
    """
    current = codes.clone()
    for _ in range(rounds):
        before = current.clone()
        for stage in range(codewords.shape[1]):
            others = [s for s in range(codewords.shape[1]) if s != stage]
            rest = x - decode(current[..., others].contiguous(), codewords[:, others])
            current[..., stage] = encode(rest, codewords[:, stage : stage + 1])[..., 0]
        current = better(x, codewords, before, current)
        if torch.equal(current, before):
            break
    return current


def better(
    x: torch.Tensor, codewords: torch.Tensor, first: torch.Tensor, second: torch.Tensor
) -> torch.Tensor:
    """Of two codes of each vector the one of less error, the first among equals."""
    errors = [(x - decode(codes, codewords)).square().sum(-1) for codes in (first, second)]
    return torch.where((errors[1] < errors[0]).unsqueeze(-1), second, first)
