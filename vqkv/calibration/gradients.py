"""Backward passes through a model that keeps its weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from transformers import PreTrainedModel


@contextmanager
def differentiable(model: PreTrainedModel) -> Iterator[None]:
    """A block in which graphs are built, in evaluation mode and without the weights."""
    training = model.training
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    model.eval()
    for weight in weights:
        weight.requires_grad_(False)
    try:
        with torch.enable_grad():
            yield
    finally:
        for weight in weights:
            weight.requires_grad_()
        model.train(training)
