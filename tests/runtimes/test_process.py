import json
import os
import random
import signal
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import msgspec
import pytest

from shipworthy.domain.manifest import ProcessServing, Replicas
from shipworthy.errors import IntegrityError, RuntimeFailed
from shipworthy.runtimes.environments import Environments
from shipworthy.runtimes.process import ProcessRuntime, _environment


@pytest.fixture
def runtime(tmp_path, blobs, http):
    return ProcessRuntime(
        tmp_path / "runs",
        blobs=blobs,
        environments=Environments(tmp_path / "environments"),
        http=http,
        rng=random.Random(1),
    )


def server_of(replica) -> int:
    assert replica._process is not None
    return replica._process.pid


async def infer(http, replica, tools, value) -> tuple[int, dict]:
    body = json.dumps(tools.code_request(value)).encode()
    answer = await http.request("POST", f"{replica.url}/v2/models/tested/infer", body=body)
    return answer.status, json.loads(answer.body)


async def test_a_release_is_served_until_it_is_stopped(
    runtime, code_release, deployment, http, tools, tmp_path
):
    made = code_release(serving=ProcessServing(replicas=Replicas(min=2, max=2)))
    replicas = await runtime.start(made.release, deployment)
    assert len(replicas) == 2
    assert {replica.url for replica in replicas} == {None}
    await tools.wait_for(lambda: all(replica.url for replica in replicas))
    assert replicas[0].url != replicas[1].url
    for replica in replicas:
        assert (replica.problem, replica.doing) == (None, "ready")
        status, answer = await infer(http, replica, tools, 2)
        assert status == 200
        assert answer["outputs"][0]["data"] == [5.0]
        metadata = await http.request("GET", f"{replica.url}/v2/models/tested")
        assert json.loads(metadata.body)["parameters"]["digest"] == made.release.digest
        assert "loaded the factor" in "\n".join(replica.last_lines())
    servers = [server_of(replica) for replica in replicas]
    hosts = [host for server in servers for host in tools.hosts_of(server)]
    assert len(hosts) == 2
    for replica in replicas:
        await replica.stop(5.0)
        assert replica.url is None
    await tools.wait_for(lambda: not any(map(tools.alive, [*servers, *hosts])))
    assert not (tmp_path / "runs" / "d1").exists()


async def test_a_killed_server_comes_back(runtime, code_release, deployment, http, tools):
    (replica,) = await runtime.start(code_release().release, deployment)
    await tools.wait_for(lambda: replica.url)
    before = server_of(replica)
    os.kill(before, signal.SIGKILL)
    await tools.wait_for(lambda: replica.url is None)
    assert replica.problem is None
    await tools.wait_for(lambda: replica.url)
    assert server_of(replica) != before
    assert (await infer(http, replica, tools, 2))[0] == 200
    assert any("SIGKILL" in line for line in replica.last_lines(100))
    await replica.stop(5.0)


async def test_a_hanging_request_does_not_outlive_the_grace(
    runtime, code_release, deployment, http, tools
):
    import asyncio

    (replica,) = await runtime.start(code_release().release, deployment)
    await tools.wait_for(lambda: replica.url)
    server = server_of(replica)
    hosts = tools.hosts_of(server)
    hanging = asyncio.create_task(infer(http, replica, tools, -3))
    await asyncio.sleep(0.3)
    await replica.stop(0.5)
    await asyncio.gather(hanging, return_exceptions=True)
    assert not tools.alive(server)
    await tools.wait_for(lambda: not any(map(tools.alive, hosts)))


async def test_a_host_killed_while_it_loads_again_is_tried_again_at_once(
    runtime, code_release, deployment, tools, monkeypatch
):
    """What has answered before fails for what is around it, such as too little memory."""
    (replica,) = await runtime.start(code_release().release, deployment)
    await tools.wait_for(lambda: replica.url)
    lives = replica._one_life
    failures = [RuntimeFailed("the model's process ended while it loaded (killed by SIGKILL)")]

    async def fail_once(python: Path) -> str:
        if failures:
            raise failures.pop()
        return await lives(python)

    monkeypatch.setattr(replica, "_one_life", fail_once)
    os.kill(server_of(replica), signal.SIGKILL)
    await tools.wait_for(lambda: replica.url is None)
    await tools.wait_for(lambda: replica.url)
    assert not failures
    await replica.stop(5.0)


async def test_a_command_that_can_not_be_split_is_a_problem(
    runtime, code_release, deployment, tools
):
    release = code_release().release
    manifest = dict(release.manifest)
    manifest["serving"] = {**manifest.get("serving", {}), "command": "server --name 'open"}
    release = msgspec.structs.replace(release, manifest=manifest)
    (replica,) = await runtime.start(release, deployment)
    await tools.wait_for(lambda: replica.problem)
    assert "serving.command" in replica.problem
    await replica.stop(1.0)


async def test_altered_blobs_never_start(runtime, code_release, deployment, tools, blobs):
    made = code_release()
    (digest,) = [file.digest for file in made.manifest.artifacts[0].files]
    with blobs.open(digest) as file:
        path = Path(file.name)
    path.chmod(0o600)  # noqa: ASYNC240
    path.write_bytes(b"# other code")  # noqa: ASYNC240
    (replica,) = await runtime.start(made.release, deployment)
    await tools.wait_for(lambda: replica.problem)
    with pytest.raises(IntegrityError) as caught:
        blobs.verify(made.manifest.artifacts[0].files[0])
    assert replica.problem.partition(" ")[0] == str(caught.value).partition(" ")[0]
    assert replica.url is None
    await replica.stop(1.0)


async def test_a_model_that_does_not_load_is_a_problem_at_once(
    runtime, make_release, deployment, tools, tmp_path
):
    from shipworthy.domain.manifest import ArtifactSpec

    (tmp_path / "predictor.py").write_text("import nowhere_at_all")
    made = make_release(tmp_path, ArtifactSpec(path="predictor.py", format="python"))
    (replica,) = await runtime.start(made.release, deployment)
    await tools.wait_for(lambda: replica.problem)
    assert "nowhere_at_all" in replica.problem
    assert "Traceback" not in replica.problem
    assert any("Traceback" in line for line in replica.last_lines(100))
    await replica.stop(1.0)


SERVER = """
import http.server, sys
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b"{}")
http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""


async def test_any_server_can_be_the_command(runtime, code_release, deployment, tools, tmp_path):
    script = tmp_path / "server.py"
    script.write_text(SERVER)
    made = code_release(serving=ProcessServing(command=f"{{python}} {script} {{port}}"))
    (replica,) = await runtime.start(made.release, deployment)
    await tools.wait_for(lambda: replica.url)
    guard = server_of(replica)
    (server,) = tools.hosts_of(guard)
    await replica.stop(2.0)
    assert not tools.alive(guard)
    await tools.wait_for(lambda: not tools.alive(server))


async def test_a_command_must_say_where_it_listens(runtime, code_release, deployment, tools):
    made = code_release(serving=ProcessServing(command="mlserver start ."))
    (replica,) = await runtime.start(made.release, deployment)
    await tools.wait_for(lambda: replica.problem)
    assert "{port}" in replica.problem
    await replica.stop(1.0)


async def test_after_many_quick_deaths_it_counts_as_failed(
    runtime, code_release, deployment, tools, monkeypatch
):
    monkeypatch.setattr("shipworthy.runtimes.process.QUICK_DEATHS", 3)
    made = code_release(serving=ProcessServing(command="sh -c 'echo out of luck; exit 3' {port}"))
    (replica,) = await runtime.start(made.release, deployment)
    await tools.wait_for(lambda: replica.problem)
    assert "exit code 3" in replica.problem
    assert "out of luck" in replica.problem
    assert replica.last_lines(100).count("out of luck") == 3
    await replica.stop(1.0)


def test_a_replica_gets_none_of_our_secrets_and_no_more_threads_than_cpus():
    from shipworthy.domain.manifest import Resources

    ours = {"PATH": "/bin", "SHIPWORTHY_LEDGER": "postgresql://u:secret@h", "OMP_NUM_THREADS": "64"}
    theirs = _environment(ours, Resources(cpu=2))
    assert "SHIPWORTHY_LEDGER" not in theirs
    assert (theirs["PATH"], theirs["OMP_NUM_THREADS"]) == ("/bin", "2")
    assert theirs["CUDA_VISIBLE_DEVICES"] == ""
    assert "CUDA_VISIBLE_DEVICES" not in _environment(ours, Resources(gpu=1))


PARENT = """
import asyncio, json, random, sys
from pathlib import Path
import aiohttp
from shipworthy.domain.lifecycle import Deployment, Release
from shipworthy.errors import Unavailable
from shipworthy.ports import HttpResponse
from shipworthy.runtimes.environments import Environments
from shipworthy.runtimes.process import ProcessRuntime
from shipworthy.stores.blobs import LocalBlobs
import msgspec

class Http:
    async def request(self, method, url, *, timeout):
        try:
            async with aiohttp.ClientSession() as session, session.get(url) as response:
                return HttpResponse(status=response.status, headers={}, body=b"")
        except aiohttp.ClientError as error:
            raise Unavailable("not there yet") from error

async def main():
    root = Path(sys.argv[1])
    release = msgspec.json.decode(sys.argv[2], type=Release)
    deployment = msgspec.json.decode(sys.argv[3], type=Deployment)
    runtime = ProcessRuntime(
        root / "runs", blobs=LocalBlobs(root / "blobs"), http=Http(), rng=random.Random(1),
        environments=Environments(root / "environments"),
    )
    (replica,) = await runtime.start(release, deployment)
    while replica.url is None:
        await asyncio.sleep(0.05)
    print(replica._process.pid, flush=True)
    await asyncio.sleep(600)

asyncio.run(main())
"""


@pytest.mark.parametrize("command", ["shipworthy serve {release}", "{python} SCRIPT {port}"])
@pytest.mark.parametrize("before", [None, signal.SIGSTOP, signal.SIGKILL])
def test_no_orphans_when_the_parent_is_killed(
    command, before, code_release, deployment, tools, tmp_path
):
    """Also when the server has been stopped, with all it started, or is killed first."""
    import msgspec

    script = tmp_path / "server.py"
    script.write_text(SERVER)
    serving = ProcessServing(command=command.replace("SCRIPT", str(script)))
    release = msgspec.json.encode(code_release(serving=serving).release)
    with subprocess.Popen(
        [
            sys.executable, "-c", textwrap.dedent(PARENT), str(tmp_path), release.decode(),
            msgspec.json.encode(deployment).decode(),
        ],
        stdout=subprocess.PIPE,
    ) as parent:  # fmt: skip
        assert parent.stdout is not None
        timer = threading.Timer(20, parent.kill)
        timer.start()
        server = int(parent.stdout.readline())
        timer.cancel()
        hosts = tools.hosts_of(server)
        assert hosts
        if before is signal.SIGKILL:
            parent.send_signal(signal.SIGSTOP)  # it must not help
        for pid in (server, *hosts) if before is signal.SIGSTOP else (server,) if before else ():
            os.kill(pid, before)
        parent.kill()
    tools.wait_until(lambda: not any(map(tools.alive, [server, *hosts])))
