"""Samples as they are kept, sent on and judged."""

import json

import pytest

from shipworthy.domain.contract import Contract, Tensor
from shipworthy.domain.plan import Behaviour
from shipworthy.protocols import oip
from shipworthy.protocols.messages import InvalidMessage
from shipworthy.protocols.questions import (
    addressed,
    answer_problem,
    as_its_server_takes_it,
    base_of,
    operation_of,
    plain_request,
    plain_requests,
    read_samples,
    write_samples,
)

OPENAI = Contract(protocol="openai", operations=("chat",))
TENSORS = (Tensor("a", "FP64", (-1, 1)), Tensor("b", "FP64", (-1, 1)))
SCORING = Contract(inputs=TENSORS, outputs=(Tensor("y", "FP64", (-1,)),), protocol="mlflow")
ROW = oip.encode_request([oip.TensorValues(name, "FP64", (1, 1), [1.0]) for name in "ba"])


@pytest.mark.parametrize(
    ("url", "protocol", "base"),
    [
        ("http://there", "openai", "http://there/v1"),
        ("http://there/", "openai", "http://there/v1"),
        ("http://there/v1/", "openai", "http://there/v1"),
        ("http://there/openai/v1", "openai", "http://there/openai/v1"),
        ("http://there", "oip-v2", "http://there"),
        ("http://there/", "mlflow", "http://there"),
    ],
)
def test_where_doors_begin(url, protocol, base):
    assert base_of(url, protocol) == base


def test_a_sample_is_sent_as_the_gateway_would_send_it():
    path, body = as_its_server_takes_it(
        OPENAI, plain_request("chat"), "org/m", Behaviour(system="Be brief.")
    )
    assert path == "/chat/completions"
    said = json.loads(body)
    assert said["model"] == "org/m"
    assert [one["role"] for one in said["messages"]] == ["system", "user"]
    path, body = as_its_server_takes_it(SCORING, ROW, "any")
    assert path == "/invocations"
    assert json.loads(body) == {"dataframe_split": {"columns": ["a", "b"], "data": [[1, 1]]}}
    plain = Contract(inputs=TENSORS, outputs=SCORING.outputs)
    assert as_its_server_takes_it(plain, ROW, "a/b") == ("/v2/models/a%2Fb/infer", ROW)


@pytest.mark.parametrize(
    ("answer", "problem"),
    [(b'{"predictions": [2]}', ""), (b'{"predictions": [2, 3]}', "1 rows"), (b"2", "expected")],
)
def test_an_answer_of_scoring_is_held_against_the_contract(answer, problem):
    found = answer_problem(SCORING, ROW, answer)
    assert found == problem if not problem else problem in found


@pytest.mark.parametrize(
    "content",
    [
        b'{"messages": [{"role": "user", "content": "x"}], "stream": true}',
        b'[{"messages": [{"role": "user", "content": "x"}], "model": "gpt"}]',
        b'\n{"messages": [{"role": "user", "content": "x"}]}\n\n',
    ],
)
def test_samples_are_one_object_a_list_or_lines(content):
    (sample,) = read_samples(content)
    assert operation_of(sample) == "chat"
    assert json.loads(sample).keys() == {"messages", "model"}


def test_what_is_written_is_read_again():
    asked = plain_requests(Contract(protocol="openai"))
    assert [operation_of(one) for one in asked] == ["chat", "completions", "embeddings"]
    again = [json.loads(one) for one in read_samples(write_samples(asked))]
    assert again == [json.loads(one) for one in asked]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "no request"),
        (b"a,b", "no JSON object"),
        (b"[1]", "something else than JSON objects"),
        (b'{"messages": []}', "request 1: messages: empty"),
        (b'{"prompt": "x"}\n{"text": "x"}', "request 2: it has none of messages"),
        (b'{"prompt": "\xff"}', "no JSON object"),
    ],
)
def test_what_is_no_sample_is_told(content, said):
    with pytest.raises(InvalidMessage, match=said):
        read_samples(content)


def test_a_request_is_addressed_and_changed():
    sent = json.loads(addressed(plain_request("completions"), "assistant", stream=True))
    assert (sent["model"], sent["stream"]) == ("assistant", True)
