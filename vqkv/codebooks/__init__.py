"""Codebook learners: where codewords come from. One learner, one file."""

from vqkv.codebooks.base import LEARNERS, CodebookLearner, Health, LearnerChoice

__all__ = ["LEARNERS", "CodebookLearner", "Health", "LearnerChoice"]
