"""The data plane: request → authenticate → choose → upstream → capture.

A worker reads one local file, the snapshot, and writes one, its journal. It waits for nobody else.
"""

from shipworthy.gateway.options import GatewayOptions, Tls
from shipworthy.gateway.parts import Outside
from shipworthy.gateway.server import run, serve

__all__ = ["GatewayOptions", "Outside", "Tls", "run", "serve"]
