"""Fuzz what reads bytes from clients and servers: nothing but a named refusal may come of them.

Atheris leads libFuzzer by the branches of our own Python code. Each target runs in a process of its
own for `--seconds`, and states properties as well: what is passed on differs in one value, events
joined are the stream. A finding is kept in a file, and makes this script fail; run one again with
`--target NAME --input FILE`.

Atheris is not among the project's dependencies. To have it: `.venv/bin/python -m pip install
atheris`. Without it nothing is measured, and the figures say so.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from report import Report, argument_parser

_STATISTIC = re.compile(r"stat::number_of_executed_units:\s*(\d+)")
_COVERED = re.compile(r"cov: (\d+)")
_NAMES = """
model messages prompt input stream stream_options n tools content text choices delta message usage
prompt_tokens error index finish_reason tool_calls function arguments data embedding chat inputs
outputs name shape datatype parameters binary_data_size binary_data binary_data_output model_name
FP32 BYTES BOOL INT64 dataframe_split dataframe_records instances columns predictions x y
"""
_OTHERS = (
    "data: ",
    "data:",
    "event: error",
    "[DONE]",
    "\r\n",
    "\n\n",
    "\r\r",
    "\n\r\n",
    "null",
    "true",
)
_JSON = ("{}", "[]", '{"', '":', '",', "1e400", "NaN", "-1", r'"\u006dodel"', r'\"model"')
_WORDS = [*(f'"{name}"' for name in _NAMES.split()), *_OTHERS, *_JSON]
_CHAT = {"model": "chat", "messages": [{"role": "user", "content": "Hi"}], "stream": True}
_TENSOR = {"name": "x", "datatype": "FP32", "shape": [2], "data": [1, 2]}
_TEXTS = {"name": "y", "datatype": "BYTES", "shape": [1, 2], "data": ["a", "b"]}
_PACKED = {"name": "x", "datatype": "FP32", "shape": [2], "parameters": {"binary_data_size": 8}}


def _seed(document: Any, head: bytes = b"\0", tail: bytes = b"") -> bytes:
    return head + json.dumps(document).encode() + tail


def _packed(document: Any) -> bytes:
    text = json.dumps(document).encode()
    return len(text).to_bytes(2, "big") + text + b"\0\0\x80?\0\0\0@"


SEEDS: dict[str, list[bytes]] = {
    "openai_request": [
        _seed(_CHAT),
        _seed({"model": "chat", "prompt": ["a", "b"]}, b"\1"),
        _seed({"model": "chat", "input": [1, 2]}, b"\2"),
    ],
    "openai_answer": [
        _seed({"model": "m", "choices": [{"message": {"content": "Hi"}, "finish_reason": "stop"}]}),
        _seed({"model": "m", "choices": [{"text": "Hi"}], "usage": {"prompt_tokens": 1}}, b"\1"),
        _seed({"data": [{"embedding": [0.5]}], "usage": {"prompt_tokens": 1}}, b"\2"),
    ],
    "events": [
        _seed({"model": "m", "choices": [{"delta": {"content": "Hi"}}]}, b"\5data: ", b"\r\n\r\n"),
        b'\1data: {"error":{"message":"no"}}\n\n: ping\n\ndata: [DONE]\n\n',
        b"\2event: error\rdata: a\rdata: b\r\r\n\ndata: c\n\r\n",
    ],
    "oip": [
        _seed({"inputs": [_TENSOR], "outputs": [{"name": "x"}]}),
        _seed({"model_name": "m", "outputs": [_TENSOR, _TEXTS]}, b"\1"),
    ],
    "oip_binary": [
        b"\0" + _packed({"inputs": [_PACKED], "parameters": {"binary_data_output": True}}),
        b"\1" + _packed({"model_name": "m", "outputs": [_PACKED, _TEXTS]}),
    ],
    "mlflow": [
        _seed({"dataframe_split": {"columns": ["x"], "data": [[1], [2]]}}),
        _seed({"dataframe_records": [{"x": 1, "y": ["a", "b"]}]}),
        _seed({"inputs": {"x": [1, 2]}}),
        _seed({"instances": [{"x": 1}]}),
        b"\1x\n1\n2\n",
        _seed({"predictions": [1, 2]}, b"\2"),
    ],
}


# --- targets ----------------------------------------------------------------------------------


def _openai_request() -> Callable[[bytes], None]:
    from shipworthy.domain.plan import Behaviour
    from shipworthy.protocols import openai
    from shipworthy.protocols.messages import InvalidMessage

    behaviour = Behaviour(system="S", tools=({"type": "x"},), sampling={"seed": 1}, pinned=True)
    operations = ("chat", "completions", "embeddings")

    def one(data: bytes) -> None:
        operation, body = operations[data[0] % 3] if data else "chat", data[1:]
        with contextlib.suppress(InvalidMessage):
            request = openai.read_request(operation, body)
            passed = openai.for_upstream(
                body, request, served_model="org/m", behaviour=None, want_usage=False
            )
            with contextlib.suppress(RecursionError, ValueError):  # Python's own limits
                assert json.loads(passed) == {**json.loads(body), "model": "org/m"}
            again = openai.read_request(operation, passed)
            assert again.text_bytes == request.text_bytes
            changed = openai.for_upstream(
                body, request, served_model="org/m", behaviour=behaviour, want_usage=True
            )
            added = openai.read_request(operation, changed)
            assert added.model == "org/m"
            assert added.include_usage or not added.stream
            openai.with_behaviour(request, behaviour)

    return one


def _openai_answer() -> Callable[[bytes], None]:
    from shipworthy.protocols import openai

    operations = ("chat", "completions", "embeddings")

    def one(data: bytes) -> None:
        operation, body = operations[data[0] % 3] if data else "chat", data[1:]
        answered = openai.read_answer(operation, body)
        renamed = openai.rename_model(body, "org/m", "chat")
        openai.error_text(body)
        if not answered.problem:
            again = openai.read_answer(operation, renamed)
            assert again == answered
            with contextlib.suppress(RecursionError, ValueError):
                said = json.loads(body)
                if isinstance(said.get("model"), str):
                    said["model"] = "chat"
                assert json.loads(renamed) == said

    return one


def _events() -> Callable[[bytes], None]:
    from shipworthy.protocols import events, openai

    def one(data: bytes) -> None:
        step, stream = (data[0] % 16 + 1, data[1:]) if data else (1, b"")
        whole, pieces = events.EventSplitter(1 << 20), events.EventSplitter(1 << 20)
        found = whole.feed(stream)
        cut = [
            event
            for start in range(0, len(stream), step)
            for event in pieces.feed(stream[start : start + step])
        ]
        assert found == cut
        assert whole.rest == pieces.rest
        assert b"".join(found) + whole.rest == stream
        for operation in ("chat", "completions"):
            reader = openai.StreamReader(operation)
            for event in [*found, whole.rest]:
                kind = reader.see(event)
                renamed = reader.renamed(event, "org/m", "chat")
                if kind not in (openai.Seen.GARBAGE, openai.Seen.ERROR):
                    assert renamed == openai.rename_event(event, "org/m", "chat")
                    assert openai.StreamReader(operation).see(renamed) is kind
            assert reader.finish is not None
        with contextlib.suppress(events.EventTooLarge):
            events.EventSplitter(step).feed(stream)

    return one


def _contract() -> Any:
    from shipworthy.domain.contract import Contract, Tensor

    tensors = (Tensor("x", "FP32", (-1,)), Tensor("y", "BYTES", (-1, 2), optional=True))
    return Contract(inputs=tensors, outputs=tensors)


def _oip() -> Callable[[bytes], None]:
    from shipworthy.protocols import oip
    from shipworthy.protocols.messages import InvalidMessage

    checker = oip.ContractChecker(_contract())
    asked = oip.decode_request(_seed({"inputs": [_TENSOR]}, b""))

    def one(data: bytes) -> None:
        body = data[1:]
        with contextlib.suppress(InvalidMessage):
            if data[:1] < b"\1":
                checker.check_request(oip.decode_request(body))
            else:
                checker.check_response(oip.decode_response(body), asked)
                renamed = oip.rename_response(body, model_name="m", model_version="2")
                assert oip.decode_response(renamed).model_name == "m"

    return one


def _oip_binary() -> Callable[[bytes], None]:
    from shipworthy.protocols import oip, oip_binary
    from shipworthy.protocols.messages import InvalidMessage

    checker = oip.ContractChecker(_contract())
    asked = oip.decode_request(_seed({"inputs": [_TENSOR]}, b""))

    def one(data: bytes) -> None:
        length, body = int.from_bytes(data[1:3], "big"), data[3:]
        with contextlib.suppress(InvalidMessage):
            oip_binary.header_length(data)
        with contextlib.suppress(InvalidMessage):
            if data[:1] < b"\1":
                request = oip_binary.decode_request(body, length)
                values = checker.check_request(request)
                oip_binary.wants_binary(request, ["x", "y"])
                plain = oip_binary.request_as_json(body, length, values)
                checker.check_request(oip.decode_request(plain))
            else:
                response = oip_binary.decode_response(body, length)
                values = checker.check_response(response, asked)
                plain = oip_binary.response_as_json(body, length, values)
                checker.check_response(oip.decode_response(plain), asked)
                packed, size = oip_binary.response_as_binary(plain, values, frozenset({"x"}))
                checker.check_response(oip_binary.decode_response(packed, size), asked)

    return one


def _mlflow() -> Callable[[bytes], None]:
    from shipworthy.protocols import mlflow, oip
    from shipworthy.protocols.messages import InvalidMessage

    scoring = mlflow.Scoring(_contract())
    asked = oip.decode_request(_seed({"inputs": [_TENSOR]}, b""))

    def one(data: bytes) -> None:
        body, kind = data[1:], data[:1]
        with contextlib.suppress(InvalidMessage):
            if kind < b"\2":
                content = "text/csv" if kind == b"\1" else "application/json"
                values = scoring.read_request(body, content)
                oip.encode_request(values)
                scoring.write_request(values)
            else:
                scoring.write_response(scoring.read_response(body, asked))
        mlflow.error_text(body)

    return one


TARGETS: dict[str, Callable[[], Callable[[bytes], None]]] = {
    "openai_request": _openai_request,
    "openai_answer": _openai_answer,
    "events": _events,
    "oip": _oip,
    "oip_binary": _oip_binary,
    "mlflow": _mlflow,
}


# --- running ----------------------------------------------------------------------------------


def fuzz(target: str, options: list[str]) -> None:
    """Fuzz in this process, which libFuzzer ends."""
    atheris: Any = importlib.import_module("atheris")
    with atheris.instrument_imports(include=["shipworthy"]):
        one = TARGETS[target]()
    atheris.Setup([sys.argv[0], *options], one)
    atheris.Fuzz()


def run(target: str, seconds: int, seed: int, kept: Path) -> tuple[int, int, str]:
    """Executions and branches covered of a target fuzzed in a process of its own; what it found."""
    with tempfile.TemporaryDirectory() as folder:
        corpus = Path(folder, "corpus")
        corpus.mkdir()
        for number, content in enumerate(SEEDS[target]):
            Path(corpus, str(number)).write_bytes(content)
        words = Path(folder, "words")
        words.write_text("".join(f"{_quoted(word)}\n" for word in _WORDS), encoding="ascii")
        ended = subprocess.run(
            [
                sys.executable, __file__, "--target", target, "--",
                f"-max_total_time={seconds}", f"-seed={seed}", f"-dict={words}", "-max_len=4096",
                "-timeout=10", "-rss_limit_mb=2048", "-print_final_stats=1",
                f"-artifact_prefix={kept}/{target}-", str(corpus),
            ],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False,
        )  # fmt: skip
    output = ended.stdout.decode(errors="replace")
    executed = [int(number) for number in _STATISTIC.findall(output)]
    covered = [int(number) for number in _COVERED.findall(output)]
    found = "" if ended.returncode == 0 and executed else output[-4_000:]
    return sum(executed), max(covered, default=0), found


def _quoted(word: str) -> str:
    """As libFuzzer's dictionaries want it."""
    return '"' + "".join(f"\\x{byte:02x}" for byte in word.encode()) + '"'


def main() -> int:
    parser = argument_parser(__doc__)
    parser.add_argument("--seconds", type=int, default=20, help="for each target")
    parser.add_argument("--target", choices=TARGETS, help="this one alone, in this process")
    parser.add_argument("--input", type=Path, help="run --target once on this file")
    parser.add_argument("--kept", type=Path, help="folder for findings (default: a new one)")
    parser.add_argument("options", nargs="*", help="of libFuzzer, for --target, behind --")
    arguments = parser.parse_args()
    if arguments.input:
        TARGETS[arguments.target]()(arguments.input.read_bytes())
        return 0
    if arguments.target:
        fuzz(arguments.target, arguments.options)
        return 0
    report = Report(
        f"Parsers fuzzed for {arguments.seconds} s each",
        ("parser", "executions", "per second", "branches", "findings"),
        "atheris", "msgspec",
    )  # fmt: skip
    there = importlib.util.find_spec("atheris") is not None
    report.figure("fuzzed", there)
    failed = False
    if there:
        kept = arguments.kept or Path(tempfile.mkdtemp(prefix="findings-"))
        kept.mkdir(parents=True, exist_ok=True)
        for target in TARGETS:
            executed, covered, found = run(target, arguments.seconds, arguments.seed, kept)
            rate = executed // max(1, arguments.seconds)
            word = f"yes, in {kept}" if found else "none"
            report.row(target, f"{executed:,}", f"{rate:,}", str(covered), word)
            report.figure(f"executions.{target}", executed)
            report.figure(f"found.{target}", bool(found))
            failed = failed or bool(found)
            if found:
                print(found)
    else:
        report.note("Not run: atheris is missing. `.venv/bin/python -m pip install atheris`")
    report.finish(arguments.json)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
