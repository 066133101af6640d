"""What users of Triton's HTTP client and of MLServer's types do, each with one request.

Run it where `tritonclient[http]` is installed: `python tensor_calls.py HOST:PORT MODEL KEY NAME …`.
What is named `mlserver` needs that as well. It prints what the users get.
"""
# pyright: reportMissingImports=false

import importlib.metadata
import json
import sys
import urllib.error
import urllib.request
from collections.abc import Callable
from typing import Any

import numpy as np
import tritonclient.http as triton
from tritonclient.utils import InferenceServerException

FEATURES = np.array([[0.5, -1.25, 3.0, 1e-7], [1.0, 2.0, -9.0, 0.0]])
NAMES = np.array([["Ann"], ["Bjørn 👋"]], dtype=np.object_)
OUTPUTS = ("label", "score", "greeting")

Calls = dict[str, Callable[[], Any]]


def inputs(*, binary: bool, name: str = "features") -> list[Any]:
    features = triton.InferInput(name, list(FEATURES.shape), "FP64")
    features.set_data_from_numpy(FEATURES, binary_data=binary)
    names = triton.InferInput("names", list(NAMES.shape), "BYTES")
    names.set_data_from_numpy(NAMES, binary_data=binary)
    return [features, names]


def wanted(*, binary: bool, names: tuple[str, ...] = OUTPUTS) -> list[Any]:
    return [triton.InferRequestedOutput(name, binary_data=binary) for name in names]


def told(answer: Any) -> Any:
    """All that a user can read from an answer."""
    response = answer.get_response()
    return {
        "response": response,
        "values": {
            one["name"]: listed(answer.as_numpy(one["name"])) for one in response["outputs"]
        },
    }


def listed(array: Any) -> Any:
    return [one.decode() if isinstance(one, bytes) else one for one in array.flatten().tolist()]


def calls(address: str, model: str, key: str) -> Calls:
    client = triton.InferenceServerClient(address)
    headers = {"Authorization": f"Bearer {key}"}

    def infer(given: list[Any], **said: Any) -> Any:
        return told(client.infer(model, given, headers=dict(headers), **said))  # it writes to them

    def mlserver() -> Any:
        from mlserver import types  # only where it is installed
        from mlserver.codecs import NumpyCodec, StringCodec

        body = types.InferenceRequest(
            id="mlserver-1",
            inputs=[
                NumpyCodec.encode_input("features", FEATURES),
                StringCodec.encode_input("names", NAMES[:, 0].tolist(), use_bytes=False),
            ],
        )
        request = urllib.request.Request(
            f"http://{address}/v2/models/{model}/infer",
            json.dumps(body.model_dump()).encode(),
            {"Content-Type": "application/json", **headers},
        )
        with urllib.request.urlopen(request) as answer:
            return types.InferenceResponse.model_validate_json(answer.read()).model_dump()

    return {
        "server_live": lambda: client.is_server_live(headers=headers),
        "server_ready": lambda: client.is_server_ready(headers=headers),
        "model_ready": lambda: client.is_model_ready(model, headers=headers),
        "server_metadata": lambda: client.get_server_metadata(headers=headers),
        "model_metadata": lambda: client.get_model_metadata(model, headers=headers),
        "infer_json": lambda: infer(inputs(binary=False), outputs=wanted(binary=False)),
        "infer_json_id": lambda: infer(
            inputs(binary=False),
            outputs=wanted(binary=False, names=("label",)),
            request_id="mine-1",
            parameters={"note": "Grüße"},
        ),
        "infer_binary": lambda: infer(inputs(binary=True), outputs=wanted(binary=True)),
        "infer_binary_in": lambda: infer(inputs(binary=True), outputs=wanted(binary=False)),
        "infer_binary_out": lambda: infer(inputs(binary=False), outputs=wanted(binary=True)),
        "infer_default_outputs": lambda: infer(inputs(binary=True)),
        "infer_wrong_input": lambda: infer(inputs(binary=False, name="nonsense")),
        "mlserver": mlserver,
    }


def outcome(call: Callable[[], Any]) -> dict[str, Any]:
    """What the caller gets."""
    try:
        return {"answer": call()}
    except InferenceServerException as error:
        return {"raised": type(error).__name__, "status": error.status(), "body": error.message()}
    except urllib.error.HTTPError as error:
        return {"raised": type(error).__name__, "status": error.code, "body": error.read().decode()}


def main() -> None:
    address, model, key, *names = sys.argv[1:]
    made = calls(address, model, key)
    results = {name: outcome(made[name]) for name in names or made}
    version = importlib.metadata.version("tritonclient")
    json.dump({"client": f"tritonclient {version}", "results": results}, sys.stdout)


if __name__ == "__main__":
    main()
