"""Closed-loop load by wrk: as many requests as some connections can have answered.

wrk is C and costs little beside what it measures. Its Lua script varies the unit of each request,
so that a sticky split has something to split.
"""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path

import msgspec
from upstreams import Unusable

UNIT_HEADER = "X-Shipworthy-Unit"
_UNITS = 1000
_MARK = "FIGURES "
_SCRIPT = """\
local requests, turn = {}, 0

function init(args)
   local file = io.open(args[1], "r")
   local path = file:read("*l")
   local headers = {}
   while true do
      local name = file:read("*l")
      if name == "" then break end
      headers[name] = file:read("*l")
   end
   local body = file:read("*a")
   for unit = 1, %(units)d do
      headers["%(header)s"] = "user-" .. unit
      requests[unit] = wrk.format("POST", path, headers, body)
   end
end

function request()
   turn = turn %% %(units)d + 1
   return requests[turn]
end

function done(summary, latency, requests)
   local errors = summary.errors
   io.write(string.format(
      '%(mark)s{"requests": %%d, "seconds": %%f, "failed": %%d, "broken": %%d, '
      .. '"p50": %%f, "p99": %%f}\\n',
      summary.requests, summary.duration / 1e6, errors.status,
      errors.connect + errors.read + errors.write + errors.timeout,
      latency:percentile(50) / 1e6, latency:percentile(99) / 1e6))
end
"""


class Closed(msgspec.Struct, frozen=True):
    """What wrk saw. Latencies in seconds; `failed` were answered, but with an error."""

    requests: int
    seconds: float
    failed: int
    broken: int
    p50: float
    p99: float

    @property
    def rate(self) -> float:
        """Answers per second."""
        return self.requests / self.seconds


class Wrk:
    """wrk with one thread; `folder` takes its script and the requests."""

    def __init__(self, folder: Path) -> None:
        binary = shutil.which("wrk")
        if binary is None:
            raise Unusable("wrk is not installed; install it with 'apt-get install wrk'")
        folder.mkdir()
        self._binary, self._folder = binary, folder
        self._script = folder / "load.lua"
        self._script.write_text(
            _SCRIPT % {"units": _UNITS, "header": UNIT_HEADER, "mark": _MARK}, encoding="ascii"
        )

    def run(
        self,
        port: int,
        path: str,
        headers: Mapping[str, str],
        body: bytes,
        *,
        connections: int,
        seconds: float,
    ) -> Closed:
        """Load one address; Unusable when any request wasn't answered with success."""
        request = self._folder / "request"
        lines = [path]
        for name, value in {"Content-Type": "application/json", **headers}.items():
            lines += [name, value]
        request.write_bytes("\n".join([*lines, "", ""]).encode() + body)
        done = subprocess.run(
            [
                *(self._binary, "-t1", f"-c{connections}", f"-d{max(1, round(seconds))}s"),
                *("--timeout", "20s", "-s", str(self._script)),
                *(f"http://127.0.0.1:{port}", "--", str(request)),
            ],
            capture_output=True,
            text=True,
            check=False,
        )
        _, mark, said = done.stdout.rpartition(_MARK)
        if done.returncode or not mark:
            problem = (done.stderr or done.stdout).strip()
            raise Unusable(f"wrk ended with {done.returncode}: {problem}")
        closed = msgspec.json.decode(said, type=Closed)
        if closed.failed or closed.broken or not closed.requests:
            message = (
                f"of {closed.requests} answers {closed.failed} were errors;"
                f" {closed.broken} connections broke or timed out"
            )
            raise Unusable(message)
        return closed
