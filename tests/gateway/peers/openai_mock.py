"""A mock of OpenAI's API, after its published reference: what no server at hand can be asked for.

It answers as the reference shows it, with spaces in whole answers and none in events, headers and
errors included. Nothing in it is a model. `python openai_mock.py PORT`.
"""

import base64
import json
import struct
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

TYPES = {
    400: ("invalid_request_error", None),
    401: ("invalid_request_error", "invalid_api_key"),
    404: ("invalid_request_error", "model_not_found"),
    422: ("invalid_request_error", None),
    429: ("tokens", "rate_limit_exceeded"),
    500: ("server_error", None),
    503: ("server_error", None),
}
COMMON = {
    "x-request-id": "req_0123456789abcdef",
    "openai-processing-ms": "187",
    "openai-version": "2020-10-01",
    "openai-organization": "the-upstreams-own",
    "x-ratelimit-limit-requests": "10000",
    "x-ratelimit-remaining-requests": "9999",
    "set-cookie": "__cf_bm=upstream; path=/; HttpOnly",
}
USAGE: dict[str, Any] = {
    "prompt_tokens": 9,
    "completion_tokens": 4,
    "total_tokens": 13,
    "prompt_tokens_details": {"cached_tokens": 0, "audio_tokens": 0},
    "completion_tokens_details": {"reasoning_tokens": 0},
}
TEXT = ["It", " is", ' “fine” \\ "ok"', "\n👋"]
CALL: dict[str, Any] = {
    "id": "call_abc",
    "type": "function",
    "function": {"name": "weather", "arguments": '{"city":"Reykjavík"}'},
}


def logprob(text: str) -> dict[str, Any]:
    return {"token": text, "logprob": -0.31725305, "bytes": list(text.encode()), "top_logprobs": []}


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server_version = "mock"
    sys_version = ""

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002  # its signature
        pass

    def do_GET(self) -> None:
        if self.path != "/v1/models":
            self.fail(404, f"Invalid URL (GET {self.path})")
            return
        model = {"id": "tiny", "object": "model", "created": 1, "owned_by": "mock"}
        self.tell(200, {"object": "list", "data": [model]})

    def do_POST(self) -> None:
        said = json.loads(self.rfile.read(int(self.headers["content-length"])))
        last = str(said["messages"][-1]["content"]) if "messages" in said else ""
        if last.startswith("fail with "):
            self.fail(int(last.removeprefix("fail with ")), "mock: as you wish")
        elif said.get("response_format", {}).get("type") == "nonsense":
            self.fail(400, "Invalid value: 'nonsense'. Supported values are: 'json_object'.")
        elif self.path == "/v1/embeddings":
            self.tell(200, embeddings(said))
        elif said.get("stream"):
            self.stream(said, midway=last == "fail midway")
        else:
            self.tell(200, whole(said))

    def fail(self, status: int, message: str) -> None:
        kind, code = TYPES[status]
        extra = {"retry-after": "7", "x-should-retry": "true"} if status == 429 else {}
        error = {"message": message, "type": kind, "param": None, "code": code}
        self.tell(status, {"error": error}, **extra)

    def tell(self, status: int, answer: Any, **headers: str) -> None:
        body = json.dumps(answer, indent=2, ensure_ascii=False).encode()
        self.head(status, "application/json", **headers, **{"content-length": str(len(body))})
        self.wfile.write(body)

    def stream(self, said: dict[str, Any], *, midway: bool) -> None:
        self.head(200, "text/event-stream; charset=utf-8", **{"transfer-encoding": "chunked"})
        events = [
            json.dumps(one, separators=(",", ":"), ensure_ascii=False) for one in chunks(said)
        ]
        if midway:
            message = "The server had an error while processing your request."
            error = {"message": message, "type": "server_error", "param": None, "code": None}
            events = [*events[:3], json.dumps({"error": error})]
        else:
            events.append("[DONE]")
        for data in events:
            event = b"data: %b\n\n" % data.encode()
            self.wfile.write(b"%x\r\n%b\r\n" % (len(event), event))
            self.wfile.flush()
        self.wfile.write(b"0\r\n\r\n")

    def head(self, status: int, kind: str, **headers: str) -> None:
        self.send_response(status)
        for name, value in {"content-type": kind, **COMMON, **headers}.items():
            self.send_header(name, value)
        self.end_headers()


def described(said: dict[str, Any], kind: str) -> dict[str, Any]:
    return {
        "id": "chatcmpl-mock",
        "object": kind,
        "created": 1760000000,
        "model": f"{said['model']}-2026-01-01",
    }


def embeddings(said: dict[str, Any]) -> dict[str, Any]:
    texts = said["input"] if isinstance(said["input"], list) else [said["input"]]
    numbers = [-0.00692899, 0.5, 1e-07]
    packed = base64.b64encode(struct.pack("<3f", *numbers)).decode()
    vector: Any = packed if said.get("encoding_format") == "base64" else numbers
    data = [{"object": "embedding", "index": at, "embedding": vector} for at, _ in enumerate(texts)]
    usage = {"prompt_tokens": 2, "total_tokens": 2}
    return {"object": "list", "data": data, "model": said["model"], "usage": usage}


def whole(said: dict[str, Any]) -> dict[str, Any]:
    if "messages" not in said:
        prompts = said["prompt"] if isinstance(said["prompt"], list) else [said["prompt"]]
        choices = [
            {"text": "".join(TEXT), "index": at, "logprobs": None, "finish_reason": "stop"}
            for at, _ in enumerate(prompts)
        ]
        return {**described(said, "text_completion"), "choices": choices, "usage": USAGE}
    message: dict[str, Any] = {"role": "assistant", "content": "".join(TEXT)}
    if said.get("tool_choice") == "required":
        message |= {"content": None, "tool_calls": [CALL]}
    elif "response_format" in said:
        message["content"] = '{"ok": true}'
    message |= {"refusal": None, "annotations": []}
    logprobs = {"content": [logprob(text) for text in TEXT]} if said.get("logprobs") else None
    finish = "tool_calls" if "tool_calls" in message else "stop"
    choices = [
        {"index": at, "message": message, "logprobs": logprobs, "finish_reason": finish}
        for at in range(said.get("n") or 1)
    ]
    end = {"usage": USAGE, "service_tier": "default", "system_fingerprint": "fp_mock"}
    return {**described(said, "chat.completion"), "choices": choices, **end}


def chunks(said: dict[str, Any]) -> list[dict[str, Any]]:
    chat = "messages" in said
    usage = (said.get("stream_options") or {}).get("include_usage")
    head = described(said, "chat.completion.chunk" if chat else "text_completion")
    head |= {"system_fingerprint": "fp_mock"}
    told = {"usage": None} if usage else {}

    def choice(at: int, delta: Any, finish: str | None = None) -> dict[str, Any]:
        logprobs = None
        if chat and said.get("logprobs") and delta.get("content"):
            logprobs = {"content": [logprob(delta["content"])]}
        said_now = {"delta": delta} if chat else {"text": delta}
        return {"index": at, **said_now, "logprobs": logprobs, "finish_reason": finish}

    made: list[dict[str, Any]] = []
    for at in range(said.get("n") or 1):
        if not chat:
            made += [choice(at, text) for text in TEXT] + [choice(at, "", "stop")]
        elif said.get("tool_choice") == "required":
            function = CALL["function"]
            begun = {**CALL, "index": 0, "function": {**function, "arguments": ""}}
            made.append(choice(at, {"role": "assistant", "content": None, "tool_calls": [begun]}))
            for part in ('{"city":', '"Reykjavík"}'):
                more = {"index": 0, "function": {"arguments": part}}
                made.append(choice(at, {"tool_calls": [more]}))
            made.append(choice(at, {}, "tool_calls"))
        else:
            made.append(choice(at, {"role": "assistant", "content": "", "refusal": None}))
            made += [choice(at, {"content": text}) for text in TEXT]
            made.append(choice(at, {}, "stop"))
    events = [{**head, "choices": [one], **told} for one in made]
    return [*events, {**head, "choices": [], "usage": USAGE}] if usage else events


if __name__ == "__main__":
    ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
