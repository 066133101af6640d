"""The protocols that clients speak: how a request is read, sent on, and its answer judged."""

from shipworthy.gateway.dialects.language import LanguageAsk, language_error
from shipworthy.gateway.dialects.tensors import TensorAsk

__all__ = ["LanguageAsk", "TensorAsk", "language_error"]
