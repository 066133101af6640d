"""The official clients, as they are, against a worker: their users get what they'd get without it.

They live in an environment of their own, which these two lines make:

    python -m venv .peers/clients
    .peers/clients/bin/pip install -r tests/gateway/peers/requirements.txt

`SHIPWORTHY_CLIENTS` names the Python of another one. Servers are the mocks in `peers/`.
"""

import asyncio
import json
import os
import socket
import subprocess
import sys
from collections.abc import AsyncGenerator, Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
from tests.gateway.peer_contracts import LANGUAGE, PATIENT, SCORING, TENSORS

from shipworthy.domain.contract import Contract
from shipworthy.domain.plan import Limits
from shipworthy.stores.limits import UsageTable

PEERS = Path(__file__).parent / "peers"
PYTHON = os.environ.get(
    "SHIPWORTHY_CLIENTS", str(Path(__file__).parents[2] / ".peers/clients/bin/python")
)

OURS = {
    "fail_401": ("InternalServerError", 502),  # the gateway's credential, not the client's
    "fail_404": ("InternalServerError", 502),
    "fail_429": ("InternalServerError", 503),  # the model's limit, not the client's
    "fail_stream_429": ("InternalServerError", 503),
    "fail_500": ("InternalServerError", 502),
    "fail_503": ("InternalServerError", 502),
    "nothing_there": ("NotFoundError", 404),
}
"""What is not told in the server's words: the gateway answers for its releases."""

pytestmark = pytest.mark.xdist_group("clients")


@pytest.fixture(scope="module", autouse=True)
def installed() -> None:
    """Without the clients there is nothing to test; where CI runs that is a failure."""
    code = "import openai, requests, tritonclient.http"
    try:
        subprocess.run([PYTHON, "-c", code], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        missing = f"{PYTHON} has no openai, requests and tritonclient; see this module's docstring"
        if os.environ.get("CI"):
            pytest.fail(missing, pytrace=False)
        pytest.skip(missing)


async def told(script: str, *arguments: str) -> dict[str, Any]:
    """What a script of `peers/` gets, by the names of its calls."""
    process = await asyncio.create_subprocess_exec(
        PYTHON, str(PEERS / script), *arguments, stdout=subprocess.PIPE
    )
    out, _ = await process.communicate()
    assert process.returncode == 0
    return json.loads(out)["results"]


@pytest.fixture
async def mock(worker) -> AsyncGenerator[Callable[[str], Any]]:
    """Start a mock of `peers/`; its port."""
    started: list[asyncio.subprocess.Process] = []

    async def start(name: str) -> int:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        command = (sys.executable, str(PEERS / name), str(port))
        started.append(await asyncio.create_subprocess_exec(*command))
        async with asyncio.timeout(30):
            while True:
                try:
                    _, writer = await asyncio.open_connection("127.0.0.1", port)
                except OSError:
                    await asyncio.sleep(0.02)
                else:
                    writer.close()
                    return port

    yield start
    for process in started:
        process.kill()
        await process.wait()


def plan_for(worker: Any, contract: Contract, url: str) -> Any:
    arm = msgspec.structs.replace(worker.arm(1, url, contract=contract), served_model="tiny")
    return worker.plan(name="tiny", model="tiny", stable=arm, deadlines=PATIENT)


async def test_openais_client_works_as_it_is(worker, mock):
    port = await mock("openai_mock.py")
    await worker.start(plan_for(worker, LANGUAGE, f"http://127.0.0.1:{port}"))
    direct = await told("openai_calls.py", f"http://127.0.0.1:{port}/v1", "tiny", "any")
    key = worker.keys["client"]
    passed = await told("openai_calls.py", f"{worker.url}/v1", "tiny", key)
    assert list(passed) == list(direct)
    listed = passed.pop("models")["answer"]["data"]
    assert [model["id"] for model in listed] == ["tiny"]
    for name, (error, status) in OURS.items():
        got = passed.pop(name)
        assert (got["raised"], got["status"]) == (error, status), name
        assert direct[name]["raised"], name
    assert passed["fail_midway"]["raised"] == "APIError"
    assert passed["fail_400"]["raised"] == "BadRequestError"
    for name, got in passed.items():
        assert got == direct[name], name


async def test_openais_client_raises_what_its_users_expect_of_the_gateways_own_refusals(
    worker, mock, tmp_path
):
    worker.outside["limits"] = UsageTable(tmp_path / "limits", worker.clock)
    keys = dict(worker.snapshot.keys)
    limits = Limits(requests_per_minute=1)
    keys["admin"] = msgspec.structs.replace(keys["admin"], limits=limits)
    worker.snapshot = msgspec.structs.replace(worker.snapshot, keys=keys)
    port = await mock("openai_mock.py")
    await worker.start(plan_for(worker, LANGUAGE, f"http://127.0.0.1:{port}"))

    async def raised(key: str, model: str = "tiny") -> list[str | None]:
        calls = ("chat", "chat_stream")
        got = await told(
            "openai_calls.py", f"{worker.url}/v1", model, worker.keys.get(key, key), *calls
        )
        return [got[name].get("raised") for name in calls]

    assert await raised("sw_wrong") == ["AuthenticationError"] * 2
    assert await raised("other") == ["PermissionDeniedError"] * 2
    assert await raised("client", "unheard-of") == ["NotFoundError"] * 2
    assert await raised("admin") == [None, "RateLimitError"]


async def test_tritons_client_works_as_it_is(worker, mock):
    port = await mock("triton_mock.py")
    await worker.start(plan_for(worker, TENSORS, f"http://127.0.0.1:{port}"))
    calls = tensor_calls()
    direct = await told("tensor_calls.py", f"127.0.0.1:{port}", "tiny", "any", *calls)
    address = f"127.0.0.1:{worker.port}"
    passed = await told("tensor_calls.py", address, "tiny", worker.keys["client"], *calls)
    for name in ("server_live", "server_ready", "model_ready"):
        assert passed[name] == {"answer": True}, name
    metadata = passed["model_metadata"]["answer"]
    for side in ("inputs", "outputs"):
        for told_of, real in zip(
            metadata[side], direct["model_metadata"]["answer"][side], strict=True
        ):
            assert {name: told_of[name] for name in real} == real
    assert passed["infer_wrong_input"]["raised"] == "InferenceServerException"
    for name in inferring(calls):
        assert passed[name] == direct[name], name


async def test_tritons_client_gets_binary_of_a_server_that_has_none(worker, model, mock):
    port = await mock("triton_mock.py")
    direct = await told(
        "tensor_calls.py", f"127.0.0.1:{port}", "tiny", "any", *inferring(tensor_calls())
    )
    answer = direct["infer_json"]["answer"]["response"]
    worker.model.behave = model.responding(json.dumps(answer).encode())
    await worker.start(plan_for(worker, TENSORS, worker.model.url))
    key, address = worker.keys["client"], f"127.0.0.1:{worker.port}"
    calls = ("infer_binary", "infer_binary_in", "infer_binary_out", "infer_default_outputs")
    passed = await told("tensor_calls.py", address, "tiny", key, *calls)
    for name in calls:
        assert passed[name]["answer"]["values"] == direct[name]["answer"]["values"], name
    for seen in worker.model.received:
        assert seen.headers["content-type"] == "application/json"
        assert json.loads(seen.body)["inputs"][1]["data"] == ["Ann", "Bjørn 👋"]


def tensor_calls() -> tuple[str, ...]:
    return (
        "server_live", "server_ready", "model_ready", "server_metadata", "model_metadata",
        "infer_json", "infer_json_id", "infer_binary", "infer_binary_in", "infer_binary_out",
        "infer_default_outputs", "infer_wrong_input",
    )  # fmt: skip


def inferring(calls: tuple[str, ...]) -> list[str]:
    return [name for name in calls if name.startswith("infer") and name != "infer_wrong_input"]


async def test_scoring_works_as_against_mlflow(worker, model):
    rows = [{"risk": 0.31, "why": "is pro"}, {"risk": 0.175, "why": "is frei – “x”"}]

    async def behave(writer: asyncio.StreamWriter) -> None:
        split = json.loads(worker.model.received[-1].body) if csv() is None else {}
        one = "inputs" in split
        answer = {"predictions": rows[:1] if one else rows}
        await model.responding(json.dumps(answer).encode())(writer)

    def csv() -> str | None:
        seen = worker.model.received[-1]
        return seen.body.decode() if seen.headers["content-type"] == "text/csv" else None

    worker.model.behave = behave
    await worker.start(plan_for(worker, SCORING, worker.model.url))
    address = f"{worker.url}/models/tiny"
    passed = await told("scoring_calls.py", address, worker.keys["client"])
    for name in ("split", "records", "instances", "csv"):
        assert passed[name] == {"status": 200, "answer": {"predictions": rows}}, name
    assert passed["inputs"]["answer"] == {"predictions": rows[:1]}
    for name in ("wrong_column", "not_json"):
        assert passed[name]["status"] == 400
        assert passed[name]["answer"]["error_code"] == "BAD_REQUEST"
        assert passed[name]["answer"]["message"]
