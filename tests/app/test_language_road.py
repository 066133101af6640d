"""The whole road of a language model and of an MLflow server, as real processes.

The servers elsewhere are mocks of our own (`tests/app/language.py`), on real HTTP.
"""

from __future__ import annotations

import json
import re
import shlex
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.app.conftest import Answer, Town, wait_for
from tests.app.language import BAD_PROMPT, USAGE, Mock, mlflow_server, openai_server

from shipworthy.app.access import create_key
from shipworthy.app.founding import make_project

pytestmark = [pytest.mark.timeout(300)]

POLICY: dict[str, Any] = {
    "model": "assistant",
    "preset": "standard",
    "promotion": {
        "staging": {"checks": ["assets.stored", "contract.declared", "assets.final-format"]},
        "production": {"approvals": 0},
    },
    "rollout": {
        "steps": [{"weight": 0.5, "requests": 20}],
        "margin": "20%",
        "lease": "3s",
    },
    "capture": {"payloads": "full"},
}
QUESTION = {"messages": [{"role": "user", "content": "What is 2 + 2?"}]}


@pytest.fixture
def server() -> Iterator[Mock]:
    with openai_server("s3cret") as mock:
        yield mock


@pytest.fixture
def town(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Town]:
    """A founded project for language models, not yet running."""
    monkeypatch.setenv("UPSTREAM_KEY", "s3cret")
    made = Town(tmp_path / "project")
    session = make_project(made.root, preset="prototype", solo=False)
    settings = made.root / "shipworthy.yaml"
    settings.write_text(settings.read_text() + "gateway: {port: 0}\n")
    made.keys["shop"] = create_key(session, "shop", models=("assistant",), kind="service")
    made.keys["boss"] = create_key(session, "boss", kind="person", role="admin")
    yield made
    made.end()


def write_policy(town: Town, **changes: Any) -> str:
    (town.root / "policy.yaml").write_text(json.dumps({**POLICY, **changes}))
    return town.sw("apply", "-f", str(town.root / "policy.yaml"))


def write(town: Town, server: Mock, name: str, **changes: Any) -> Path:
    folder = town.root / name
    folder.mkdir(exist_ok=True)
    (folder / "sample.jsonl").write_text(json.dumps(QUESTION) + "\n")
    release = {
        "model": "assistant",
        "description": name,
        "serving": {
            "runtime": "endpoint",
            "urls": [f"{server.url}/v1"],
            "served_model": "org/chat-7b",
            "credential": "env:UPSTREAM_KEY",
        },
        "contract": {"protocol": "openai", "operations": ["chat"], "side_effects": "none"},
        "data": [{"name": "sample", "path": "sample.jsonl", "role": "sample"}],
        "cost": {"per_1k_input_tokens": 1.0, "per_1k_output_tokens": 2.0},
        **changes,
    }
    file = folder / "release.yaml"
    file.write_text(json.dumps(release))
    return file


def create(town: Town, server: Mock, name: str, **changes: Any) -> None:
    town.sw("release", "create", "-f", str(write(town, server, name, **changes)))


def chat(town: Town, *, key: str = "shop", model: str = "assistant", **fields: Any) -> Answer:
    body = json.dumps({"model": model, **QUESTION, **fields}).encode()
    return town.call("/v1/chat/completions", body, key=key)


def events(answer: Answer) -> list[Any]:
    """The data of each event but the last, which says that it is over."""
    *said, last = [part.removeprefix(b"data: ") for part in answer.body.split(b"\n\n") if part]
    assert last == b"[DONE]"
    return [json.loads(data) for data in said]


def until(town: Town, ended: str, ask: Callable[[], None]) -> str:
    """Send traffic until the rollout has ended so; what is said of it."""

    def done() -> str:
        for _ in range(20):
            ask()
        told = town.sw("rollout", "status", "assistant")
        return told if ended in told else ""

    return wait_for(done, 120)


class Users:
    """Clients who ask once each, every second one for a stream."""

    def __init__(self, town: Town) -> None:
        self.town = town
        self.count = 0
        self.answered_by: set[str] = set()

    def ask(self) -> None:
        self.count += 1
        user, stream = f"user-{self.count}", self.count % 2 == 0
        answer = chat(self.town, user=user, stream=stream)
        assert answer.status == 200, answer
        self.answered_by.add(answer.headers["x-shipworthy-release"])


def test_a_prompt_goes_the_whole_road_and_a_bad_one_comes_back(town: Town, server: Mock) -> None:
    town.start()
    write_policy(town)
    users = Users(town)
    first_in_production(town, server)
    another_prompt_by_canary(town, server, users)
    a_bad_prompt_comes_back(town, server, users)
    told_of_costs(town)


def first_in_production(town: Town, server: Mock) -> None:
    create(town, server, "first")
    passed = town.sw("promote", "assistant@1", "--to", "staging")
    checked = town.run("check", "assistant@1", "--format", "json").stdout
    assert "attested" in checked
    assert "answers in staging" in passed
    moved = town.run("promote", "assistant@1", "--to", "production")
    assert "contract.enforced: all" in moved.stdout, moved.output
    assert "parity.version" in moved.stdout
    answer = wait_for(lambda: (a := chat(town)).status == 200 and a)
    said = json.loads(answer.body)
    assert said["choices"][0]["message"]["content"] == "org/chat-7b heard: What is 2 + 2?"
    assert (said["model"], said["usage"]) == ("assistant", USAGE)
    assert answer.headers["x-shipworthy-release"] == "assistant@1"
    assert server.headers[-1]["authorization"] == "Bearer s3cret"

    streamed = chat(town, stream=True)
    pieces = [event["choices"][0]["delta"].get("content", "") for event in events(streamed)]
    assert "".join(pieces) == "org/chat-7b heard: What is 2 + 2?"
    assert {event["model"] for event in events(streamed)} == {"assistant"}


def another_prompt_by_canary(town: Town, server: Mock, users: Users) -> None:
    """The same endpoint with another prompt and sampling is a release of its own."""
    spec = {"behaviour": {"system": "Be brief."}, "inference": {"sampling": {"temperature": 0.2}}}
    create(town, server, "brief", **spec)
    town.sw("promote", "assistant@2", "--to", "staging")
    town.sw("promote", "assistant@2", "--to", "production")
    until(town, "completed", users.ask)
    assert users.answered_by == {"assistant@1", "assistant@2"}
    wait_for(lambda: chat(town).headers["x-shipworthy-release"] == "assistant@2")
    sent = server.received[-1]
    assert sent["messages"][0] == {"role": "system", "content": "Be brief."}
    assert sent["temperature"] == 0.2
    chat(town, temperature=0.9)
    assert server.received[-1]["temperature"] == 0.9, "what is not pinned is the client's to say"


def a_bad_prompt_comes_back(town: Town, server: Mock, users: Users) -> None:
    """One that the server can't work with passes no gate; where nobody looks it is thrown out."""
    create(town, server, "bad", behaviour={"system": BAD_PROMPT})
    refused = town.run("promote", "assistant@3", "--to", "staging")
    assert refused.code == 1
    assert "assets.final-format" in refused.output
    assert "HTTP 500" in refused.output
    write_policy(
        town,
        promotion={
            "staging": {"checks": ["assets.stored"]},
            "production": {"checks": ["assets.stored"], "approvals": 0},
        },
    )
    town.sw("promote", "assistant@3", "--to", "staging")
    town.sw("promote", "assistant@3", "--to", "production")
    told = until(town, "rolled back", users.ask)
    assert "assistant@3 is rolled back" in told
    assert "assistant@3" not in users.answered_by, "stable answered in its place"


def told_of_costs(town: Town) -> None:
    columns = "release, sum(cost) AS cost, count(*) AS n, sum(input_tokens) AS read"
    told_by = f"SELECT {columns} FROM inferences GROUP BY release ORDER BY release"

    def counted() -> list[dict[str, Any]]:
        rows = json.loads(town.sw("query", told_by, "--format", "json"))
        return rows if len(rows) == 3 else []

    rows = {row["release"]: row for row in wait_for(counted)}
    each = (USAGE["prompt_tokens"] * 1.0 + USAGE["completion_tokens"] * 2.0) / 1000
    first = rows["assistant@1"]
    assert first["cost"] == pytest.approx(each * first["read"] / USAGE["prompt_tokens"])


def test_copies_limits_and_adapters(town: Town, server: Mock) -> None:
    town.start()
    (town.root / "policy.yaml").write_text(json.dumps({**POLICY, "mirror": {"to": "other@1"}}))
    refused = town.run("apply", "-f", str(town.root / "policy.yaml"))
    assert (refused.code, "mirror.to must be staging" in refused.stderr) == (2, True)
    told = write_policy(
        town, mirror={"to": "staging", "share": 1.0}, limits={"requests_per_minute": 5_000}
    )
    assert "nothing of assistant is copied to staging: production holds no release" in told
    create(town, server, "first")
    town.sw("promote", "assistant@1", "--to", "staging")
    town.run("promote", "assistant@1", "--to", "production")
    wait_for(lambda: chat(town).status == 200)
    # An adapter is another name at the same address.
    adapter = {
        "runtime": "endpoint",
        "urls": [f"{server.url}/v1"],
        "served_model": "sql-lora",
        "credential": "env:UPSTREAM_KEY",
    }
    effects = {"protocol": "openai", "operations": ["chat"]}
    create(town, server, "unsure", serving=adapter, contract=effects)
    town.sw("promote", "assistant@2", "--to", "staging")
    why = "assistant@2 does not say that it has no side effects"
    wait_for(lambda: why in town.sw("status", "assistant"))
    decided = lambda: town.sw("rollout", "status", "assistant", "--json")
    wait_for(lambda: why in decided())
    create(town, server, "adapter", serving=adapter)
    town.sw("promote", "assistant@3", "--to", "staging")
    wait_for(lambda: "requests are copied to assistant@3" in decided())
    shown = town.sw("status", "assistant")
    assert "assistant: 1 of the requests are copied to assistant@3" in shown
    assert "at most 5,000 requests a minute" in shown
    before = len(server.asked(model="sql-lora"))
    assert chat(town).status == 200
    wait_for(lambda: len(server.asked(model="sql-lora")) > before)
    assert any("x-shipworthy-mirror" in headers for headers in server.headers)
    copies = "SELECT release, agrees FROM mirrors LIMIT 1"
    rows = lambda: json.loads(town.sw("query", copies, "--format", "json"))
    assert wait_for(rows)[0] == {"release": "assistant@3", "agrees": False}
    staged = chat(town, key="boss", model="assistant@staging")
    assert b"sql-lora heard" in staged.body

    town.key("poor", "--model", "assistant", "--requests-per-minute", "2", "--service")
    wait_for(lambda: chat(town, key="poor").status == 200)
    limited = wait_for(lambda: (a := chat(town, key="poor")).status == 429 and a)
    error = json.loads(limited.body)["error"]
    assert error["type"] == "rate_limit_error" or error["code"], error
    assert int(limited.headers["retry-after"]) > 0


def test_trying_an_address_ends_with_a_line_that_works(town: Town, server: Mock) -> None:
    town.start()
    said = town.sw(
        "try", server.url, "--name", "assistant", "--served-model", "sql-lora",
        "--credential", "env:UPSTREAM_KEY",
    )  # fmt: skip
    assert "serves sql-lora, and answered chat" in said
    written = (town.root / "assistant" / "release.yaml").read_text()
    assert "operations: [chat]" in re.sub(r"operations:\s*- chat", "operations: [chat]", written)
    assert b'"choices"' in run_curl(said)
    rows = town.root / "rows.csv"
    rows.write_text("a,b\n1,2\n0.5,0.25\n")
    with mlflow_server() as mlflow:
        said = town.sw("try", mlflow.url, "--name", "adder", "--sample", str(rows))
        assert "does not tell which model it serves" in said
        assert "can't be attested" in said, "a check that can't judge it says so"
        answer = json.loads(run_curl(said))
        assert answer["predictions"] == [{"sum": 3.0, "big": "yes"}, {"sum": 0.75, "big": "no"}]
        write_adder_policy(town)
        town.sw("promote", "adder@1", "--to", "staging")
        town.sw("promote", "adder@1", "--to", "production")
        body = b'{"dataframe_records": [{"a": 1, "b": 1}]}'
        door, kind = "/models/adder/invocations", "application/json"
        scored = town.call(door, body, "boss", Content_Type=kind)
        assert scored.status == 200, scored
        assert json.loads(scored.body)["predictions"] == [{"sum": 2.0, "big": "yes"}]


def write_adder_policy(town: Town) -> None:
    gates = {
        "staging": {"checks": ["contract.declared", "assets.final-format"]},
        "production": {"checks": ["contract.enforced", "auth.required"], "approvals": 0},
        "confirm": {"checks": ["answers.returned"]},
    }
    file = town.root / "adder" / "policy.yaml"
    file.write_text(json.dumps({"model": "adder", "preset": "prototype", "promotion": gates}))
    town.sw("apply", "-f", str(file))


def run_curl(said: str) -> bytes:
    (line,) = [line for line in said.splitlines() if line.strip().startswith("curl")]
    done = subprocess.run(
        ["bash", "-c", line.replace("curl -s", "curl -sf")],
        capture_output=True, check=False, timeout=60,
    )  # fmt: skip
    assert done.returncode == 0, (shlex.split(line), done.stderr)
    return done.stdout
