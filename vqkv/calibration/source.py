"""What a compressor is fitted on: spooled states, and the metrics of the model they came from."""

from __future__ import annotations

import torch
from einops import rearrange
from transformers import PreTrainedModel

from vqkv.attention import attention_modules, output_projection
from vqkv.cache.rope import RotaryAdapter
from vqkv.calibration.capture import Kind
from vqkv.calibration.spool import Spool
from vqkv.compressor import KVCompressor, StateSource
from vqkv.layouts import Stream
from vqkv.states import States
from vqkv.transforms import Metric

#: Distances between query and key that the query metric is averaged over.
DISTANCES = 192

#: Part of the Fisher information that is spread evenly over channels.
SHRINKAGE = 0.1


class CapturedStates(StateSource):
    """Spooled states and a model's metrics.

    Args:
        spool: with states and query products of all windows.
        model: that they came from.
        compressor: to be fitted; says where keys are coded before RoPE.
        context: tokens of a window.
    """

    def __init__(
        self, spool: Spool, model: PreTrainedModel, compressor: KVCompressor, context: int
    ) -> None:
        self._spool = spool
        self._model = model
        self._geometry = compressor.geometry
        self._context = context
        self._modules = attention_modules(model)
        pre_rope = query_layers(compressor, rope="pre")
        self._adapter = RotaryAdapter(model, pre_rope) if pre_rope else None
        self._pre_rope = frozenset(pre_rope)
        self._kinds: dict[tuple[int, Stream], Kind] = {
            (layer, stream): "pre_keys" if codec.layout.rope == "pre" else stream
            for (layer, stream), codec in compressor.codecs()
        }

    def states(self, layer: int, stream: Stream) -> States:
        """Tokens as they were captured."""
        return self._spool.states(layer, self._kinds[layer, stream])

    def gradients(self, layer: int, stream: Stream) -> States:
        """Of the loss of a window, summed over its tokens."""
        pre = self._kinds[layer, stream] == "pre_keys"
        return self._spool.states(layer, gradients_of(stream, pre))

    def gradient_products(self, layer: int, stream: Stream) -> torch.Tensor:
        """`Σ g gᵀ` of each head over tokens, `[H, D, D]` in fp64."""
        chunks = self.gradients(layer, stream).map(torch.Tensor.double).chunks()
        products = sum(torch.einsum("nhd,nhe->hde", chunk, chunk) for chunk in chunks)
        assert isinstance(products, torch.Tensor)
        return products

    def across_heads(self, layer: int, stream: Stream, together: int) -> torch.Tensor:
        """`[B, h, D, h, D]` in fp64: the `fisher` metric of each B-th part of the heads at once."""
        dim, sets = self._geometry.head_dim, self._geometry.kv_heads // together
        found = torch.zeros(sets, together * dim, together * dim, dtype=torch.float64)
        for chunk in self.gradients(layer, stream).map(torch.Tensor.double).chunks():
            rows = rearrange(chunk, "n (b h) d -> b n (h d)", b=sets)
            found += rows.mT @ rows
        across = found.view(sets, together, dim, together, dim)
        own = [_spread(across[:, head, :, head]) for head in range(together)]
        across *= 1 - SHRINKAGE
        for head in range(together):
            across[:, head, :, head] = own[head]
        return across

    def kept(self, layer: int, stream: Stream, states: States) -> States:
        """Kept on disk."""
        return self._spool.kept(layer, stream, states)

    def forget(self, layer: int, stream: Stream) -> None:
        """Deleted."""
        self._spool.forget(layer, stream)

    def metric(self, layer: int, stream: Stream, kind: Metric) -> torch.Tensor:
        """`[H, D, D]` in fp64, over the query heads that read a KV head.

        - `query`: `E[q qᵀ]`. Before RoPE the key of a token at distance Δ is rotated by Δ before
          it meets the query, so `E_Δ[R_Δᵀ E[q qᵀ] R_Δ]`; causal attention in a window of T tokens
          sees Δ with a density that falls linearly to 0 at T.
        - `output`: `Σ_j O_jᵀ O_j`, O_j being the slices of the output projection.
        - `fisher`: `E[g gᵀ]` of the loss's gradients g by the stream, the empirical Fisher
          information, a tenth of it spread evenly over channels: few gradients carry most of it.

        Raises:
            ModelError: the output projection is not known.
        """
        heads, dim = self._geometry.kv_heads, self._geometry.head_dim
        if kind == "fisher":
            return _spread(self.gradient_products(layer, stream))
        if kind == "output":
            channels = self._geometry.query_heads * dim
            weight = output_projection(self._modules[layer], channels).detach().double().cpu()
            slices = rearrange(weight, "e (h g d) -> h (e g) d", h=heads, d=dim)
            return slices.transpose(1, 2) @ slices
        queries: Kind = "pre_queries" if layer in self._pre_rope else "queries"
        moments = self._spool.query_moments(layer, queries)
        moments = rearrange(moments, "(h g) i j -> h g i j", h=heads).mean(1)
        if layer not in self._pre_rope or self._adapter is None:
            return moments
        return _averaged(self._adapter, layer, moments, self._context)


def _spread(products: torch.Tensor) -> torch.Tensor:
    """`[H, D, D]`, a tenth of it spread evenly over channels."""
    even = products.diagonal(dim1=1, dim2=2).mean(1)[:, None, None]
    eye = torch.eye(products.shape[1], dtype=products.dtype)
    return torch.lerp(products, even * eye, SHRINKAGE)


def gradients_of(stream: Stream, before_rope: bool) -> Kind:
    """What a capture calls the gradients by the states of a stream."""
    if stream == "values":
        return "grad_values"
    return "grad_pre_keys" if before_rope else "grad_keys"


def query_layers(compressor: KVCompressor, rope: str | None = None) -> list[int]:
    """Layers whose keys are fitted in the query metric, before or after RoPE if told."""
    return [
        layer
        for (layer, stream), codec in compressor.codecs()
        if stream == "keys"
        and codec.metric == "query"
        and (rope is None or codec.layout.rope == rope)
    ]


def _averaged(
    adapter: RotaryAdapter, layer: int, moments: torch.Tensor, context: int
) -> torch.Tensor:
    """`E_Δ[R_Δᵀ Σ R_Δ]` of `Σ` `[H, D, D]`."""
    # Quantiles of the density 2 (T − Δ) / T², each of equal weight.
    middles = (torch.arange(DISTANCES, dtype=torch.float64) + 0.5) / DISTANCES
    distances = (context * (1 - (1 - middles).sqrt())).round().long()
    total = torch.zeros_like(moments)
    for part in distances.split(32):
        tables = adapter.tables(layer, part[:, None])
        rows = moments.expand(len(part), *moments.shape)  # rows of Σ as keys, all at one position
        for _ in range(2):
            rows = adapter.unrotate(layer, rows, tables).double().transpose(2, 3)
        total += rows.sum(0)
    total = total / DISTANCES
    return (total + total.transpose(1, 2)) / 2
