"""What users of OpenAI's Python client do, each thing once and each with one request.

Run it where that client is installed: `python openai_calls.py URL MODEL KEY [NAME …]`. It prints
what the users get: an answer, the pieces of a stream, or the exception that they have to handle.
"""
# pyright: reportMissingImports=false

import json
import sys
from collections.abc import Callable
from typing import Any

import openai

WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather at a place, “now”",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "enum": ["Reykjavík"]}},
            "required": ["city"],
        },
    },
}
SCHEMA = {
    "type": "json_schema",
    "json_schema": {
        "name": "answer",
        "strict": True,
        "schema": {
            "type": "object",
            "properties": {"ok": {"type": "boolean"}},
            "required": ["ok"],
            "additionalProperties": False,
        },
    },
}
PIXEL = (
    "data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mP8z8BQ"
    "DwAEhQGAhKmMIQAAAABJRU5ErkJggg=="
)
UNKNOWN = {"model": "nested", "small": -0.0, "large": 10**30, "nothing": None}
PICTURE = {"type": "image_url", "image_url": {"url": PIXEL, "detail": "low"}}


def user(content: Any) -> list[Any]:
    return [{"role": "user", "content": content}]


SAID = [
    {"role": "system", "content": "Say “yes” — or\tno.\n"},
    {"role": "user", "content": 'Grüße 👋 "quoted" \\ \u0007', "name": "ann"},
]
TOOL_RESULT = [
    *user("How is it?"),
    {
        "role": "assistant",
        "content": None,
        "tool_calls": [
            {
                "id": "call_1",
                "type": "function",
                "function": {"name": "weather", "arguments": '{"city": "Reykjavík"}'},
            }
        ],
    },
    {"role": "tool", "tool_call_id": "call_1", "content": '{"model": "nested", "degrees": 3}'},
]

Calls = dict[str, Callable[[], Any]]


def calls(client: openai.OpenAI, model: str) -> Calls:
    """Each by its name."""

    def chat(messages: Any, **said: Any) -> Any:
        said = {"max_tokens": 6, "temperature": 0, **said}
        return client.chat.completions.create(model=model, messages=messages, **said)

    def complete(prompt: Any, **said: Any) -> Any:
        said = {"max_tokens": 6, "temperature": 0, **said}
        return client.completions.create(model=model, prompt=prompt, **said)

    tools = {"tools": [WEATHER], "tool_choice": "required", "max_tokens": 60}
    made: Calls = {
        "chat": lambda: chat(user("hello")),
        "chat_unicode": lambda: chat(SAID, seed=2**40, user="ann", top_p=1.0, stop=["¶"]),
        "chat_unknown_fields": lambda: chat(
            user("hello"), extra_body={"cache_prompt": False, "x": UNKNOWN}
        ),
        "chat_n_logprobs": lambda: chat(user("hello"), n=2, logprobs=True, top_logprobs=1),
        "chat_tools": lambda: chat(user("How is it?"), **tools),
        "chat_tool_result": lambda: chat(TOOL_RESULT, tools=[WEATHER]),
        "chat_json": lambda: chat(
            user("hello"), response_format={"type": "json_object"}, max_tokens=40
        ),
        "chat_json_schema": lambda: chat(user("hello"), response_format=SCHEMA, max_tokens=40),
        "chat_vision": lambda: chat(user([{"type": "text", "text": "What is it?"}, PICTURE])),
        "chat_stream": lambda: chat(user("hello"), stream=True),
        "chat_stream_usage": lambda: chat(
            SAID, stream=True, stream_options={"include_usage": True}
        ),
        "chat_stream_n_logprobs": lambda: chat(
            user("hello"), stream=True, n=2, logprobs=True, max_tokens=3
        ),
        "chat_stream_tools": lambda: chat(user("How is it?"), stream=True, **tools),
        "completions": lambda: complete("hello"),
        "completions_several": lambda: complete(["hello", "world"], logprobs=1, max_tokens=2),
        "completions_stream": lambda: complete("hello", stream=True),
        "embeddings": lambda: client.embeddings.create(model=model, input="hello"),
        "embeddings_float": lambda: client.embeddings.create(
            model=model, input=["hello", "Grüße"], encoding_format="float"
        ),
        "refused": lambda: chat(user("hello"), response_format={"type": "nonsense"}),
        "refused_stream": lambda: chat(
            user("hello"), stream=True, response_format={"type": "nonsense"}
        ),
        "models": client.models.list,
        "nothing_there": lambda: client.get("/nothing", cast_to=object),
    }
    for status in (400, 401, 404, 422, 429, 500, 503):
        made[f"fail_{status}"] = lambda status=status: chat(user(f"fail with {status}"))
    made["fail_stream_429"] = lambda: chat(user("fail with 429"), stream=True)
    made["fail_midway"] = lambda: chat(user("fail midway"), stream=True)
    return made


def outcome(call: Callable[[], Any]) -> dict[str, Any]:
    """What the caller gets."""
    pieces: list[Any] = []
    try:
        answer = call()
        if not isinstance(answer, openai.Stream):
            told = answer if isinstance(answer, dict) else answer.model_dump(mode="json")
            return {"answer": told, "request_id": getattr(answer, "_request_id", None)}
        pieces.extend(piece.model_dump(mode="json") for piece in answer)
    except openai.APIStatusError as error:
        body = error.body
        status, request_id = error.status_code, error.request_id
        raised = {"raised": type(error).__name__, "status": status, "body": body}
        return {**raised, "request_id": request_id}
    except openai.APIError as error:
        return {"pieces": pieces, "raised": type(error).__name__, "body": error.body}
    else:
        return {"pieces": pieces}


def main() -> None:
    url, model, key, *names = sys.argv[1:]
    client = openai.OpenAI(base_url=url, api_key=key, max_retries=0, timeout=60)
    made = calls(client, model)
    results = {name: outcome(made[name]) for name in names or made}
    json.dump({"client": f"openai {openai.__version__}", "results": results}, sys.stdout)


if __name__ == "__main__":
    main()
