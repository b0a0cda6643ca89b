"""Everything linear before a stream's codes as one map of its states, for kernels that encode.

Where transforms map states x to `(x − μ) A`, and other states s predict `s B + β` of them, what is
coded is

    z = (x − β − μ) A − s B A
"""

from __future__ import annotations

import torch

from vqkv.codec import Codec
from vqkv.folding import NotFoldable, codewords_of
from vqkv.kernels.encode.mapped import MappedCodes, Maps
from vqkv.quantizers.joint_product import JointProductQuantizer
from vqkv.quantizers.product import ProductQuantizer

#: Of a probe: a power of two, so that dividing by it rounds nothing.
LENGTH = 1024.0


def mapped_codes(codec: Codec) -> MappedCodes:
    """Of a fitted codec.

    Raises:
        NotFoldable: its codes are no bytes of single stages, or states are not mapped head by head
            to what is coded, with the reason.
    """
    if type(codec) is not Codec:
        raise NotFoldable(f"a {type(codec).__name__} codes in its own way")
    quantizer, segment = codec.quantizers[0], codec.layout.segments[0]
    if type(quantizer) not in (ProductQuantizer, JointProductQuantizer):
        raise NotFoldable(f"{type(quantizer).__name__} does not code head by head, in bytes")
    if len(codec.quantizers) > 1 or segment.stages > 1 or segment.code_bits != 8:
        raise NotFoldable("a code is not one byte")
    stuck = [t.config.type for t in codec.transforms if not t.folds or t.token_group != 1]
    if stuck or codec.layout.side_count or not codec.layout.head_local:
        raise NotFoldable(f"transforms do not fold: {', '.join(stuck) or 'heads are mixed'}")
    if len(codec.layout.sources) > 1:
        raise NotFoldable(f"predicted from {len(codec.layout.sources)} streams, one is mapped")
    order = codec.order_ % codec.head_dim  # [H, n]: which channel each coded one is
    zero, eye = _probes(codec)
    shift = _forward(codec, zero)  # −μ A
    # Long probes, since a mean that is far larger than them would cost digits.
    matrix = (_forward(codec, LENGTH * eye) - shift) / LENGTH
    # Subtracted first, μ costs no digits where it is far larger than what states vary by.
    solved = torch.linalg.lstsq(matrix.mT.cpu().double(), shift.mT.cpu().double()).solution
    mean = -solved.mT.to(shift)
    offset = shift + mean @ matrix
    source_matrix = None
    if codec.predictor is not None:
        bias = codec.predictor.predict([zero]).transpose(0, 1)
        weight = (codec.predictor.predict([LENGTH * eye]).transpose(0, 1) - bias) / LENGTH
        mean = mean + bias
        source_matrix = -weight @ matrix
    coupled, sweeps, width = None, 1, 1
    if isinstance(quantizer, JointProductQuantizer) and hasattr(quantizer, "coupled_"):
        coupled = quantizer.coupled_
        sweeps, width = quantizer.config.sweeps, quantizer.config.width

    def ordered(x: torch.Tensor) -> torch.Tensor:
        return x.gather(2, order[:, None].expand(-1, x.shape[1], -1)).contiguous()

    maps = Maps(
        mean[:, 0].contiguous(),
        ordered(matrix),
        None if source_matrix is None else ordered(source_matrix),
        ordered(offset)[:, 0],
    )
    return MappedCodes(maps, codewords_of(codec).flatten(0, 1).half(), coupled, sweeps, width)


def _probes(codec: Codec) -> tuple[torch.Tensor, torch.Tensor]:
    """No states, and a head's channels one after the other: `[1, H, D]` and `[D, H, D]`."""
    eye = torch.eye(codec.head_dim, device=codec.order_.device)
    eye = eye.unsqueeze(1).expand(-1, codec.heads, -1)
    return torch.zeros_like(eye[:1]), eye


def _forward(codec: Codec, x: torch.Tensor) -> torch.Tensor:
    """States `[N, H, D]` through the transforms, `[H, N, D]`."""
    for transform in codec.transforms:
        x, _ = transform.forward(x)
    return x.float().transpose(0, 1)
