"""Transforms: the space in which squared error is the error that hurts. One transform, one file."""

from vqkv.transforms.base import TRANSFORMS, Transform, TransformChoice

__all__ = ["TRANSFORMS", "Transform", "TransformChoice"]
