"""What a dashboard asks of the lake, as SQL that also people may start from.

Counts and latencies come from `minutes`, which is small; only what is about single inferences reads
`inferences`, a day or the newest of them. Each answers within a fifth of a second over ten million.
"""
# ruff: noqa: S608  # what is put into SQL are numbers, dates and quoted text

from __future__ import annotations

import base64
import binascii
import struct
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from shipworthy.stores.lake.schema import BUCKETS_PER_E, FEEDBACK, INFERENCES, MINUTES

_LONGEST_REQUEST = timedelta(hours=1, minutes=5)  # a policy's deadline is an hour at most
_ID_PREFIX, _ID_FIELDS = "inf_", struct.Struct(">BBQ")  # format, arm, milliseconds


@dataclass(frozen=True, slots=True)
class Span:
    """Which time is asked about, in Unix seconds, and which plan (`digits`); without it all."""

    since: float
    until: float
    plan: str | None = None


def traffic(span: Span, every: int = 60) -> str:
    """Requests and failures of each release, one row for each `every` seconds."""
    return f"""\
SELECT to_timestamp(step * {every:d}) AS time, * EXCLUDE (step)
FROM (
  SELECT {_step(every)} AS step, release, sum(requests)::BIGINT AS requests,
    coalesce(sum(requests) FILTER (outcome = 'failure'), 0)::BIGINT AS failures
  FROM {MINUTES.name} WHERE slice = '' AND {_minutes(span)} GROUP BY ALL
) ORDER BY time, release"""


def latency(span: Span, every: int | None = None) -> str:
    """Percentiles of each release's seconds, exact to 2.5%; with `every`, over time.

    What the client broke or gave up says nothing about the release, and is left out.
    """
    step = f"{_step(every)} AS step, " if every else ""
    by = "step, release" if every else "release"
    shown = f"to_timestamp(step * {every:d}) AS time, release" if every else "release"
    percentiles = ",\n  ".join(
        f"exp((min(bucket) FILTER (below >= {share} * requests) + 0.5) / {BUCKETS_PER_E})"
        f" AS p{share * 100:.0f}"
        for share in (0.5, 0.95, 0.99)
    )
    return f"""\
WITH counted AS (
  SELECT {step}release, bucket, sum(requests)::BIGINT AS n
  FROM {MINUTES.name}
  WHERE slice = '' AND outcome IN ('success', 'failure') AND {_minutes(span)} GROUP BY ALL
), ranked AS (
  SELECT *, sum(n) OVER (PARTITION BY {by} ORDER BY bucket) AS below,
    sum(n) OVER (PARTITION BY {by}) AS requests
  FROM counted
)
SELECT {shown}, requests::BIGINT AS requests,
  {percentiles}
FROM ranked GROUP BY {by}, requests ORDER BY {by}"""


def reasons(span: Span, most: int = 10) -> str:
    """The most frequent reasons why requests did not succeed, by release."""
    return f"""\
SELECT release, outcome, reason, sum(requests)::BIGINT AS requests
FROM {MINUTES.name} WHERE slice = '' AND outcome <> 'success' AND {_minutes(span)}
GROUP BY ALL ORDER BY requests DESC, release, outcome, reason LIMIT {most:d}"""


def slices(span: Span) -> str:
    """Requests and failures of each release on each slice, such as `country=DE`."""
    return f"""\
SELECT slice, release, sum(requests)::BIGINT AS requests,
  coalesce(sum(requests) FILTER (outcome = 'failure'), 0)::BIGINT AS failures
FROM {MINUTES.name} WHERE slice <> '' AND {_minutes(span)}
GROUP BY ALL ORDER BY requests DESC, slice, release"""


def newest_failures(span: Span, most: int = 50) -> str:
    """The newest inferences that their release failed at."""
    return f"""\
SELECT time, id, plan, release, reason, status, serving, seconds
FROM {INFERENCES.name} WHERE outcome = 'failure' AND {_within(span, "time")}
ORDER BY time DESC LIMIT {most:d}"""


def one_inference(id: str) -> str:
    """An inference by its id, with all feedback on it, the newest first."""
    asked = _asked(id)
    here, later = "true", "true"
    if asked is not None:
        # An id says when it was asked for, so that the days before and after needn't be read.
        first, last = asked - timedelta(seconds=1), asked + _LONGEST_REQUEST
        days = f"day BETWEEN {_day(first)} AND {_day(last)}"
        here = f"{days} AND time BETWEEN {_at(first)} AND {_at(last)}"
        later = f"day >= {_day(first)}"
    named = _text(id)
    return f"""\
SELECT i.*, (
  SELECT list({{time: f.time, kind: f.kind, name: f.name, value: f.value}} ORDER BY f.time DESC)
  FROM {FEEDBACK.name} f WHERE f.inference = {named} AND {later}
) AS feedback
FROM {INFERENCES.name} i WHERE id = {named} AND {here}"""


def _asked(id: str) -> datetime | None:
    """When an inference was asked for, as its id says; None where it has another form."""
    body = id.removeprefix(_ID_PREFIX)
    try:
        content = base64.urlsafe_b64decode(body + "=" * (-len(body) % 4))
        form, _, milliseconds = _ID_FIELDS.unpack_from(content)
        moment = datetime.fromtimestamp(milliseconds / 1000, UTC)
    except (binascii.Error, ValueError, OverflowError, OSError, struct.error):
        return None
    return moment if id.startswith(_ID_PREFIX) and form == 1 else None


def _step(every: int) -> str:
    """The number of the step that a minute is in; as a number it is grouped by much faster."""
    return f"epoch_us(minute) // {every * 1_000_000:d}"


def _minutes(span: Span) -> str:
    return _within(span, "minute")


def _within(span: Span, column: str) -> str:
    since, until = (datetime.fromtimestamp(at, UTC) for at in (span.since, span.until))
    plan = "" if span.plan is None else f" AND plan = {_text(span.plan)}"
    return (
        f"day BETWEEN {_day(since)} AND {_day(until)}"
        f" AND {column} >= {_at(since)} AND {column} < {_at(until)}{plan}"
    )


def _day(moment: datetime) -> str:
    return f"DATE '{moment:%Y-%m-%d}'"


def _at(moment: datetime) -> str:
    return f"TIMESTAMPTZ '{moment.isoformat(sep=' ')}'"


def _text(value: str) -> str:
    return "'" + value.replace("'", "''") + "'"
