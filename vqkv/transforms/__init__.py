"""Transforms: the space in which squared error is the error that hurts. One transform, one file."""

from vqkv.transforms.base import TRANSFORMS, Metric, Transform, TransformChoice

__all__ = ["TRANSFORMS", "Metric", "Transform", "TransformChoice"]
