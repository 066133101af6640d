"""Each probe says what it saw, and never passes on what it did not see."""

import pytest

from shipworthy.domain.checklist import ATTESTED_BY
from shipworthy.domain.findings import Verdict
from shipworthy.errors import RuntimeFailed, Unavailable
from shipworthy.protocols import oip
from shipworthy.release import probes
from shipworthy.release.catalogue import built_in
from shipworthy.release.probes import Started
from shipworthy.release.show import show_release

NOW = 1_000_000.0
SAMPLE = oip.encode_request([oip.TensorValues("x", "FP64", (1, 2), [0.0, 1.0])])
ENDPOINT = {"runtime": "endpoint", "urls": ["https://llm.team.org/v1"], "served_model": "org/m"}


def checked(finding, verdict, told=""):
    assert finding.verdict is verdict, finding
    assert told in finding.observed
    assert built_in().get(finding.check)
    assert finding.at == NOW
    assert finding.expires > NOW
    return finding


async def test_stored(create, blobs, tmp_path) -> None:
    release = create().release
    found = checked(await probes.probe_stored(release, blobs, now=NOW), Verdict.PASS, "2 files")
    assert found.evidence["manifest"] == release.digest
    digest = found.evidence["files"]["model.skops"]
    (tmp_path / "blobs" / "sha256" / digest[7:9] / digest[7:]).unlink()
    checked(await probes.probe_stored(release, blobs, now=NOW), Verdict.FAIL, "model.skops")


@pytest.mark.parametrize(
    ("reported", "verdict"),
    [(None, Verdict.INCONCLUSIVE), ("org/m", Verdict.PASS), ("org/other", Verdict.FAIL)],
)
async def test_an_endpoint_is_attested_by_what_it_reports(create, blobs, reported, verdict) -> None:
    release = create(artifacts=[], data=[], serving=ENDPOINT).release
    found = checked(await probes.probe_stored(release, blobs, now=NOW, reported=reported), verdict)
    assert (ATTESTED_BY in found.evidence) == (verdict is Verdict.PASS)


async def test_described(create) -> None:
    release = create().release
    checked(await probes.probe_described(release, now=NOW), Verdict.PASS, "2 data sets")
    bare = create(data=[]).release
    checked(await probes.probe_described(bare, now=NOW), Verdict.FAIL, "no training data")


@pytest.mark.parametrize(
    ("email", "verdict", "told"),
    [
        ("vision@team.org", Verdict.PASS, "not looked up (offline)"),
        ("vision@example.org", Verdict.FAIL, "reserved for examples"),
        ("vision@mail.example.com", Verdict.FAIL, "reserved for examples"),
        ("vision@shop.test", Verdict.FAIL, "reserved for examples"),
        ("vision@examples.org", Verdict.PASS, "well-formed"),
        ("vision at team", Verdict.FAIL, "no mail address"),
        ("vision@team", Verdict.FAIL, "no mail address"),
        ("a@b.org, c@d.org", Verdict.FAIL, "no mail address"),
    ],
)
async def test_contact(create, email, verdict, told) -> None:
    release = create(owner={"name": "Vision", "email": email}).release
    found = checked(await probes.probe_contact(release, now=NOW), verdict, told)
    if verdict is Verdict.PASS:
        assert email not in str(found)  # personal, and erasable only in one place


async def test_contact_with_a_resolver(create) -> None:
    async def answers(domain):
        return {"team.org": True, "gone.org": False}[domain]

    async def offline(domain):
        raise OSError(domain)

    async def ask(email, resolver):
        release = create(owner={"name": "Vision", "email": email}).release
        return await probes.probe_contact(release, now=NOW, accepts_mail=resolver)

    checked(await ask("a@team.org", answers), Verdict.PASS, "takes mail")
    checked(await ask("a@gone.org", answers), Verdict.FAIL, "does not exist")
    checked(await ask("b@team.org", offline), Verdict.PASS, "could not be looked up")
    nobody = create(owner=None).release
    checked(await probes.probe_contact(nobody, now=NOW), Verdict.FAIL, "no owner")


async def test_contract_declared(create) -> None:
    release = create().release
    checked(await probes.probe_contract(release, [SAMPLE], now=NOW), Verdict.PASS, "1 of 1")
    checked(await probes.probe_contract(release, [], now=NOW), Verdict.INCONCLUSIVE, "no sample")
    wrong = SAMPLE.replace(b"FP64", b"INT64")
    checked(
        await probes.probe_contract(release, [SAMPLE, wrong], now=NOW), Verdict.FAIL, "sample 2"
    )
    checked(await probes.probe_contract(release, [b"{"], now=NOW), Verdict.FAIL, "sample 1")


async def test_contract_compatible(create) -> None:
    serving = create().release
    same = create(description="another").release
    checked(await probes.probe_compatible(same, None, now=NOW), Verdict.INCONCLUSIVE)
    found = checked(await probes.probe_compatible(same, serving, now=NOW), Verdict.PASS)
    assert found.evidence["serving"] == serving.digest
    narrow = {
        "inputs": [{"name": "x", "datatype": "FP32", "shape": [-1, 2]}],
        "outputs": [{"name": "y", "datatype": "INT64", "shape": [-1]}],
    }
    other = create(contract=narrow).release
    checked(await probes.probe_compatible(other, serving, now=NOW), Verdict.FAIL, "FP64 to FP32")


def answering(outputs):
    async def start(release, request):
        body = oip.encode_response(outputs, model_name="digits", model_version="1")
        return Started(interpreter="Python 3.11", seconds=0.5, answer=body)

    return start


async def test_final_format(create) -> None:
    release = create().release
    good = answering([oip.TensorValues("y", "INT64", (1,), [1])])
    found = await probes.probe_final_format(release, SAMPLE, good, now=NOW)
    checked(found, Verdict.PASS, "no lock is pinned")
    wrong = answering([oip.TensorValues("z", "INT64", (1,), [1])])
    found = await probes.probe_final_format(release, SAMPLE, wrong, now=NOW)
    checked(found, Verdict.FAIL, "breaks the contract")
    found = await probes.probe_final_format(release, None, good, now=NOW)
    checked(found, Verdict.INCONCLUSIVE, "no sample")
    endpoint = create(artifacts=[], data=[], serving=ENDPOINT).release
    found = await probes.probe_final_format(endpoint, SAMPLE, good, now=NOW)
    checked(found, Verdict.PASS, "answered the sample")
    assert found.evidence["attested_by"] == ENDPOINT["urls"][0]


@pytest.mark.parametrize(
    ("error", "verdict"),
    [(RuntimeFailed("it has no numpy"), Verdict.FAIL), (Unavailable("busy"), Verdict.ERROR)],
)
async def test_final_format_of_what_does_not_start(create, error, verdict) -> None:
    async def start(release, request):
        raise error

    found = await probes.probe_final_format(create().release, SAMPLE, start, now=NOW)
    checked(found, verdict, str(error))


# --- language models --------------------------------------------------------------------------

LANGUAGE = {
    "artifacts": [],
    "environment": {},
    "serving": ENDPOINT,
    "contract": {"protocol": "openai", "operations": ["chat"]},
    "data": [],
}
CHAT = b'{"model": "sample", "messages": [{"role": "user", "content": "Say hello."}]}'
SAID = b'{"choices": [{"message": {"content": "Hello."}, "finish_reason": "stop"}]}'


async def test_what_a_language_model_was_trained_on_is_not_ours_to_say(create) -> None:
    bare = create(**LANGUAGE).release
    checked(await probes.probe_described(bare, now=NOW), Verdict.FAIL, "no training data")
    based = create(**LANGUAGE, base={"model": "org/base"}).release
    found = await probes.probe_described(based, now=NOW)
    checked(found, Verdict.INCONCLUSIVE, "what org/base was trained on")
    vague = create(**{**LANGUAGE, "contract": {"protocol": "openai"}}).release
    checked(await probes.probe_described(vague, now=NOW), Verdict.FAIL, "no operations")
    train = [{"name": "train", "path": "train.csv", "role": "train"}]
    tuned = create(**{**LANGUAGE, "data": train}).release
    checked(await probes.probe_described(tuned, now=NOW), Verdict.PASS, "operations chat")


async def test_a_language_models_samples_are_requests_that_it_does(create) -> None:
    release = create(**LANGUAGE).release
    checked(await probes.probe_contract(release, [CHAT], now=NOW), Verdict.PASS, "1 of 1")
    checked(await probes.probe_contract(release, [], now=NOW), Verdict.INCONCLUSIVE, "no sample")
    other = b'{"model": "sample", "input": "x"}'
    found = await probes.probe_contract(release, [CHAT, other], now=NOW)
    checked(found, Verdict.FAIL, "sample 2: it asks for embeddings")
    found = await probes.probe_contract(release, [b'{"model": "m", "messages": []}'], now=NOW)
    checked(found, Verdict.FAIL, "messages: empty")


@pytest.mark.parametrize(
    ("answer", "verdict", "told"),
    [
        (SAID, Verdict.PASS, "answered the sample"),
        (b'{"choices": []}', Verdict.FAIL, "choices: empty"),
        (b'{"error": {"message": "no memory"}}', Verdict.FAIL, "no memory"),
        (b"<html>", Verdict.FAIL, "breaks the contract"),
    ],
)
async def test_a_language_models_answer_has_to_be_one(create, answer, verdict, told) -> None:
    async def start(release, request):
        assert request == CHAT
        return Started(interpreter="elsewhere", seconds=0.5, answer=answer)

    found = await probes.probe_final_format(create(**LANGUAGE).release, CHAT, start, now=NOW)
    checked(found, verdict, told)


async def test_narrower_operations_break_clients(create) -> None:
    wide = {"protocol": "openai", "operations": ["chat", "embeddings"]}
    serving = create(**{**LANGUAGE, "contract": wide}).release
    narrow = create(**LANGUAGE, description="narrow").release
    found = await probes.probe_compatible(narrow, serving, now=NOW)
    checked(found, Verdict.FAIL, "'embeddings' is no longer accepted")
    tensors = create().release
    found = await probes.probe_compatible(tensors, serving, now=NOW)
    checked(found, Verdict.FAIL, "protocol changes")


async def test_what_a_language_model_does_and_what_is_added_is_shown(create) -> None:
    spec = {"behaviour": {"system": "Be brief. " * 20, "pin_sampling": True, "tools": [{"a": 1}]}}
    sampling = {"inference": {"sampling": {"temperature": 0.2}}}
    shown = show_release(create(**LANGUAGE, **spec, **sampling).release, "ana")
    assert shown.speaks == "openai, chat"
    assert "prompt 'Be brief. " in shown.adds
    assert "1 tools; temperature 0.2; in place of what clients" in shown.adds
    assert len(shown.adds) < 200
    plain = show_release(create().release, "ana")
    assert (plain.speaks, plain.adds) == ("oip-v2", "")
