"""Rotary embeddings of an attached model: undoing them, and seeing those of the running forward."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from types import TracebackType
from typing import Any, Self

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from vqkv.attention import (
    Tables,
    argument,
    attention_modules,
    cached_states,
    model_type,
    rotary_module,
    rotary_tables,
    takes_tables,
    text_config,
)
from vqkv.errors import CacheError, ModelError
from vqkv.rotation import Pairs, Rotation, rotary_function

_ADVICE = "use a scheme of post-RoPE keys"


class RotaryAdapter:
    """Takes the rotary embedding off a model's keys and puts it on again, with its own functions.

    Building one runs every layer's projections on a few random hidden states and makes sure that
    un-rotated keys are those that the layer had before it rotated them.

    Attributes:
        rotary: the module that computes the tables.
        modules: attention modules by layer.
        still: layers that do not rotate, as some do in SmolLM3 and Cohere 2.
    """

    rotary: nn.Module
    modules: dict[int, nn.Module]
    still: frozenset[int]

    def __init__(self, model: PreTrainedModel, layers: Iterable[int]) -> None:
        """Looks at the attention modules of `layers`.

        Raises:
            ModelError: the family has no `apply_rotary_pos_emb`, its frequencies change with
                length, or its keys do not un-rotate.
        """
        self._family = model_type(model)
        self._config = text_config(model)
        # Of the hidden states, to which the rotary module rounds its tables.
        self._dtype: torch.dtype = next(model.get_input_embeddings().parameters()).dtype
        layers = tuple(layers)
        rotary = rotary_module(model)
        modules = attention_modules(model)
        without = [i for i in layers if i not in modules or not takes_tables(modules[i])]
        if rotary is None or without:
            raise ModelError(
                f"{self._family}: the attention of layers {without or 'all'} is handed no rotary "
                f"cosines and sines, so its keys cannot be un-rotated; {_ADVICE}"
            )
        self.rotary = rotary
        self.modules = {layer: modules[layer] for layer in layers}
        self._refuse_changing_frequencies()
        self._rotations: dict[int, Rotation] = {}
        self.still = frozenset(
            i for i, module in self.modules.items() if not self._turns(i, module)
        )

    def pairs(self, layer: int) -> Pairs:
        """Channels of a head that rotate together in a layer; none where it does not rotate."""
        return () if layer in self.still else self._rotations[layer].pairs

    def kind(self, layer: int) -> str:
        """Layers of one kind have the same tables."""
        if layer in self.still:
            return "still"
        types = getattr(self._config, "layer_types", None)
        return "all" if types is None else str(types[layer])

    def tables(self, layer: int, positions: torch.Tensor) -> Tables:
        """Cosines and sines `[B, T, W]` at integer positions, as the model rounds them.

        Positions are those of `ForwardCapture.positions`.

        The same tables must rotate and un-rotate: a bf16 model rotates by rounded angles, and
        finer ones would not undo that.
        """
        cos, sin = rotary_tables(self.rotary, self._config, layer, positions, self._dtype)
        if layer in self.still:
            return torch.ones_like(cos), torch.zeros_like(sin)
        return cos, sin

    def rotate(self, layer: int, keys: torch.Tensor, tables: Tables) -> torch.Tensor:
        """Post-RoPE keys `[B, H, T, D]` in fp32 of pre-RoPE ones."""
        return self._rotations[layer].rotate(keys, *tables)

    def unrotate(self, layer: int, keys: torch.Tensor, tables: Tables) -> torch.Tensor:
        """Pre-RoPE keys `[B, H, T, D]` in fp32 of post-RoPE ones."""
        return self._rotations[layer].unrotate(keys, *tables)

    def turns(self, layer: int, positions: torch.Tensor, head_dim: int) -> torch.Tensor:
        """(c, s) of every pair, `[B, T, P, 2]` in fp32, at positions as for `tables`, not rounded.

        A pair (x, y) becomes (c x − s y, c y + s x), in whichever direction the model turns. Unlike
        `tables` they multiply: turning by p and then by o is turning by p + o. A bf16 model's
        rounded tables differ from them by about as much as its keys are rounded.
        """
        cos, sin = rotary_tables(self.rotary, self._config, layer, positions, torch.float32)
        pairs = torch.tensor(self.pairs(layer), dtype=torch.int64, device=cos.device).view(-1, 2)
        first, second = pairs.unbind(1)
        ones = cos.new_zeros(len(positions), 1, positions.shape[1], head_dim)
        ones[..., first] = 1.0
        turned = self._rotations[layer].rotate(ones, cos, sin)[:, 0]
        return torch.stack([turned[..., first], turned[..., second]], -1)

    def _refuse_changing_frequencies(self) -> None:
        types = getattr(self.rotary, "rope_type", "default")
        for name in types.values() if isinstance(types, dict) else [types]:
            if "dynamic" in name or name == "longrope":
                raise ModelError(
                    f"{self._family}: the frequencies of {name} RoPE change with the length of the "
                    f"text, so keys cannot be rotated again later; {_ADVICE}"
                )

    @torch.no_grad()
    def _turns(self, layer: int, module: nn.Module) -> bool:
        """Compares keys that the layer rotates with keys that it is told not to."""
        rotary_function(module)
        weight = next(module.parameters())
        # Far ones too: the slow pairs have to turn as well.
        positions = torch.tensor([[3, 40, 500, 6000]], device=weight.device)
        generator = torch.Generator().manual_seed(0)
        hidden = torch.randn(1, positions.shape[1], self._config.hidden_size, generator=generator)
        hidden = hidden.to(weight.device, self._dtype)
        cos, sin = tables = rotary_tables(self.rotary, self._config, layer, positions, self._dtype)
        none = (torch.ones_like(cos), torch.zeros_like(sin))
        turned = cached_states(module, hidden, tables)[0]
        unturned = cached_states(module, hidden, none)[0].float()
        self._rotations[layer] = Rotation(module, cos.shape[-1], turned.shape[-1])
        if torch.equal(turned.float(), unturned):
            return False
        error = (self.unrotate(layer, turned, tables) - unturned).norm() / unturned.norm()
        # Rounding gives 0.3 to 0.7 eps.
        if error > max(4 * torch.finfo(turned.dtype).eps, 1e-5):
            raise ModelError(
                f"{self._family}: keys of layer {layer} do not un-rotate (relative error "
                f"{error:.2g}): {type(module).__name__} changes them after it rotates them, or "
                f"rotates other channels than its apply_rotary_pos_emb; {_ADVICE}"
            )
        return True


class ForwardCapture:
    """Rotary tables, positions and left padding of the forward that is running now.

    A context manager: hooks exist inside of it only. What it shows belongs to the running forward
    of its own model and is gone when that ends, so nothing stale can be used.
    """

    _given: torch.Tensor | None
    _positions: torch.Tensor | None

    def __init__(self, model: PreTrainedModel, adapter: RotaryAdapter | None = None) -> None:
        """Shows left padding alone where there is no adapter: post-RoPE schemes need none."""
        self._model = model
        self._adapter = adapter
        self._checked: set[int] = set()
        self._handles: list[RemovableHandle] = []
        self._clear()

    def __enter__(self) -> Self:
        """Raises CacheError where it is entered twice."""
        if self._handles:
            raise CacheError(f"{model_type(self._model)}: this capture is already entered")
        for module in dict.fromkeys((self._model, self._model.get_decoder())):
            self._handles += [
                module.register_forward_pre_hook(self._start, with_kwargs=True),
                module.register_forward_hook(self._end, always_call=True),
            ]
        if self._adapter is not None:
            hooks = [(self._adapter.rotary, self._see_positions)]
            for layer, module in self._adapter.modules.items():
                hooks.append((module, partial(self._see_tables, self._adapter, layer)))
            for module, hook in hooks:
                self._handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Takes every hook away."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._clear()

    @property
    def positions(self) -> torch.Tensor:
        """Positions `[B, T]` (int32) of the running forward's tokens.

        `[B, T, A]` where a multimodal model counts along A axes and they differ, as they do in
        images; of text they are alike.

        Raises:
            CacheError: no forward is running.
        """
        if self._given is None or self._batch is None:
            raise self._nothing("positions")
        if self._positions is None:
            self._positions = self._integer(self._given)
        return self._positions.expand(self._batch, *self._positions.shape[1:])

    @property
    def left_padding(self) -> torch.Tensor | None:
        """Padding tokens at the left of each row `[B]` (int32); None where no mask was given.

        Raises:
            CacheError: no forward is running, or its mask is not `[B, tokens so far]`.
        """
        if not self._running:
            raise self._nothing("padding")
        if self._mask is None:
            return None
        if not isinstance(self._mask, torch.Tensor) or self._mask.ndim != 2:
            shape = getattr(self._mask, "shape", type(self._mask).__name__)
            raise CacheError(
                f"{model_type(self._model)}: padding cannot be read off an attention mask "
                f"{shape}; pass the model a mask [batch, tokens] of zeros and ones"
            )
        return (self._mask.cumsum(-1) == 0).sum(-1, dtype=torch.int32)

    def tables(self, layer: int) -> Tables:
        """Cosines and sines `[B, T, W]` that the running forward rotates a layer with.

        Raises:
            CacheError: that layer is not running, or never was.
        """
        if layer not in self._tables:
            raise self._nothing(f"rotary tables of layer {layer}")
        return self._tables[layer]

    def _nothing(self, what: str) -> CacheError:
        return CacheError(
            f"{model_type(self._model)}: no {what} seen: the model whose cache this is has to run "
            "inside the context that attaches it"
        )

    def _clear(self) -> None:
        self._running: set[nn.Module] = set()
        self._mask: Any = None
        self._given = None
        self._positions = None
        self._batch: int | None = None
        self._tables: dict[int, Tables] = {}

    def _start(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        # Torch tells of the end of a forward that raised, but not of one that was interrupted.
        if module is self._model or module in self._running:
            self._clear()
        self._running.add(module)
        # The outermost model gets the user's mask; those within may get a derived one.
        if self._mask is None:
            self._mask = argument(module, "attention_mask", args, kwargs)

    def _end(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self._running.discard(module)
        if not self._running:
            self._clear()

    def _see_positions(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        if self._running:
            # Looked at when somebody asks: a step that is captured may not wait for the device.
            self._given = argument(module, "position_ids", args, kwargs)
            self._positions = None

    def _integer(self, positions: torch.Tensor) -> torch.Tensor:
        """As `positions`, of `[B, T]` or `[A, B, T]`, before all rows of a batch have theirs."""
        found = positions.to(torch.int32)
        if positions.is_floating_point() and not torch.equal(found.to(positions), positions):
            raise ModelError(
                f"{model_type(self._model)}: positions are no whole numbers; {_ADVICE}"
            )
        if found.ndim == 2:
            return found
        return found[0] if bool((found == found[0]).all()) else found.movedim(0, 2)

    def _see_tables(
        self,
        adapter: RotaryAdapter,
        layer: int,
        module: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> None:
        if not self._running:
            return
        hidden = argument(module, "hidden_states", args, kwargs)
        self._batch = hidden.shape[0]
        if self._given is None:
            raise ModelError(
                f"{model_type(self._model)}: {type(adapter.rotary).__name__} did not run before "
                f"layer {layer}, whose rotary tables come from elsewhere; {_ADVICE}"
            )
        given = argument(module, "position_embeddings", args, kwargs)
        if layer in adapter.still or layer not in self._checked:
            expected = adapter.tables(layer, self.positions.to(hidden.device))
            if layer in adapter.still:
                given = expected
            elif not _alike(given, expected):
                raise ModelError(
                    f"{model_type(self._model)}: layer {layer} is handed other rotary tables than "
                    f"{type(adapter.rotary).__name__} computes; {_ADVICE}"
                )
            # Once a layer is enough: what could differ is which rotary module serves it.
            self._checked.add(layer)
        self._tables[layer] = given


def _alike(given: Tables, expected: Tables) -> bool:
    """Up to rounding, which may differ where a user passes embeddings of another dtype."""
    return all(
        torch.allclose(a.float(), b.float(), atol=1e-2)
        for a, b in zip(given, expected, strict=True)
    )
