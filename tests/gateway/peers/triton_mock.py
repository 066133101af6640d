"""A mock of Triton's HTTP server, after its published protocol: tensors in binary, both ways.

MLServer takes JSON alone. This answers as Triton does: compact JSON, the type before the shape,
and values behind it where the client wants them so. `python triton_mock.py PORT`.
"""

import json
import struct
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

LENGTH = "Inference-Header-Content-Length"
METADATA: dict[str, Any] = {
    "name": "tiny",
    "versions": ["1"],
    "platform": "python",
    "inputs": [
        {"name": "features", "datatype": "FP64", "shape": [-1, 4]},
        {"name": "names", "datatype": "BYTES", "shape": [-1, 1]},
    ],
    "outputs": [
        {"name": "label", "datatype": "INT64", "shape": [-1, 1]},
        {"name": "score", "datatype": "FP32", "shape": [-1, 1]},
        {"name": "greeting", "datatype": "BYTES", "shape": [-1, 1]},
    ],
}
DOCUMENTS = {
    "/v2": {"name": "triton", "version": "2.61.0", "extensions": ["binary_tensor_data"]},
    "/v2/models/tiny": METADATA,
}
SILENT = ("/v2/health/live", "/v2/health/ready", "/v2/models/tiny/ready")


def values_of(datatype: str, raw: bytes) -> list[Any]:
    if datatype == "FP64":
        return list(struct.unpack(f"<{len(raw) // 8}d", raw))
    texts: list[str] = []
    at = 0
    while at < len(raw):
        (size,) = struct.unpack_from("<I", raw, at)
        texts.append(raw[at + 4 : at + 4 + size].decode())
        at += 4 + size
    return texts


def raw_of(datatype: str, values: list[Any]) -> bytes:
    if datatype == "BYTES":
        texts = [value.encode() for value in values]
        return b"".join(struct.pack("<I", len(text)) + text for text in texts)
    return struct.pack(f"<{len(values)}{'q' if datatype == 'INT64' else 'f'}", *values)


def given(body: bytes, length: int) -> tuple[dict[str, Any], dict[str, list[Any]]]:
    """What the request says, and the values of its inputs."""
    message = json.loads(body[:length])
    values: dict[str, list[Any]] = {}
    at = length
    for tensor in message["inputs"]:
        size = tensor.get("parameters", {}).get("binary_data_size")
        if size is None:
            values[tensor["name"]] = tensor["data"]
        else:
            values[tensor["name"]] = values_of(tensor["datatype"], body[at : at + size])
            at += size
    return message, values


def answered(message: dict[str, Any], values: dict[str, list[Any]]) -> tuple[bytes, bytes]:
    """The answer's JSON, and what stands behind it."""
    features, names = values["features"], values["names"]
    score = [sum(features[at : at + 4]) for at in range(0, len(features), 4)]
    outputs = {
        "label": [int(one > 0) for one in score],
        "score": score,
        "greeting": [f"Grüße, {name}" for name in names],
    }
    every = message.get("parameters", {}).get("binary_data_output", False)
    wanted: list[dict[str, Any]] = message.get("outputs") or [{"name": name} for name in outputs]
    types = {one["name"]: one["datatype"] for one in METADATA["outputs"]}
    told: list[dict[str, Any]] = []
    behind = b""
    for one in wanted:
        name, data = one["name"], outputs[one["name"]]
        tensor: dict[str, Any] = {"name": name, "datatype": types[name], "shape": [len(data), 1]}
        if one.get("parameters", {}).get("binary_data", every):
            raw = raw_of(types[name], data)
            tensor["parameters"] = {"binary_data_size": len(raw)}
            behind += raw
        else:
            tensor["data"] = data
        told.append(tensor)
    head = {"id": message["id"]} if "id" in message else {}
    answer = {**head, "model_name": "tiny", "model_version": "1", "outputs": told}
    return json.dumps(answer, separators=(",", ":")).encode(), behind


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server_version = "mock"
    sys_version = ""

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002  # its signature
        pass

    def do_GET(self) -> None:
        if self.path in SILENT:
            self.tell(200, b"")
        else:
            self.tell(200, json.dumps(DOCUMENTS[self.path], separators=(",", ":")).encode())

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["content-length"]))
        message, values = given(body, int(self.headers.get(LENGTH, len(body))))
        if set(values) != {"features", "names"}:
            self.tell(400, b'{"error":"unexpected inference input for model \'tiny\'"}')
            return
        text, behind = answered(message, values)
        if behind:
            length = {LENGTH: str(len(text))}
            self.tell(200, text + behind, "application/octet-stream", **length)
        else:
            self.tell(200, text)

    def tell(
        self, status: int, body: bytes, kind: str = "application/json", **headers: str
    ) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


if __name__ == "__main__":
    ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
