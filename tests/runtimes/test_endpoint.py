import json

import pytest

from shipworthy.domain.lifecycle import Release
from shipworthy.domain.manifest import EndpointServing, Environment, Inference, Manifest
from shipworthy.errors import RuntimeFailed, Unavailable
from shipworthy.ports import HttpResponse, RunningReplica, Runtime
from shipworthy.runtimes.endpoint import EndpointRuntime, probe, read_credential, reported_model
from shipworthy.runtimes.process import ProcessReplica, ProcessRuntime


class Server:
    """A server elsewhere, as its answers: path to status and body."""

    def __init__(self) -> None:
        self.up = True
        self.answers: dict[str, tuple[int, object]] = {}
        self.sent: list[dict[str, str]] = []

    async def request(self, method, url, *, headers=None, body=None, timeout=10.0):  # noqa: ASYNC109
        if not self.up:
            raise Unavailable(f"{url} does not answer; see to the server")
        self.sent.append(dict(headers or {}))
        status, answer = self.answers.get(url.removeprefix("http://there"), (404, {}))
        return HttpResponse(status=status, headers={}, body=json.dumps(answer).encode())


@pytest.fixture
def server() -> Server:
    return Server()


OIP = EndpointServing(runtime="endpoint", urls=("http://there",), served_model="org/m")
OPENAI = OIP.model_copy(update={"urls": ("http://there/v1",)})


async def test_an_oip_server_is_asked_for_the_model(server):
    server.answers["/v2/models/org%2Fm/ready"] = (200, {})
    await probe("http://there/", OIP, "oip-v2", server)


async def test_an_openai_server_must_list_the_model(server):
    server.answers["/v1/models"] = (200, {"data": [{"id": "other"}]})
    with pytest.raises(RuntimeFailed, match="does not list 'org/m'"):
        await probe("http://there/v1", OPENAI, "openai", server)
    server.answers["/v1/models"] = (200, {"data": [{"id": "other"}, {"id": "org/m"}]})
    await probe("http://there/v1", OPENAI, "openai", server)
    server.answers["/v1/models"] = (200, "?")
    with pytest.raises(RuntimeFailed, match="does not list"):
        await probe("http://there/v1", OPENAI, "openai", server)


async def test_an_openai_server_named_without_v1_is_asked_there(server):
    server.answers["/v1/models"] = (200, {"data": [{"id": "org/m"}]})
    await probe("http://there", OIP, "openai", server)
    assert await reported_model("http://there", OIP, "openai", server) == "org/m"


async def test_an_mlflow_server_is_pinged_and_tells_no_name(server):
    with pytest.raises(RuntimeFailed, match="not ready"):
        await probe("http://there", OIP, "mlflow", server)
    server.answers["/ping"] = (200, "")
    await probe("http://there", OIP, "mlflow", server)
    assert await reported_model("http://there", OIP, "mlflow", server) is None


@pytest.mark.parametrize(
    ("protocol", "path", "answer", "told"),
    [
        ("openai", "/v1/models", (200, {"data": [{"id": "org/m"}, {"id": "lora"}]}), "org/m"),
        ("openai", "/v1/models", (200, {"data": [{"id": "a"}, {"id": "b"}]}), "a, b"),
        ("openai", "/v1/models", (200, "no list"), None),
        ("openai", "/v1/models", (401, {}), "nothing (HTTP 401)"),
        ("oip-v2", "/v2/models/org%2Fm", (200, {"name": "org/m"}), "org/m"),
        ("oip-v2", "/v2/models/org%2Fm", (200, []), None),
    ],
)
async def test_what_a_server_says_that_it_serves(server, protocol, path, answer, told):
    server.answers[path] = answer
    assert await reported_model("http://there", OIP, protocol, server) == told


@pytest.mark.parametrize(("status", "said"), [(401, "refuses our credential"), (503, "HTTP 503")])
async def test_other_answers(server, status, said):
    server.answers["/v1/models"] = (status, {})
    with pytest.raises(RuntimeFailed, match=said):
        await probe("http://there/v1", OPENAI, "openai", server)


async def test_the_credential_is_sent(server, monkeypatch):
    monkeypatch.setenv("UPSTREAM", "s3cret")
    server.answers["/v1/models"] = (200, {"data": [{"id": "org/m"}]})
    with_key = OPENAI.model_copy(update={"credential": "env:UPSTREAM"})
    await probe("http://there/v1", with_key, "openai", server)
    assert server.sent == [{"authorization": "Bearer s3cret"}]


def test_where_credentials_come_from(tmp_path, monkeypatch):
    (tmp_path / "key").write_text("abc\n")
    assert read_credential(f"file:{tmp_path}/key") == "abc"
    monkeypatch.delenv("NOT_SET", raising=False)
    with pytest.raises(RuntimeFailed, match="env:NOT_SET is empty"):
        read_credential("env:NOT_SET")
    with pytest.raises(RuntimeFailed, match="can't be read"):
        read_credential("file:/nowhere/key")


async def test_a_replica_is_ready_while_the_server_is(server, deployment, tools):
    manifest = Manifest(
        model="tested",
        artifacts=(),
        code=None,
        environment=Environment(),
        data=(),
        contract=tools.CODE_CONTRACT,
        inference=Inference(engine="external", engine_version="?"),
        serving=OIP,
    )
    release = Release(
        model="tested", version=1, digest=manifest.digest(), manifest=manifest.content(),
        created_at=0.0, created_by="me",
    )  # fmt: skip
    (replica,) = await EndpointRuntime(server, every=0.01).start(release, deployment)
    assert (replica.url, replica.problem) == (None, None)
    await tools.wait_for(lambda: replica.problem)
    assert "HTTP 404" in replica.doing
    server.answers["/v2/models/org%2Fm/ready"] = (200, {})
    await tools.wait_for(lambda: replica.url == "http://there")
    assert (replica.problem, replica.doing, replica.last_lines()) == (None, "ready", [])
    server.up = False
    await tools.wait_for(lambda: replica.problem)
    assert replica.url is None
    await replica.stop(1.0)


def both_runtimes_are_runtimes(process: ProcessRuntime, endpoint: EndpointRuntime) -> list[Runtime]:
    """For the type checker."""
    return [process, endpoint]


def a_replica_is_one(replica: ProcessReplica) -> RunningReplica:
    """For the type checker."""
    return replica


@pytest.mark.parametrize("content", [b"\xff\xfekey", b"two\nlines", "clé".encode()])
def test_a_credential_that_no_header_can_carry_is_refused_unseen(tmp_path, content):
    (tmp_path / "key").write_bytes(content)
    with pytest.raises(RuntimeFailed, match="no header can carry") as caught:
        read_credential(f"file:{tmp_path}/key")
    assert "key" not in str(caught.value).replace(f"{tmp_path}/key", "")
    assert caught.value.__cause__ is None
