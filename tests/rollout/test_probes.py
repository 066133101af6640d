"""The checks on the move: what is served where, whose the traffic is, and the way back."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer
from tests.rollout.conftest import MODEL, manifest

from shipworthy.app.http import AiohttpClient
from shipworthy.domain.findings import Verdict
from shipworthy.domain.lifecycle import Release, TrafficCount
from shipworthy.domain.manifest import Manifest
from shipworthy.errors import Unavailable
from shipworthy.rollout import probes
from shipworthy.stores.blobs import LocalBlobs

NOW = 1_000.0


def release(**changes: Any) -> Release:
    content = manifest(**changes)
    return Release(
        model=MODEL,
        version=2,
        digest=Manifest.model_validate(content).digest(),
        manifest=content,
        created_at=NOW,
        created_by="p1",
    )


Serve = Callable[[dict[str, Any] | int], Any]


@pytest.fixture
async def serve() -> AsyncIterator[Serve]:
    """Starts a server whose model metadata is the given document, or that answers a status."""
    servers: list[TestServer] = []

    async def start(says: dict[str, Any] | int) -> str:
        async def metadata(_: web.Request) -> web.Response:
            if isinstance(says, int):
                return web.Response(status=says, text="not JSON")
            return web.json_response(says)

        application = web.Application()
        application.router.add_get("/v2/models/{model}", metadata)
        server = TestServer(application)
        await server.start_server()
        servers.append(server)
        return str(server.make_url("")).rstrip("/")

    yield start
    for server in servers:
        await server.close()


async def test_parity_is_what_every_endpoint_reports(serve: Serve) -> None:
    ours = release()
    good = await serve({"parameters": {"digest": ours.digest}})
    other = await serve({"parameters": {"digest": "sha256:" + "0" * 64}})
    mute = await serve({"name": MODEL})
    broken = await serve(500)
    async with AiohttpClient() as http:

        async def verdict(*endpoints: str) -> Verdict:
            return (await probes.probe_parity(ours, endpoints, http, now=NOW)).verdict

        assert await verdict(good) is Verdict.PASS
        assert await verdict(good, other) is Verdict.FAIL
        assert await verdict(good, mute) is Verdict.INCONCLUSIVE
        assert await verdict(good, broken) is Verdict.INCONCLUSIVE
        assert await verdict("http://127.0.0.1:1") is Verdict.INCONCLUSIVE
        assert await verdict() is Verdict.ERROR


async def test_a_server_elsewhere_attests_what_it_serves() -> None:
    told: dict[str, str | None] = {"here": "org/model", "other": "org/other", "mute": None}

    async def asked(url: str) -> str | None:
        if url not in told:
            message = f"{url} does not answer"
            raise Unavailable(message)
        return told[url]

    async def finding(*urls: str) -> Any:
        return await probes.probe_endpoint_parity(release(), "org/model", urls, asked, now=NOW)

    found = await finding("here")
    assert found.verdict is Verdict.PASS
    assert found.evidence["attested_by"] == "here"
    assert (await finding()).verdict is Verdict.ERROR
    for url, said in (("other", "org/other"), ("mute", "does not say"), ("away", "not answer")):
        found = await finding("here", url)
        assert found.verdict is Verdict.INCONCLUSIVE
        assert said in found.observed
        assert "attested_by" not in found.evidence


@pytest.mark.parametrize(
    ("served", "verdict"),
    [
        ({"digits@2": 20}, Verdict.PASS),
        ({"digits@2": 500, "digits@1": 1}, Verdict.FAIL),
        ({"digits@2": 19}, Verdict.INCONCLUSIVE),
        ({}, Verdict.INCONCLUSIVE),
    ],
)
def test_traffic_has_moved_when_all_answers_are_ours(
    served: dict[str, int], verdict: Verdict
) -> None:
    counts = [
        TrafficCount(plan=MODEL, release=name, minute=17, served=count)
        for name, count in served.items()
    ]
    assert probes.probe_traffic(release(), MODEL, counts, now=NOW).verdict is verdict


def test_the_way_back_needs_every_part_unaltered(tmp_path: Path) -> None:
    blobs = LocalBlobs(tmp_path)
    stored = blobs.put_bytes(b"a model", ".").model_dump()
    artifact = {"path": "model.skops", "format": "skops", "files": [stored]}
    whole = release(artifacts=[artifact])
    found = probes.probe_restorable(whole, blobs, warm=True, now=NOW)
    assert found.verdict is Verdict.PASS
    assert "still warm" in found.observed
    lost = probes.probe_restorable(release(), blobs, warm=False, now=NOW)
    assert lost.verdict is Verdict.FAIL
