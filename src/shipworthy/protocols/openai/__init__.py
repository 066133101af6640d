"""OpenAI's API as far as a gateway needs it: chat, completions, embeddings, models, and streams.

Bodies stay bytes. Only the few fields that decide something are read from them, and only the
model's name and what a release adds are written: vision content, tools, log probabilities and
fields that nobody has thought of yet pass through as they came. Every refusal names the field:
`messages: missing; send at least one message`.
"""

from shipworthy.protocols.openai.answers import Answered, Seen, StreamReader, Usage, read_answer
from shipworthy.protocols.openai.documents import (
    error_body,
    error_text,
    error_type,
    model_document,
    models_list,
)
from shipworthy.protocols.openai.passing import (
    for_upstream,
    rename_event,
    rename_model,
    replace_user,
    with_behaviour,
)
from shipworthy.protocols.openai.requests import OpenAIRequest, estimate_tokens, read_request

__all__ = [
    "Answered",
    "OpenAIRequest",
    "Seen",
    "StreamReader",
    "Usage",
    "error_body",
    "error_text",
    "error_type",
    "estimate_tokens",
    "for_upstream",
    "model_document",
    "models_list",
    "read_answer",
    "read_request",
    "rename_event",
    "rename_model",
    "replace_user",
    "with_behaviour",
]
