"""How attempts count: one table, the same for both arms.

`success` and `failure` are evidence about the release that was asked. `client_fault` is the
caller's doing and `censored` an attempt that nobody saw the end of; neither says anything about a
release.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from types import MappingProxyType
from typing import Final

from shipworthy.domain.records import Outcome


class Reason(StrEnum):
    """Why an attempt counts as it does: the short code in records and metrics."""

    ANSWERED = ""
    # the release's doing
    UNREACHABLE = "unreachable"
    CONNECT_TIMEOUT = "connect_timeout"
    TIMEOUT = "timeout"
    BROKEN = "broken"
    SERVER_ERROR = "status_5xx"
    REFUSED = "status_4xx"
    OVERLOADED = "status_429"
    UNEXPECTED_STATUS = "status_other"
    AGAINST_CONTRACT = "against_contract"
    NARROWED_CONTRACT = "narrowed_contract"
    EJECTED = "ejected"
    FULL = "full"
    ERROR_EVENT = "error_event"
    IDLE = "idle"
    # the caller's doing, or a limit on callers
    INVALID_JSON = "invalid_json"
    INVALID_INPUT = "invalid_input"
    UNSUPPORTED = "unsupported"
    TOO_LARGE = "too_large"
    BODY_TIMEOUT = "body_timeout"
    FULL_GATEWAY = "full_gateway"
    OVER_LIMIT = "over_limit"
    REFUSED_INPUT = "refused_input"
    # nobody saw the end
    CLIENT_GONE = "client_gone"
    CLIENT_DEADLINE = "client_deadline"
    SHUTDOWN = "shutdown"
    GATEWAY_FAULT = "gateway_fault"


OUTCOMES: Final[Mapping[Reason, Outcome]] = MappingProxyType(
    {
        Reason.ANSWERED: Outcome.SUCCESS,
        # no connection, none in time, no whole answer in time, or one that is not HTTP or JSON
        Reason.UNREACHABLE: Outcome.FAILURE,
        Reason.CONNECT_TIMEOUT: Outcome.FAILURE,
        Reason.TIMEOUT: Outcome.FAILURE,
        Reason.BROKEN: Outcome.FAILURE,
        # the gateway sends contract-valid input only, so a 4xx is the release's fault too
        Reason.SERVER_ERROR: Outcome.FAILURE,
        Reason.REFUSED: Outcome.FAILURE,
        Reason.OVERLOADED: Outcome.FAILURE,
        Reason.UNEXPECTED_STATUS: Outcome.FAILURE,
        # an answer that breaks the contract, or a candidate that no longer takes what stable takes
        Reason.AGAINST_CONTRACT: Outcome.FAILURE,
        Reason.NARROWED_CONTRACT: Outcome.FAILURE,
        # not called at all: its breaker is open, or as many calls as allowed are under way
        Reason.EJECTED: Outcome.FAILURE,
        Reason.FULL: Outcome.FAILURE,
        # a stream that says so itself, or says nothing for too long
        Reason.ERROR_EVENT: Outcome.FAILURE,
        Reason.IDLE: Outcome.FAILURE,
        Reason.INVALID_JSON: Outcome.CLIENT_FAULT,
        Reason.INVALID_INPUT: Outcome.CLIENT_FAULT,
        Reason.UNSUPPORTED: Outcome.CLIENT_FAULT,
        Reason.TOO_LARGE: Outcome.CLIENT_FAULT,
        Reason.BODY_TIMEOUT: Outcome.CLIENT_FAULT,
        Reason.FULL_GATEWAY: Outcome.CLIENT_FAULT,
        Reason.OVER_LIMIT: Outcome.CLIENT_FAULT,
        # a 400, 413 or 422 where no contract can say what a server may refuse, and no other
        # release has answered the same request
        Reason.REFUSED_INPUT: Outcome.CLIENT_FAULT,
        Reason.CLIENT_GONE: Outcome.CENSORED,
        Reason.CLIENT_DEADLINE: Outcome.CENSORED,
        Reason.SHUTDOWN: Outcome.CENSORED,
        Reason.GATEWAY_FAULT: Outcome.CENSORED,
    }
)
"""The table of all protocols; which reasons a protocol knows is its own."""


def reason_of_status(status: int) -> Reason:
    """What an upstream's HTTP status says, its body aside."""
    if status == 200:
        return Reason.ANSWERED
    if status >= 500:
        return Reason.SERVER_ERROR
    if status == 429:
        return Reason.OVERLOADED
    if status >= 400:
        return Reason.REFUSED
    return Reason.UNEXPECTED_STATUS  # a redirect, or a success without the answer
