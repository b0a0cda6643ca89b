"""Finding a scheme for a model and a budget of bits."""

from vqkv.tuning.files import scheme_file
from vqkv.tuning.run import TEMPLATES, Candidate, Family, Objective, best, tune

__all__ = ["TEMPLATES", "Candidate", "Family", "Objective", "best", "scheme_file", "tune"]
