"""Feedback: who may say what about which inference, and that it is kept before it is taken."""

import msgspec
import pytest

from shipworthy.gateway.tickets import Pseudonyms, TicketOffice

SECRET = bytes(range(32))


@pytest.fixture
async def asked(worker):
    """A worker that has answered one call of the client's."""
    await worker.start(worker.plan(candidate=True))
    worker.inference = (await worker.infer(unit="user-1")).headers["x-shipworthy-inference"]
    return worker


def said(worker, **changes):
    return {
        "inference": worker.inference, "kind": "rating", "name": "stars", "value": 4, **changes,
    }  # fmt: skip


async def test_feedback_is_in_the_journal_before_it_is_taken(asked):
    reply = await asked.ask("POST", "/v1/feedback", body=said(asked))
    assert reply.status == 202
    [record] = asked.journal.feedback
    assert reply.json == {"feedback": record.id}
    assert (record.inference, record.key) == (asked.inference, "client")
    assert (record.kind, record.name, record.value) == ("rating", "stars", 4)
    assert record.unit == asked.journal.last.unit
    assert (record.assigned, record.trusted) == ("candidate", False)
    assert record.asked_at == pytest.approx(asked.journal.last.at, abs=1)
    assert await asked.metric('shipworthy_gateway_feedback_total{kind="rating"}') == 1


async def test_late_and_repeated_feedback_is_normal(asked):
    ids = set()
    for value in (1, 2, 2):
        reply = await asked.ask("POST", "/v1/feedback", body=said(asked, value=value))
        ids.add(reply.json["feedback"])
    assert len(ids) == 3
    await asked.stop()
    asked.clock.ahead = 1e7
    await asked.start(publish=False)
    assert (await asked.ask("POST", "/v1/feedback", body=said(asked))).status == 202


async def test_a_key_only_speaks_of_its_own_inferences_unless_trusted(asked):
    reply = await asked.ask("POST", "/v1/feedback", key="other", body=said(asked))
    assert reply.status == 403
    assert "with a trusted one" in reply.error
    for key in ("trusted", "admin"):
        assert (await asked.ask("POST", "/v1/feedback", key=key, body=said(asked))).status == 202
    assert [record.trusted for record in asked.journal.feedback] == [True, True]
    assert (await asked.ask("POST", "/v1/feedback", key=None, body=said(asked))).status == 401


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"inference": "inf_forged"}, "inference: not an id that this gateway gave out"),
        ({"inference": "x" * 200}, "inference"),
        ({"kind": "mood"}, "kind"),
        ({"name": ""}, "name"),
        ({"name": "x" * 200}, "name"),
        ({"name": "a\nb"}, "name"),
        ({"value": None}, "value: a rating is a number or a boolean"),
        ({"value": "five"}, "value: a rating is a number or a boolean"),
        ({"kind": "reward", "value": True}, "value: a reward is a number"),
        ({"kind": "label", "value": [1]}, "value: a label is"),
        ({"kind": "correction", "value": None}, "value: a correction is anything but null"),
        ({"extra": 1}, "unknown field extra"),
    ],
)
async def test_feedback_that_makes_no_sense_is_refused(asked, changes, says):
    reply = await asked.ask("POST", "/v1/feedback", body=said(asked, **changes))
    assert reply.status == 400
    assert says in reply.error
    assert not asked.journal.feedback


@pytest.mark.parametrize(
    "body", [b"", b"{", b"[]", b'{"inference":"\xff"}', b'{"value":' + b"[" * 60_000]
)
async def test_feedback_that_is_no_json_object_is_refused(asked, body):
    reply = await asked.ask("POST", "/v1/feedback", body=body)
    assert (reply.status, list(reply.json)) == (400, ["error"])


@pytest.mark.parametrize(
    ("kind", "value"),
    [
        ("rating", 0.5), ("rating", True), ("label", "cat"), ("label", 3), ("reward", -1.5),
        ("correction", {"outputs": [1, 2]}), ("correction", "better"), ("preference", "left"),
        ("outcome", False), ("outcome", 12.5),
    ],
)  # fmt: skip
async def test_every_kind_of_feedback_is_taken(asked, kind, value):
    reply = await asked.ask("POST", "/v1/feedback", body=said(asked, kind=kind, value=value))
    assert reply.status == 202
    assert asked.journal.feedback[-1].value == value


@pytest.mark.parametrize("value", ["[" * 9000 + "]" * 9000, '{"a": 99999999999999999999999}'])
async def test_what_a_journal_can_not_hold_is_the_clients_to_correct(asked, value):
    said_so = msgspec.json.encode(said(asked, kind="correction", value="HERE"))
    body = said_so.replace(b'"HERE"', value.encode())
    reply = await asked.ask("POST", "/v1/feedback", body=body)
    assert reply.status == 400
    assert not asked.journal.feedback


async def test_feedback_is_bounded(asked):
    huge = said(asked, kind="correction", value="x" * 100_000)
    assert (await asked.ask("POST", "/v1/feedback", body=huge)).status == 413


@pytest.mark.parametrize(("trouble", "why"), [("full", "full"), ("broken", "fault")])
async def test_feedback_that_can_not_be_kept_is_not_taken(asked, trouble, why):
    setattr(asked.journal, trouble, True)
    reply = await asked.ask("POST", "/v1/feedback", body=said(asked))
    assert (reply.status, reply.headers["retry-after"]) == (503, "1")
    line = f'shipworthy_gateway_records_dropped_total{{why="{why}"}}'
    assert await asked.metric(line) == 1


# --- ids --------------------------------------------------------------------------------------


def test_an_id_says_who_asked_when_and_on_which_arm():
    office = TicketOffice(SECRET, worker=b"abcd")
    text = office.issue(at=1_700_000_000.25, key="k-1", arm="candidate", unit="00ff" * 4)
    ticket = TicketOffice(SECRET, worker=b"efgh").read(text)
    assert ticket is not None
    assert (ticket.at, ticket.arm, ticket.unit) == (1_700_000_000.25, "candidate", "00ff" * 4)
    assert ticket.issued_to("k-1")
    assert not ticket.issued_to("k-2")
    assert "k-1" not in text


def test_no_two_ids_are_alike():
    office = TicketOffice(SECRET, worker=b"abcd")
    ids = {office.issue(at=1.0, key="k", arm="stable", unit=None) for _ in range(1000)}
    assert len(ids) == 1000
    other = TicketOffice(SECRET, worker=b"efgh")
    assert other.issue(at=1.0, key="k", arm="stable", unit=None) not in ids


def test_an_altered_id_or_one_of_another_gateway_is_not_ours():
    office = TicketOffice(SECRET, worker=b"abcd")
    text = office.issue(at=1.0, key="k", arm="stable", unit=None)
    ticket = office.read(text)
    assert ticket is not None
    assert ticket.unit is None
    for place in range(4, len(text)):
        letter = "A" if text[place] != "A" else "B"
        altered = text[:place] + letter + text[place + 1 :]
        read = office.read(altered)
        # the last letter carries unused bits, so another spelling of the same bytes is possible
        assert read is None or place == len(text) - 1
    assert TicketOffice(bytes(32), worker=b"abcd").read(text) is None
    for junk in ("", "inf_", "inf_é", "inf_!!!!", text + "A", text[:-4], "x" + text):
        assert office.read(junk) is None


def test_secrets_that_could_be_guessed_are_refused():
    with pytest.raises(Exception, match="signing secret has 3 bytes"):
        TicketOffice(b"abc", worker=b"abcd")
    with pytest.raises(Exception, match="pseudonym secret has 3 bytes"):
        Pseudonyms(b"abc")


def test_a_pseudonym_depends_on_the_secret_and_the_unit_alone():
    one, same, other = Pseudonyms(SECRET), Pseudonyms(SECRET), Pseudonyms(bytes(32))
    assert one.of("ann") == same.of("ann") != one.of("bob")
    assert one.of("ann") != other.of("ann")
    assert len(bytes.fromhex(one.of("ann"))) == 8
    assert msgspec.json.decode(msgspec.json.encode(one.of("日本"))) == one.of("日本")
