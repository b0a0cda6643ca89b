"""Another attention function in a model's place, for as long as a block runs."""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType
from typing import Any, Self

from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

from vqkv.attention import model_type, own_attention
from vqkv.errors import ModelError


class AttentionExchange:
    """A model whose decoder attends through a function that is given here.

    A context manager: inside of it the decoder's attention passes through `attention`; afterwards
    everything is as before, exceptions included. Masks are those of the model's own implementation.

    Args:
        model: a causal language model of transformers.
        attention: takes what attention functions of transformers take.
        consequence: what a model whose attention stays cannot do, for the error.

    Raises:
        ModelError: transformers does not tell of the model's decoder.
    """

    def __init__(
        self, model: PreTrainedModel, attention: Callable[..., Any], consequence: str
    ) -> None:
        self._family = model_type(model)
        self._base: PreTrainedModel = model.get_decoder()
        if not isinstance(self._base, PreTrainedModel):
            raise ModelError(
                f"{self._family}: the decoder of {type(model).__name__} is said to be a "
                f"{type(self._base).__name__}, whose attention cannot be exchanged: {consequence}"
            )
        self._attention = attention
        self._consequence = consequence
        self._name = f"vqkv_{id(self)}"
        #: The model's own implementation, by name.
        self.original = str(self._base.config._attn_implementation)

    def own(self, module: nn.Module) -> Callable[..., Any]:
        """The attention function that `module` would call if nothing had been exchanged."""
        return own_attention(module, self.original)

    def __enter__(self) -> Self:
        """Raises ModelError where the model's attention cannot be exchanged."""
        mask = ALL_MASK_ATTENTION_FUNCTIONS[self.original]
        AttentionInterface.register(self._name, self._attention)
        # Without a mask function of the same name transformers would pass no mask at all.
        AttentionMaskInterface.register(self._name, mask)
        try:
            self._base.set_attn_implementation(self._name)
            if self._base.config._attn_implementation != self._name:
                raise ModelError(
                    f"{self._family}: {type(self._base).__name__} does not let its attention be "
                    f"exchanged, so {self._consequence}"
                )
        except BaseException:
            self._undo()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Gives the model its own attention back."""
        self._undo()

    def _undo(self) -> None:
        self._base.set_attn_implementation(self.original)
        for interface in (AttentionInterface, AttentionMaskInterface):
            # There is no public way to take back what `register` did.
            interface._global_mapping.pop(self._name)
