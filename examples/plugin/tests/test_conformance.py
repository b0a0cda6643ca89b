"""A plugin's whole conformance test: one line for each class."""

from vqkv.testing import check_learner, check_quantizer
from vqkv_example.random_samples import RandomSamples
from vqkv_example.sign_mean import SignMeanQuantizer


def test_quantizer() -> None:
    check_quantizer(SignMeanQuantizer)


def test_learner() -> None:
    check_learner(RandomSamples)
