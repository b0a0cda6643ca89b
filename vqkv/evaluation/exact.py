"""Logits of the exact model, kept on disk where many schemes are scored on the same windows."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import numpy as np
import torch
from transformers import DynamicCache, PreTrainedModel


class ExactLogits:
    """Computes the logits of a window once; half of every later scheme's work is saved.

    In fp32 a window of 2,048 tokens of a 50k vocabulary takes 400 MB.

    Args:
        model: the exact one.
        folder: for the files, which are the caller's to delete.
    """

    def __init__(self, model: PreTrainedModel, folder: Path) -> None:
        self._model = model
        self._folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    @torch.inference_mode()
    def __call__(self, ids: torch.Tensor) -> torch.Tensor:
        """Logits `[T, vocabulary]` (fp32) of token ids `[1, T]` in one forward."""
        digest = hashlib.sha256(ids.cpu().numpy().tobytes()).hexdigest()
        path = self._folder / f"{digest[:32]}.npy"
        if path.exists():
            return torch.from_numpy(np.load(path)).to(ids.device)
        cache = DynamicCache(config=self._model.config)
        logits: torch.Tensor = self._model(ids, past_key_values=cache).logits[0].float()
        draft = path.with_suffix(".new")
        with draft.open("wb") as file:
            np.save(file, logits.cpu().numpy())
        os.replace(draft, path)
        return logits
