"""The worker's own numbers."""

from __future__ import annotations

from prometheus_client import Histogram
from prometheus_client.parser import text_string_to_metric_families

from shipworthy.gateway.metrics import _BUCKETS, Metrics

SECONDS = (0.0, 2**-10, 0.25, 0.375, 30.0, 31.0)  # sums of these are exact
NAME = "shipworthy_gateway_request_seconds"


def samples(text: str) -> dict:
    return {
        (sample.name.removeprefix(NAME), sample.labels.get("le")): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.name.startswith(NAME) and not sample.name.endswith("created")
    }


def test_latencies_counted_together_are_as_if_observed_one_by_one():
    ours, theirs = Metrics(), Metrics()
    timer: Histogram = theirs._seconds.labels("digits")
    for seconds in SECONDS:
        ours.answered("digits", 200 if seconds < 1 else 504, seconds, 1, 1)
        timer.observe(seconds)
    expected = samples(theirs.exposition().decode())
    assert samples(ours.exposition().decode()) == expected
    assert samples(ours.exposition().decode()) == expected  # nothing is counted twice
    assert expected["_count", None] == len(SECONDS)
    assert len([key for key in expected if key[0] == "_bucket"]) == len(_BUCKETS) + 1
