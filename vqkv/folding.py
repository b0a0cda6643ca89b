"""Everything linear around a layer's codes, moved into its queries and its output.

With decoded subvectors z of keys and y of values, in coded order, and maps found when fitting,

    k = z A + μ        v = y W + k B + β

scores are `q · k = (q Aᵀ) · z + q · μ`, where the second term is the same for every coded token,
and the output is `Σ p v = (Σ p y) W + (Σ p k) B + β`. A map that only mixes channels of one
subvector goes into the codewords themselves, so keys coded before RoPE can have one too.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from vqkv.codec import Codec
from vqkv.drafts import DraftCodec
from vqkv.kernels.attend.codes import Partial
from vqkv.quantizers.codebook import CodebookQuantizer
from vqkv.rotation import channel_units


class NotFoldable(Exception):
    """The reason why codes cannot be attended on as they are."""


@dataclass(frozen=True)
class FoldedStream:
    """Codewords, and what maps their channels back to a head's.

    Attributes:
        codewords: `[H, M, S, K, d]` in fp32.
        matrix: `[H, D, D]`: coded channels to the head's.
        mean: `[H, D]`, added by it; None where there is none left.
        order: `[H, D]`: the head's channel that each coded one is, where `matrix` only reorders.
    """

    codewords: torch.Tensor
    matrix: torch.Tensor
    mean: torch.Tensor | None
    order: torch.Tensor | None


@dataclass(frozen=True)
class FoldedLayer:
    """Both streams of a layer, and what stands before and after attention on their codes.

    Attributes:
        pairs: `[H, D / 2]` (int32): the RoPE pair, or the pair of channels beyond them, at coded
            channels 2j and 2j + 1; None for keys coded after RoPE.
        output_map: `[H, Z, D]`: means of coded values to the output; where values are predicted
            from keys, Z = 2 D and means of coded keys follow those of values.
        output_bias: `[H, D]`, added by it; None where there is none.
    """

    keys: FoldedStream
    values: FoldedStream
    pairs: torch.Tensor | None
    output_map: torch.Tensor
    output_bias: torch.Tensor | None

    @property
    def predicts(self) -> bool:
        """Values are predicted from the keys."""
        return self.output_map.shape[1] > self.output_map.shape[2]

    def query(self, query: torch.Tensor) -> torch.Tensor:
        """Queries `[B, Q, t, D]` in the keys' coded channels, up to `keys.order`."""
        return query if self.keys.order is not None else _grouped(query, self.keys.matrix.mT)

    def shifted(self, partial: Partial, query: torch.Tensor) -> Partial:
        """With log-sum-exps of whole scores: what keys have in common is counted in."""
        if self.keys.mean is None:
            return partial
        shift = _grouped(query, self.keys.mean.unsqueeze(2)).squeeze(3)
        return partial._replace(lse=partial.lse + shift)


def _grouped(x: torch.Tensor, maps: torch.Tensor) -> torch.Tensor:
    """`[B, Q, t, n]` through the map `[H, n, m]` of each query head's KV head."""
    return (_by_head(x, len(maps)) @ maps).view(*x.shape[:3], maps.shape[2])


def _by_head(x: torch.Tensor, heads: int) -> torch.Tensor:
    """`[B, Q, t, n]` as `[B, H, Q / H · t, n]`."""
    # Not by einops, which takes longer than the products of a decoding step do.
    batch, queries, length, channels = x.shape
    return x.reshape(batch, heads, queries // heads * length, channels)


def fold(keys: Codec, values: Codec) -> FoldedLayer:
    """What attention on the codes of a layer takes.

    Raises:
        NotFoldable: the codecs are not linear around their codewords, with the reason.
    """
    pre = keys.layout.rope == "pre"
    try:
        folded_keys = _fold_stream(keys, _units(keys) if pre else None)
    except NotFoldable as reason:
        raise NotFoldable(f"keys: {reason}") from reason
    try:
        folded_values = _fold_stream(values, None)
    except NotFoldable as reason:
        raise NotFoldable(f"values: {reason}") from reason
    order = folded_keys.order
    pairs = _pair_rows(order, _units(keys)) if pre and order is not None else None
    output_map, bias = folded_values.matrix, folded_values.mean
    prediction = _prediction(values)
    if prediction is not None:
        weight, offset = prediction
        output_map = torch.cat([output_map, folded_keys.matrix @ weight], 1)
        bias = offset if bias is None else bias + offset
        if folded_keys.mean is not None:
            bias = bias + (folded_keys.mean.unsqueeze(1) @ weight).squeeze(1)
    return FoldedLayer(folded_keys, folded_values, pairs, output_map, bias)


def _fold_stream(codec: Codec, units: torch.Tensor | None) -> FoldedStream:
    """`units` `[D / 2, 2]` are pairs of channels that have to stay neighbours, if any."""
    if isinstance(codec, DraftCodec):
        raise NotFoldable("a draft reads some of a code's stages, kernels read all")
    stuck = [t.config.type for t in codec.transforms if not t.folds or t.token_group != 1]
    if stuck or codec.layout.side_count:
        raise NotFoldable(f"transforms do not fold: {', '.join(stuck) or 'side scalars'}")
    codewords = _codewords(codec)
    heads, groups, *_, dim = codewords.shape
    order = codec.order_.to(codewords.device) % codec.head_dim
    matrix, mean = _affine(codec)
    matrix = matrix.gather(1, order[:, :, None].expand_as(matrix))  # rows in coded order
    places = [_places(matrix[head], dim, units) for head in range(heads)]
    found = [place for place in places if place is not None]
    if len(found) < heads:
        if units is not None:
            raise NotFoldable("coded before RoPE behind a map that mixes channels of several codes")
        return FoldedStream(codewords.contiguous(), matrix, mean, None)
    order = torch.stack(found)  # [H, D]
    # Rows of one subvector, and only the channels that they reach: [H, M, d, d].
    index = order[:, None].expand(-1, groups * dim, -1)
    blocks = matrix.gather(2, index).view(heads, groups, dim, groups, dim)
    blocks = blocks.diagonal(dim1=1, dim2=3).movedim(-1, 1)
    moved = torch.einsum("hmskd,hmde->hmske", codewords, blocks)
    moved[:, :, 0] += mean.gather(1, order).view(heads, groups, 1, dim)
    reorder = torch.nn.functional.one_hot(order, codec.head_dim).float()
    return FoldedStream(moved.contiguous(), reorder, None, order)


def _places(matrix: torch.Tensor, dim: int, units: torch.Tensor | None) -> torch.Tensor | None:
    """The channels `[D]` that each run of `dim` rows of `[D, D]` reaches; None where they overlap.

    Pairs come out side by side, in their own order.
    """
    reached = (matrix != 0).view(-1, dim, matrix.shape[1]).any(1)  # [M, D]
    if units is not None:
        # A pair goes where either of its channels does.
        reached = reached[:, units].any(2).repeat_interleave(2, 1)
        channels = units.flatten()
    else:
        channels = torch.arange(matrix.shape[1], device=matrix.device)
    if not bool((reached.sum(0) == 1).all()) or not bool((reached.sum(1) == dim).all()):
        return None
    return torch.cat([channels[row] for row in reached])


def _codewords(codec: Codec) -> torch.Tensor:
    """`[H, M, S, K, d]` in fp32, a copy for every subvector that shares a codebook.

    Raises:
        NotFoldable: the quantizer has none.
    """
    quantizer, segment = codec.quantizers[0], codec.layout.segments[0]
    if not isinstance(quantizer, CodebookQuantizer):
        raise NotFoldable(f"{type(quantizer).__name__} has no table of codewords")
    books: torch.Tensor = quantizer.state()["codewords"].float()
    if codec.config.sharing == "group":
        own: torch.Tensor = books.unflatten(0, (codec.heads, segment.groups))
        return own
    if codec.config.sharing == "head":
        return books.unsqueeze(1).expand(-1, segment.groups, -1, -1, -1)
    # One for each place in a head, or one for all.
    return books.expand(codec.heads, segment.groups, *books.shape[1:])


def _affine(codec: Codec) -> tuple[torch.Tensor, torch.Tensor]:
    """Transforms undone are `z ↦ z A + μ`: A `[H, D, D]` and μ `[H, D]`."""
    probes = torch.eye(codec.head_dim, device=codec.order_.device)
    probes = probes.unsqueeze(1).expand(-1, codec.heads, -1)  # [D, H, D]
    mean = _undone(codec, torch.zeros_like(probes[:1]))
    matrix = _undone(codec, probes) - mean
    return matrix.transpose(0, 1).contiguous(), mean[0]


def _undone(codec: Codec, z: torch.Tensor) -> torch.Tensor:
    for transform in reversed(codec.transforms):
        z = transform.inverse(z, None)
    return z.float()


def _prediction(values: Codec) -> tuple[torch.Tensor, torch.Tensor] | None:
    """What a layer's keys predict of its values, `k ↦ k B + β`, B `[H, D, D]` and β `[H, D]`."""
    predictor = values.predictor
    if predictor is None:
        return None
    probes = torch.eye(values.head_dim, device=values.order_.device)
    probes = probes.unsqueeze(1).expand(-1, values.heads, -1)
    bias = predictor.predict([torch.zeros_like(probes[:1])])
    weight = predictor.predict([probes]) - bias
    return weight.transpose(0, 1).contiguous(), bias[0]


def _units(keys: Codec) -> torch.Tensor:
    """RoPE pairs, then the channels beyond them two by two, `[D / 2, 2]`."""
    return channel_units(keys.head_dim, keys.pairs).to(keys.order_.device)


def _pair_rows(order: torch.Tensor, units: torch.Tensor) -> torch.Tensor:
    """Which of `units` is at coded channels 2j and 2j + 1, `[H, D / 2]` (int32)."""
    row = torch.empty(units.numel(), dtype=torch.int32, device=order.device)
    row[units[:, 0]] = torch.arange(len(units), dtype=torch.int32, device=order.device)
    return row[order[:, 0::2]]
