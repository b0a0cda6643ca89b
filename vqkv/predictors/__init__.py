"""Predictors: what streams already decoded tell about a token. One method, one file."""

from vqkv.predictors.base import PREDICTORS, Predictor, PredictorChoice, PredictorConfig, Source

__all__ = ["PREDICTORS", "Predictor", "PredictorChoice", "PredictorConfig", "Source"]
