"""What a server elsewhere is seen to speak, serve and answer; the servers are mocks of our own."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.app.language import mlflow_server, openai_server

from shipworthy.app.http import AiohttpClient
from shipworthy.errors import RuntimeFailed, Unavailable, UsageError
from shipworthy.protocols.questions import plain_request
from shipworthy.runtimes.servers import Asking, ServerInspection, inspect_server


async def looked_at(url: str, **asking: object) -> ServerInspection:
    async with AiohttpClient() as http:
        return await inspect_server(Asking(url=url, **asking), http)  # type: ignore[arg-type]


@pytest.mark.parametrize("path", ["", "/", "/v1", "/v1/models", "/v1/chat/completions"])
async def test_an_openai_server_is_told_by_its_list_and_asked_what_it_does(path: str) -> None:
    with openai_server() as server:
        seen = await looked_at(server.url + path, model="sql-lora")
    assert (seen.base_url, seen.model) == (f"{server.url}/v1", "sql-lora")
    assert (seen.contract.protocol, seen.contract.operations) == ("openai", ("chat",))
    assert seen.requests == (plain_request("chat"),)
    assert len(server.received) == 3, "each operation is tried"


async def test_several_models_are_named_rather_than_guessed() -> None:
    with openai_server() as server:
        with pytest.raises(UsageError, match="--served-model: org/chat-7b, sql-lora"):
            await looked_at(server.url)
        with pytest.raises(UsageError, match="does not list 'gpt'"):
            await looked_at(server.url, model="gpt")
    assert not server.received


async def test_a_server_that_wants_a_credential_says_how_to_give_one() -> None:
    with openai_server("s3cret") as server:
        with pytest.raises(RuntimeFailed, match="--credential"):
            await looked_at(server.url, model="org/chat-7b")
        seen = await looked_at(server.url, model="org/chat-7b", credential="s3cret")
    assert seen.contract.operations == ("chat",)


async def test_a_server_that_lists_and_does_not_answer_makes_no_release() -> None:
    bad = b'{"model": "m", "messages": [{"role": "user", "content": "You are broken."}]}'
    said = "HTTP 500 the template of this prompt fails"
    with openai_server() as server, pytest.raises(RuntimeFailed, match=said):
        await looked_at(server.url, model="org/chat-7b", requests=[bad])


async def test_an_mlflow_server_is_asked_with_rows(tmp_path: Path) -> None:
    rows = tmp_path / "rows.csv"
    rows.write_text("a,b\n1,2\n0.5,0.25\n")
    with mlflow_server() as server:
        with pytest.raises(UsageError, match="--sample"):
            await looked_at(server.url)
        seen = await looked_at(server.url, rows=rows, name="adder")
        assert seen == await looked_at(f"{server.url}/invocations", rows=rows, name="adder")
        rows.write_text("c\n1\n")
        with pytest.raises(RuntimeFailed, match="Failed to enforce schema"):
            await looked_at(server.url, rows=rows)
    assert "MLflow 3.1.0" in seen.seen
    assert seen.model == "adder"
    assert [(one.name, one.datatype, one.shape) for one in seen.contract.inputs] == [
        ("a", "FP64", (-1, 1)), ("b", "FP64", (-1, 1)),
    ]  # fmt: skip
    assert [(one.name, one.datatype, one.shape) for one in seen.contract.outputs] == [
        ("sum", "FP64", (-1,)), ("big", "BYTES", (-1,)),
    ]  # fmt: skip
    assert seen.requests == (
        b'{"dataframe_split":{"columns":["a","b"],"data":[[1.0,2.0],[0.5,0.25]]}}',
    )


async def test_what_is_no_model_server_is_told_as_such() -> None:
    with pytest.raises(Unavailable, match="does not answer"):
        await looked_at("http://127.0.0.1:1")


@pytest.mark.parametrize(
    "says",
    [
        "<html>", [], {}, {"predictions": None}, {"predictions": []}, {"predictions": 3},
        {"predictions": [[1], 2]}, {"predictions": [1, [2]]}, {"predictions": [[1], [2, 3]]},
        {"predictions": [{"a": 1}, {"b": 2}]}, {"predictions": [{"a": {}}, {"a": {}}]},
        {"predictions": [1]}, {"predictions": {"a": 1}}, {"predictions": [None, None]},
    ],
)  # fmt: skip
async def test_answers_that_make_no_contract_are_told_as_such(tmp_path: Path, says: object) -> None:
    rows = tmp_path / "rows.csv"
    rows.write_text("a,b\n1,2\n0.5,0.25\n")
    with mlflow_server(says) as server, pytest.raises(RuntimeFailed, match="by hand"):
        await looked_at(server.url, rows=rows, name="adder")


@pytest.mark.parametrize(
    "lists", ["<html>", [], {"data": None}, {"data": [{"name": "x"}]}, {"data": []}, {"data": [7]}]
)
async def test_lists_that_are_none_are_told_as_such(lists: object) -> None:
    with openai_server(lists=lists) as server:
        with pytest.raises(RuntimeFailed, match="speaks none of the protocols"):
            await looked_at(server.url)
        with pytest.raises(RuntimeFailed, match="lists no models"):
            await looked_at(f"{server.url}/v1")
