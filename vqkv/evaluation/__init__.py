"""Evaluation: what a compressed cache costs in quality, and saves in bytes."""

from vqkv.evaluation.arms import Mode
from vqkv.evaluation.run import Evaluation, evaluate

__all__ = ["Evaluation", "Mode", "evaluate"]
