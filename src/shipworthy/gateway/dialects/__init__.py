"""The protocols that clients speak: how a request is read, sent on, and its answer judged."""

from shipworthy.gateway.dialects.language import LanguageAsk, language_error
from shipworthy.gateway.dialects.tensors import ScoringAsk, TensorAsk, scoring_error

__all__ = ["LanguageAsk", "ScoringAsk", "TensorAsk", "language_error", "scoring_error"]
