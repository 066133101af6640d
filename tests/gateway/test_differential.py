"""Generated conversations, past the gateway and through it: only the model's name may differ.

Bodies are written as text, not from objects, so that spaces, escapes and the spelling of numbers
are as odd as JSON allows.
"""

import asyncio
import json
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from shipworthy.domain.contract import Contract, Tensor
from shipworthy.domain.plan import Deadlines
from shipworthy.protocols import oip_binary
from shipworthy.protocols.oip import TensorValues

LANGUAGE = Contract(protocol="openai", side_effects="none")
TENSORS = Contract(
    inputs=(Tensor("x", "FP64", (-1,)), Tensor("words", "BYTES", (-1,), optional=True)),
    outputs=(Tensor("y", "FP32", (-1,)), Tensor("said", "BYTES", (-1,), optional=True)),
    side_effects="none",
)
PATIENT = Deadlines(connect=10.0, attempt=30.0, total=60.0)
ROWS = 3
NUMBERS = [
    "0", "-0", "-0.0", "1.50", "1e5", "1E+05", "-2.5e-07", "0.1000000000000000055511151231257827",
    "123456789012345678901234567890", "1e308", "9007199254740993", "18446744073709551616",
]  # fmt: skip
WORDS = ["model", '"model":"served"', "", "ü", "👋", "\u2028", "\x7f", "\\", "/", "\t\r\n", "a b"]
FIELDS = [
    "temperature",
    "x",
    "model ",
    "Model",
    "metadata",
    "extra.body",
    "n_probs",
    "ünï",
    "messages2",
]

spaces = st.sampled_from(["", "", "", " ", "\n  ", "\t", "\r\n"])
texts = st.one_of(st.sampled_from(WORDS), st.text(st.characters(codec="utf-8"), max_size=8))


@st.composite
def strings(draw: Any, of: Any = texts) -> str:
    """A string as JSON may write it."""
    written = json.dumps(draw(of), ensure_ascii=draw(st.booleans()))
    if draw(st.booleans()):
        written = written.replace("/", "\\/").replace("m", "\\u006d")
    return written


@st.composite
def members(draw: Any, pairs: list[tuple[str, str]]) -> str:
    """An object of these keys and values, as they are written."""
    said = [f"{draw(spaces)}{k}{draw(spaces)}:{draw(spaces)}{v}{draw(spaces)}" for k, v in pairs]
    return "{" + ",".join(said) + (draw(spaces) if not said else "") + "}"


scalars = st.one_of(st.sampled_from([*NUMBERS, "true", "false", "null"]), strings())


@st.composite
def containers(draw: Any, inside: Any) -> str:
    if draw(st.booleans()):
        listed = draw(st.lists(inside, max_size=3))
        return "[" + ",".join(f"{draw(spaces)}{one}{draw(spaces)}" for one in listed) + "]"
    keys = draw(st.lists(st.one_of(st.just("model"), texts), max_size=3, unique=True))
    return draw(members([(json.dumps(key), draw(inside)) for key in keys]))


values = st.recursive(scalars, containers, max_leaves=6)


@st.composite
def bodies(draw: Any, needed: dict[str, Any], name: str = "model") -> Callable[[str], bytes]:
    """A body with what is needed and more, in any order, for any value of the field `name`."""
    keys = draw(st.lists(st.sampled_from(FIELDS), max_size=4, unique=True))
    pairs = [(json.dumps(key), draw(values)) for key in keys if key not in needed]
    pairs += [(json.dumps(key), draw(value)) for key, value in needed.items()]
    pairs.append((json.dumps(name), "\0"))
    body = draw(spaces) + draw(members(draw(st.permutations(pairs)))) + draw(spaces)
    return lambda value: body.replace("\0", value).encode()


messages = st.lists(
    st.tuples(st.sampled_from(["user", "assistant", "system"]), values).map(
        lambda said: f'{{"role":"{said[0]}","content":{said[1]},"model":"nested"}}'
    ),
    min_size=1,
    max_size=3,
).map(lambda listed: f"[{','.join(listed)}]")
prompts = strings(st.text(st.characters(codec="utf-8"), min_size=1, max_size=9))
CHOICE = '[{"index":0,"message":{"role":"assistant","content":%s},"finish_reason":"stop"}]'
asked = {
    "chat/completions": bodies({"messages": messages}),
    "completions": bodies({"prompt": prompts}),
    "embeddings": bodies({"input": prompts}),
}
answers = {
    "chat/completions": bodies({"choices": strings().map(lambda text: CHOICE % text)}),
    "completions": bodies(
        {"choices": strings().map(lambda text: f'[{{"index":0,"text":{text}}}]')}
    ),
    "embeddings": bodies({"data": st.just('[{"index":0,"embedding":[1e-7,-0.0,2.50]}]')}),
}


def spelled(body: bytes) -> Any:
    """What it says: the order of its keys and the spelling of its numbers included."""
    return json.loads(body, object_pairs_hook=list, parse_float=str, parse_int=str)


def beside() -> Callable[[Any], Any]:
    """Runs coroutines on this loop for Hypothesis, whose examples run in a thread of their own."""
    loop = asyncio.get_running_loop()
    return lambda coroutine: asyncio.run_coroutine_threadsafe(coroutine, loop).result(60)


many = settings(suppress_health_check=[HealthCheck.too_slow])


@pytest.mark.parametrize("path", list(asked))
async def test_bodies_differ_by_the_models_name_alone(worker, model, path):
    await worker.start(worker.plan(contract=LANGUAGE, deadlines=PATIENT))
    run = beside()

    @many
    @given(asked[path], answers[path], strings())
    def differ(ask, answer, named) -> None:
        worker.model.received.clear()
        worker.model.behave = model.responding(answer(named))
        got = run(worker.ask("POST", f"/v1/{path}", body=ask('"digits"')))
        assert got.status == 200, got.body
        assert got.body == answer('"digits"')
        (seen,) = worker.model.received
        assert spelled(seen.body) == spelled(ask('"served"'))
        assert seen.body == ask('"served"')

    await asyncio.to_thread(differ)


deltas = st.one_of(strings(), st.just("null")).map(
    lambda text: f'[{{"index":0,"delta":{{"content":{text}}},"finish_reason":null}}]'
)
chunks = bodies({"choices": deltas}).filter(lambda chunk: not set(b"\r\n") & set(chunk("")))
ENDS = ["\n\n", "\r\n\r\n", "\r\r", "\n\r\n"]
FIRST = '{"model":\0,"choices":[{"index":0,"delta":{"content":"a"},"finish_reason":"stop"}]}'


@st.composite
def streams(draw: Any) -> Callable[[str], bytes]:
    """A stream of events, as a server may write them, for any name of its model."""
    parts: list[str] = [f"data: {FIRST}\n\n"]
    for chunk in draw(st.lists(chunks, max_size=4)):
        before = draw(st.sampled_from(["", ": ping\n", "event: message\n", "id: 7\nretry: 1\n"]))
        data = chunk("\0").decode()
        parts.append(f"{before}data:{draw(st.sampled_from(['', ' ']))}{data}{draw(ends)}")
    usage = '{"model":\0,"choices":[],"usage":{"prompt_tokens":1,"completion_tokens":2}}'
    parts += draw(st.sampled_from([[], [f"data: {usage}\n\n"], [": still there\n\n"]]))
    parts.append(
        draw(st.sampled_from(["data: [DONE]\n\n", "data: [DONE]\r\n\r\n", "data: [DONE]"]))
    )
    stream = "".join(parts)
    return lambda value: stream.replace("\0", value).encode()


ends = st.sampled_from(ENDS)


async def test_streams_differ_by_the_models_name_alone(worker, model):
    await worker.start(worker.plan(contract=LANGUAGE, deadlines=PATIENT))
    run = beside()
    ask = b'{"model":"digits","stream":true,"messages":[{"role":"user","content":"hi"}]}'

    @many
    @given(streams(), st.lists(st.integers(1, 60), max_size=20))
    def differ(stream, sizes) -> None:
        data, pieces = stream('"served"'), list[bytes]()
        for size in sizes:
            pieces.append(data[:size])
            data = data[size:]
        worker.model.behave = model.streaming(*filter(None, [*pieces, data]))
        got = run(worker.ask("POST", "/v1/chat/completions", body=ask))
        assert got.status == 200, got.body
        assert got.body == stream('"digits"')

    await asyncio.to_thread(differ)


doubles = st.floats(allow_nan=False, allow_infinity=False)
halves = st.floats(width=32, allow_nan=False, allow_infinity=False)


def tensor(name: str, datatype: str, data: str) -> str:
    head = f'"name":"{name}","shape":[{ROWS}],"datatype":"{datatype}"'
    return f'{{{head},"data":{data},"parameters":{{}}}}'


@st.composite
def tensor_bodies(draw: Any, kind: str) -> Callable[[str], bytes]:
    """A request's or an answer's JSON with what else there may be."""
    name, datatype, numbers = ("x", "FP64", doubles) if kind == "inputs" else ("y", "FP32", halves)
    data = draw(st.lists(numbers, min_size=ROWS, max_size=ROWS))
    numbers_said = tensor(name, datatype, json.dumps(data))
    words = draw(st.lists(strings(), min_size=ROWS, max_size=ROWS))
    words_said = tensor("words" if kind == "inputs" else "said", "BYTES", f"[{','.join(words)}]")
    needed = {kind: st.just(f"[{numbers_said}, {words_said}]"), "id": strings()}
    if kind == "outputs":
        needed["model_version"] = st.just("\1")
    return draw(bodies(needed, "model_name" if kind == "outputs" else "not_a_field"))


def answered_as(body: Callable[[str], bytes], name: str, version: str) -> bytes:
    return body(f'"{name}"').replace(b"\1", f'"{version}"'.encode())


async def test_tensors_in_json_differ_by_the_models_name_alone(worker, model):
    await worker.start(worker.plan(contract=TENSORS, deadlines=PATIENT))
    run = beside()

    @many
    @given(tensor_bodies("inputs"), tensor_bodies("outputs"))
    def differ(ask, answer) -> None:
        worker.model.received.clear()
        worker.model.behave = model.responding(answered_as(answer, "served", "9"))
        got = run(worker.infer(body=ask("1")))
        assert got.status == 200, got.body
        assert got.body == answered_as(answer, "digits", "1")
        assert [seen.body for seen in worker.model.received] == [ask("1")]

    await asyncio.to_thread(differ)


async def test_tensors_in_binary_differ_by_the_models_name_alone(worker, model):
    worker.model.documents["/v2"] = b'{"extensions":["binary_tensor_data"]}'
    await worker.start(worker.plan(contract=TENSORS, deadlines=PATIENT))
    run = beside()
    asked, length = oip_binary.encode_request([TensorValues("x", "FP64", (1,), [0.5])])
    await worker.infer(body=asked, headers={oip_binary.HEADER: str(length)})
    await worker.until(lambda: worker.model.health > 0)  # what the server speaks is asked for once
    raw = st.lists(texts, min_size=ROWS, max_size=ROWS)

    @many
    @given(
        st.lists(st.floats(), min_size=ROWS, max_size=ROWS), raw,
        st.lists(st.floats(width=32), min_size=ROWS, max_size=ROWS), raw, st.booleans(),
    )  # fmt: skip
    def differ(numbers, words, given_numbers, given_words, wants) -> None:
        body, length = oip_binary.encode_request(
            [
                TensorValues("x", "FP64", (len(numbers),), numbers),
                TensorValues("words", "BYTES", (len(words),), words),
            ],
            id="mine",
            binary_output=wants,
        )
        outputs = [
            TensorValues("y", "FP32", (len(given_numbers),), given_numbers),
            TensorValues("said", "BYTES", (len(given_words),), given_words),
        ]
        if not wants:  # nor could JSON carry it
            outputs = [TensorValues("y", "FP32", (ROWS,), [0.5] * ROWS)]
        binary = frozenset(["y", "said"] if wants else [])

        def answer(name: str, version: str) -> tuple[bytes, int]:
            return oip_binary.encode_response(
                outputs, model_name=name, model_version=version, id="mine", binary=binary
            )

        said, size = answer("served", "9")
        worker.model.received.clear()
        worker.model.behave = model.responding(
            said, headers=f"{oip_binary.HEADER}: {size}\r\n" if wants else ""
        )
        got = run(worker.infer(body=body, headers={oip_binary.HEADER: str(length)}))
        assert got.status == 200, got.body
        wanted, size = answer("digits", "1")
        assert got.body == wanted
        assert got.headers.get(oip_binary.HEADER.lower()) == (str(size) if wants else None)
        (seen,) = worker.model.received
        assert seen.body == body
        assert seen.headers[oip_binary.HEADER.lower()] == str(length)

    await asyncio.to_thread(differ)
