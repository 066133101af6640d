"""Where this project's gateway listens: what its worker wrote once it did."""

from __future__ import annotations

from pathlib import Path

import msgspec

from shipworthy.app.gateway_worker import ADDRESS_FILE
from shipworthy.errors import Unavailable
from shipworthy.settings import Project


class GatewayAddress(msgspec.Struct, frozen=True):
    """What the gateway's ready file says."""

    host: str
    port: int
    pid: int

    @property
    def reachable(self) -> str:
        """The host to call from this machine."""
        return "127.0.0.1" if self.host in {"0.0.0.0", "::"} else self.host  # noqa: S104

    @property
    def url(self) -> str:
        """Where clients call."""
        host = self.reachable
        return f"http://[{host}]:{self.port}" if ":" in host else f"http://{host}:{self.port}"


def gateway_file(project: Project) -> Path:
    """Where the gateway says which address it got."""
    return project.state / ADDRESS_FILE


def gateway_address(project: Project) -> GatewayAddress:
    """Where this project's gateway answers. Raises Unavailable when none has been started."""
    try:
        return msgspec.json.decode(gateway_file(project).read_bytes(), type=GatewayAddress)
    except (OSError, msgspec.MsgspecError) as error:
        message = "no gateway runs here; start one with 'shipworthy up'"
        raise Unavailable(message) from error


def gateway_url(project: Project) -> str:
    """The address as clients write it. Raises Unavailable when none has been started."""
    return gateway_address(project).url
