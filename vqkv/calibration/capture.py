"""The states of a running model: what its attention sees, layer by layer."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from contextlib import ExitStack
from types import TracebackType
from typing import Any, Literal, Self

import torch
from torch import nn
from transformers import PreTrainedModel

from vqkv.attention import attention_modules, model_type
from vqkv.cache.rope import ForwardCapture, RotaryAdapter
from vqkv.calibration.gradients import differentiable
from vqkv.errors import ModelError
from vqkv.exchange import AttentionExchange

#: States as attention sees them, after RoPE where there is one; `pre_` ones before it.
StateKind = Literal["keys", "pre_keys", "values", "queries", "pre_queries"]

#: Gradients of the loss, summed over the window's tokens, by these states.
GradientKind = Literal["grad_keys", "grad_pre_keys", "grad_values"]

Kind = StateKind | GradientKind

#: Called with a layer, a kind, and states `[B, H, T, D]` (queries `[B, Q, T, D]`).
Take = Callable[[int, Kind, torch.Tensor], None]


class StateCapture:
    """Runs a model exactly and hands out states as its layers compute them.

    A context manager: inside of it the model's attention passes through here, on its way to the
    implementation that the model has; afterwards everything is as before, exceptions included.
    Pre-RoPE states are un-rotated in fp32 and then rounded to the model's type, which they had
    before the model rotated them.

    Args:
        model: a causal language model of transformers; put into evaluation mode meanwhile.
        wants: which kinds to hand out, by layer.
        take: given the states, one layer at a time, while the model runs.

    Raises:
        ModelError: pre-RoPE states are wanted and the family cannot give them.
    """

    def __init__(
        self, model: PreTrainedModel, wants: Mapping[int, Collection[Kind]], take: Take
    ) -> None:
        self._model = model
        # The base model: logits over the vocabulary would take more memory than all states.
        self._base: PreTrainedModel = model.get_decoder()
        self._wants = wants
        self._take = take
        self._exchange = AttentionExchange(model, self._attention, "its states cannot be captured")
        self._seen: set[int] = set()
        rotated = [i for i, kinds in wants.items() if any("pre_" in kind for kind in kinds)]
        self._differentiates = any("grad_" in kind for kinds in wants.values() for kind in kinds)
        self._adapter = RotaryAdapter(model, rotated) if rotated else None
        self._rotary = ForwardCapture(model, self._adapter)
        self._modules = attention_modules(model)

    def __enter__(self) -> Self:
        """Raises ModelError where the model's attention cannot be exchanged."""
        with ExitStack() as entered:
            entered.callback(self._model.train, self._model.training)
            self._model.eval()
            entered.enter_context(self._exchange)
            entered.enter_context(self._rotary)
            self._undo = entered.pop_all()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Gives the model its own attention back."""
        self._undo.__exit__(kind, error, trace)

    def run(self, window: torch.Tensor) -> None:
        """Run the model on token ids `[T]` or `[B, T]`, from position 0.

        Where gradients are wanted the next-token loss is differentiated too, which takes the memory
        of one window's activations.

        Raises:
            ModelError: a layer computed attention that was not seen here.
        """
        ids = (window if window.ndim == 2 else window[None]).to(self._model.device)
        self._seen.clear()
        if self._differentiates:
            self._differentiate(ids)
        else:
            with torch.no_grad():
                self._base(input_ids=ids, use_cache=False)
        unseen = sorted(set(self._wants) - self._seen)
        if unseen:
            raise ModelError(
                f"{model_type(self._model)}: the attention of layers {unseen} does not go through "
                "transformers' attention interface, so its states cannot be captured"
            )

    def _attention(
        self,
        module: nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        layer: Any = getattr(module, "layer_idx", None)
        if layer in self._wants and self._modules.get(layer) is module:
            self._seen.add(layer)
            states = {"keys": key, "values": value, "queries": query}
            for kind in self._wants[layer]:
                if kind.startswith("grad_"):
                    self._await_gradient(layer, kind, states)
                else:
                    self._take(layer, kind, self._state(layer, kind, states).detach())
        return self._exchange.own(module)(module, query, key, value, *args, **kwargs)

    def _state(self, layer: int, kind: Kind, states: Mapping[str, torch.Tensor]) -> torch.Tensor:
        if not kind.startswith("pre_"):
            return states[kind]
        assert self._adapter is not None, "made for every layer of which pre-RoPE states are wanted"
        rotated = states[kind.removeprefix("pre_")]
        tables = self._rotary.tables(layer)
        return self._adapter.unrotate(layer, rotated, tables).to(rotated.dtype)

    def _differentiate(self, ids: torch.Tensor) -> None:
        """One forward and backward pass that leaves the weights without gradients."""
        with differentiable(self._model):
            embedded = self._model.get_input_embeddings()(ids).detach().requires_grad_()
            logits = self._model(inputs_embeds=embedded, use_cache=False).logits
            loss = torch.nn.functional.cross_entropy(
                logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten(), reduction="sum"
            )
            loss.backward()

    def _await_gradient(self, layer: int, kind: Kind, states: Mapping[str, torch.Tensor]) -> None:
        """Hand out the gradient by a state when the backward pass comes to it."""
        before = "pre_" in kind
        state = states[kind.removeprefix("grad_").removeprefix("pre_")]
        # The tables are those of the running forward, which is over when the gradient comes.
        tables = self._rotary.tables(layer) if before else None

        def hand_out(gradient: torch.Tensor) -> None:
            if tables is not None:
                # The transpose of a rotation is its inverse; a scale (YaRN) is the same for all.
                assert self._adapter is not None
                gradient = self._adapter.unrotate(layer, gradient, tables)
            self._take(layer, kind, gradient)

        state.register_hook(hand_out)
