"""How attempts that failed are told to clients."""

from __future__ import annotations

from typing import Final

from shipworthy.protocols.outcomes import Reason

GONE: Final = 499
"""The status that records give to a call whose client went away."""

RETRIED: Final = frozenset(
    {
        Reason.UNREACHABLE, Reason.CONNECT_TIMEOUT, Reason.TIMEOUT, Reason.BROKEN,
        Reason.SERVER_ERROR, Reason.OVERLOADED, Reason.ERROR_EVENT, Reason.IDLE,
    }
)  # fmt: skip
"""After these another endpoint may do better."""

STATUS: Final = {
    Reason.TIMEOUT: 504,
    Reason.CONNECT_TIMEOUT: 504,
    Reason.IDLE: 504,
    Reason.CLIENT_DEADLINE: 504,
    Reason.FULL: 503,
    Reason.GATEWAY_FAULT: 503,
    Reason.OVERLOADED: 503,
    Reason.EJECTED: 503,
}
"""What a client gets when nobody could answer, where it is not 502."""

TEXT: Final = {
    Reason.UNREACHABLE: "the model can't be reached",
    Reason.CONNECT_TIMEOUT: "the model can't be reached in time",
    Reason.TIMEOUT: "the model did not answer in time",
    Reason.IDLE: "the model fell silent amid its answer",
    Reason.BROKEN: "the model's answer broke off or is not the protocol's",
    Reason.ERROR_EVENT: "the model failed amid its answer",
    Reason.SERVER_ERROR: "the model failed",
    Reason.REFUSED: "the model refused a request that its contract allows",
    Reason.OVERLOADED: "the model has too much to do; try again in a moment",
    Reason.UNEXPECTED_STATUS: "the model's server did not answer as the protocol says",
    Reason.AGAINST_CONTRACT: "the model's answer breaks its contract",
    Reason.NARROWED_CONTRACT: "this release no longer accepts such a request",
    Reason.EJECTED: "this release keeps failing and is not called for now",
    Reason.FULL: "too many requests are waiting for the model; try again in a moment",
    Reason.CLIENT_GONE: "the answer was not read in time",
    Reason.CLIENT_DEADLINE: "the deadline that the request set is over",
    Reason.GATEWAY_FAULT: "the gateway can open no more connections; try again in a moment",
}
"""What a client reads when nobody could answer."""
