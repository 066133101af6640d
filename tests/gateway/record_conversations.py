"""Record what real clients and real servers say to each other, byte for byte, into `samples/`.

Each option names the Python interpreter that has the packages; what has none is not recorded anew:

    python tests/gateway/record_conversations.py --openai PYTHON --llama PYTHON
        --mlserver PYTHON --mlflow PYTHON

`--openai` needs `openai`, `--llama` needs `xllamacpp` and `gguf` (llama.cpp's own server; the
model is made up here and its weights are random), `--mlserver` needs `mlserver`, whose package
brings `tritonclient`, and `--mlflow` needs `mlflow`. `openai-mock.json` and `tensors-mock.json` are
conversations with mocks, for what those servers don't do; their names say so. A sample is a list of
exchanges: the request and the answer, each as the pieces that arrived, in Latin-1 so that any byte
has its character.
"""

import argparse
import asyncio
import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Awaitable, Callable, Generator
from pathlib import Path
from typing import Any, Final

PEERS: Final = Path(__file__).parent / "peers"
SAMPLES: Final = Path(__file__).parent / "samples"
KEY: Final = "the-clients-key"
CHATS: Final = (
    "chat", "chat_unicode", "chat_unknown_fields", "chat_n_logprobs", "chat_tools",
    "chat_tool_result", "chat_json", "chat_json_schema", "chat_vision", "chat_stream",
    "chat_stream_usage", "chat_stream_n_logprobs", "chat_stream_tools", "completions",
    "completions_several", "completions_stream", "refused", "refused_stream", "models",
    "nothing_there",
)  # fmt: skip
EMBEDDINGS: Final = ("embeddings", "embeddings_float")
FAILURES: Final = (
    "fail_400", "fail_401", "fail_404", "fail_422", "fail_429", "fail_500", "fail_503",
    "fail_stream_429", "fail_midway",
)  # fmt: skip
TENSORS: Final = (
    "server_live", "server_ready", "model_ready", "server_metadata", "model_metadata",
    "infer_json", "infer_json_id", "infer_binary_out", "infer_wrong_input",
)  # fmt: skip
BINARY: Final = ("infer_binary", "infer_binary_in", "infer_default_outputs")

Exchange = dict[str, list[bytes]]


class Recorder:
    """Stands between a client and a server, and notes who says what; one exchange after another."""

    def __init__(self, port: int) -> None:
        self.exchanges: list[Exchange] = []
        self._port = port

    async def __call__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there, back = await asyncio.open_connection("127.0.0.1", self._port)
        current: list[Exchange] = []

        def asked(data: bytes) -> None:
            if not current or current[-1]["answer"]:
                current.append({"request": [], "answer": []})
                self.exchanges.append(current[-1])
            current[-1]["request"].append(data)

        def answered(data: bytes) -> None:
            current[-1]["answer"].append(data)

        await asyncio.gather(passed(reader, back, asked), passed(there, writer, answered))


async def passed(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, note: Callable[[bytes], None]
) -> None:
    with contextlib.suppress(ConnectionError):
        while data := await reader.read(65536):
            note(data)
            writer.write(data)
            await writer.drain()
    writer.close()


async def recorded(port: int, run: Callable[[int], Awaitable[str]]) -> tuple[list[Exchange], str]:
    """The exchanges with the server at this port while `run` talks to the port that it is given."""
    recorder = Recorder(port)
    server = await asyncio.start_server(recorder, "127.0.0.1", 0)
    said = await run(server.sockets[0].getsockname()[1])
    server.close()
    return recorder.exchanges, said


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@contextlib.contextmanager
def serving(path: str, port: int, *command: str, **changes: Any) -> Generator[int]:
    """A server while it runs, from when it answers at `path`."""
    process = subprocess.Popen(command, stdout=sys.stderr, start_new_session=True, **changes)
    try:
        for _ in range(600):
            assert process.poll() is None, command
            with contextlib.suppress(OSError):
                urllib.request.urlopen(f"http://127.0.0.1:{port}{path}").close()
                break
            time.sleep(0.2)
        yield port
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, 15)
        process.wait()


def talk(port: int, *command: str) -> tuple[dict[str, Exchange], str]:
    """What a script of `peers/` and a server say to each other, by the names of its calls."""

    async def run(recording: int) -> str:
        filled = [part.format(port=recording) for part in command]
        process = await asyncio.create_subprocess_exec(*filled, stdout=subprocess.PIPE)
        out, _ = await process.communicate()
        assert process.returncode == 0, filled
        return out.decode()

    exchanges, said = asyncio.run(recorded(port, run))
    told = json.loads(said)
    return dict(zip(told["results"], exchanges, strict=True)), told["client"]


def write(name: str, client: str, server: str, exchanges: dict[str, Exchange]) -> None:
    listed = [
        {
            "name": each,
            **{side: [one.decode("latin-1") for one in pieces] for side, pieces in said.items()},
        }
        for each, said in exchanges.items()
    ]
    document = {"client": client, "server": server, "exchanges": listed}
    (SAMPLES / f"{name}.json").write_text(json.dumps(document, indent=1) + "\n")


def version(python: str, package: str) -> str:
    code = f"import importlib.metadata as m; print(m.version({package!r}))"
    return f"{package} {subprocess.check_output([python, '-c', code], text=True).strip()}"


def script(name: str) -> str:
    return str(PEERS / f"{name}.py")


def with_mock(openai: str) -> None:
    port = free_port()
    names = (*(name for name in CHATS if name != "nothing_there"), *EMBEDDINGS, *FAILURES)
    with serving("/v1/models", port, sys.executable, script("openai_mock"), str(port)):
        exchanges, client = talk(
            port, openai, script("openai_calls"),
            "http://127.0.0.1:{port}/v1", "tiny", KEY, *names,
        )  # fmt: skip
    write("openai-mock", client, "a mock of OpenAI's API", exchanges)


def with_llama(openai: str, llama: str, folder: Path) -> None:
    exchanges: dict[str, Exchange] = {}
    client = ""
    for mode, names in ((), CHATS), (("embed",), EMBEDDINGS):
        port = free_port()
        command = (llama, script("llama_server"), str(port), str(folder / "tiny.gguf"), *mode)
        with serving("/health", port, *command):
            more, client = talk(
                port, openai, script("openai_calls"),
                "http://127.0.0.1:{port}/v1", "tiny", KEY, *names,
            )  # fmt: skip
        exchanges |= more
    write(
        "openai-llama.cpp",
        client,
        f"llama.cpp's server in {version(llama, 'xllamacpp')}",
        exchanges,
    )


def with_triton_mock(python: str) -> None:
    port = free_port()
    with serving("/v2", port, sys.executable, script("triton_mock"), str(port)):
        exchanges, client = talk(
            port, python, script("tensor_calls"), "127.0.0.1:{port}", "tiny", KEY,
            *TENSORS, *BINARY,
        )  # fmt: skip
    write("tensors-mock", client, "a mock of Triton's HTTP server", exchanges)


def with_mlserver(python: str, folder: Path) -> None:
    shutil.copy(script("mlserver_model"), folder)
    port, grpc, metrics = free_port(), free_port(), free_port()
    tensors = {
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
    model = {
        "name": "tiny",
        "implementation": "mlserver_model.Tiny",
        "parameters": {"version": "1"},
        **tensors,
    }
    (folder / "model-settings.json").write_text(json.dumps(model))
    settings = {
        "host": "127.0.0.1",
        "http_port": port,
        "grpc_port": grpc,
        "metrics_port": metrics,
        "parallel_workers": 0,
    }
    (folder / "settings.json").write_text(json.dumps(settings))
    start = (python, "-c", "from mlserver.cli import main; main()", "start", ".")
    with serving("/v2/models/tiny/ready", port, *start, cwd=folder):
        exchanges, client = talk(
            port, python, script("tensor_calls"), "127.0.0.1:{port}", "tiny", KEY,
            *TENSORS, "mlserver",
        )  # fmt: skip
    server = version(python, "mlserver")
    write("tensors-mlserver", f"{client}, {server}'s types", server, exchanges)


def with_mlflow(python: str, folder: Path) -> None:
    model = folder / "mlflow"
    subprocess.run([python, script("mlflow_model"), str(model)], check=True, stdout=sys.stderr)
    port = free_port()
    environment = {**os.environ, "PATH": f"{Path(python).parent}:{os.environ['PATH']}"}
    start = (
        python, "-m", "mlflow", "models", "serve", "--env-manager", "local",
        "-m", str(model), "-p", str(port),
    )  # fmt: skip
    with serving("/ping", port, *start, env=environment):
        exchanges, client = talk(
            port, python, script("scoring_calls"), "http://127.0.0.1:{port}", KEY
        )
    write("scoring-mlflow", client, version(python, "mlflow"), exchanges)


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    for name in ("openai", "llama", "mlserver", "mlflow"):
        options.add_argument(f"--{name}")
    asked = options.parse_args()
    SAMPLES.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        if asked.openai:
            with_mock(asked.openai)
        if asked.openai and asked.llama:
            with_llama(asked.openai, asked.llama, folder)
        if asked.mlserver:
            with_triton_mock(asked.mlserver)
            with_mlserver(asked.mlserver, folder)
        if asked.mlflow:
            with_mlflow(asked.mlflow, folder)


if __name__ == "__main__":
    main()
