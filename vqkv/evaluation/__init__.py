"""Evaluation: what a compressed cache costs in quality, and saves in bytes."""

from vqkv.evaluation.evaluate import Evaluation, Mode, evaluate

__all__ = ["Evaluation", "Mode", "evaluate"]
