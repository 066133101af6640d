"""What runs, or should: `up` and its children, the port, replicas, and what is left of others."""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Iterator

from shipworthy import __version__
from shipworthy.app.children import read_processes
from shipworthy.app.doctor.machine import DEAD, STOPPED, Process
from shipworthy.app.doctor.results import Case, Result, bad, good, told, unseen, warn
from shipworthy.app.gateway_address import gateway_address, gateway_file
from shipworthy.app.health import STARTING, ask_gateway, restarted_often
from shipworthy.app.status import LOCK
from shipworthy.app.workers import certificate_notes, is_worker
from shipworthy.domain.lifecycle import Deployment, DeploymentState, Release
from shipworthy.domain.names import ReleaseReference
from shipworthy.errors import Unavailable, UsageError
from shipworthy.settings import MEBIBYTE, Project

_OURS = ("shipworthy.app.", "shipworthy.runtimes.")
_LEAST_OPEN_FILES = 1024
_LEAST_MEMORY = 256 * MEBIBYTE


def port(case: Case) -> Iterator[Result]:
    """Whether the gateway can listen, where it does not yet."""
    host, number = case.project.settings.gateway.host, case.project.settings.gateway.port
    if case.running or number == 0:
        return
    try:
        family, _, _, _, address = socket.getaddrinfo(host, number, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as error:
        yield _port_problem(case, host, number, error)
        return
    yield good("port", f"{host}:{number} is free for the gateway")


def _port_problem(case: Case, host: str, number: int, error: OSError) -> Result:
    where = f"{host}:{number}"
    if error.errno == errno.EADDRINUSE:
        who = " and ".join(str(process) for process in case.machine.listeners(number))
        seen = f"{where} is taken by {who or 'a process of another account'}"
        cure = "end that process, or set gateway.port in shipworthy.yaml (0 takes any free one)"
    elif error.errno in {errno.EACCES, errno.EPERM}:
        seen = f"this account may not listen on {where}"
        cure = "set gateway.port in shipworthy.yaml to 1024 or above"
    else:
        seen = f"the gateway can't listen on {where} ({error.strerror})"
        cure = "set gateway.host in shipworthy.yaml to an address of this machine: 127.0.0.1"
    return bad("port", seen, cure)


def gateway(case: Case) -> Iterator[Result]:
    """Whether the gateway answers while `up` runs."""
    if not case.running:
        yield good("gateway", "'shipworthy up' does not run here")
        return
    if not gateway_file(case.project).is_file():
        if case.up_for < STARTING:
            yield good("gateway", "'shipworthy up' is starting")
            return
        cure = f"see {case.project.logs / 'worker-0.log'}"
        yield bad("gateway", "'shipworthy up' runs and the gateway does not listen", cure)
        return
    try:
        live, _ = ask_gateway(case.project, "/healthz")
        ready, _ = ask_gateway(case.project, "/readyz")
    except Unavailable as error:
        yield _silent(case, error)
        return
    where = gateway_address(case.project).url
    if live != 200 or ready != 200:
        seen = f"the gateway at {where} says it is not ready"
        cure = (
            "with keys.max_stale set, it waits for a keeper to confirm the keys: see"
            f" {case.project.logs / 'keeper.log'}"
        )
        yield bad("gateway", seen, cure)
    else:
        yield good("gateway", f"the gateway answers at {where}")


def _silent(case: Case, error: Unavailable) -> Result:
    known = read_processes(case.project)
    workers = [child.pid for child in known.children if is_worker(child)] if known else []
    stopped = [
        process
        for pid in workers
        if pid is not None
        and (process := case.machine.process(pid)) is not None
        and process.state == STOPPED
    ]
    if stopped and len(stopped) == len(workers):
        seen = f"the gateway is stopped: {' and '.join(map(str, stopped))}"
        pids = " ".join(str(process.pid) for process in stopped)
        return bad("gateway", seen, f"kill -CONT {pids}")
    return told("gateway", error)


def certificate(case: Case) -> Iterator[Result]:
    """Whether the gateway's certificate can be used, and for how long."""
    file = case.project.certificate
    if file is None:
        return
    try:
        notes = list(certificate_notes(case.project, case.clock()))
    except UsageError as error:
        seen, _, cure = str(error).partition("; ")
        yield bad("certificate", seen, cure)
        return
    for note in notes:
        seen, _, cure = note.partition("; ")
        yield warn("certificate", seen, f"{cure}; the workers notice the new files by themselves")
    if not notes:
        yield good("certificate", f"{file} can be used")


def children(case: Case) -> Iterator[Result]:
    """Whether what `up` started keeps running, and is of this version."""
    processes = read_processes(case.project) if case.running else None
    if processes is None:
        return
    if processes.version != __version__:
        seen = f"'shipworthy up' is version {processes.version} and this command {__version__}"
        yield bad("version", seen, "stop 'shipworthy up' and start it with this version")
    dying = restarted_often(processes, case.clock())
    for child in dying:
        seen = f"{child.name} was restarted {child.restarts} times: {child.problem}"
        yield bad("processes", seen, f"see {child.log}")
    stopped = [
        (child, process)
        for child in processes.children
        if child.pid is not None
        and (process := case.machine.process(child.pid)) is not None
        and process.state == STOPPED
    ]
    for child, process in stopped:
        seen = f"the {child.name} is stopped: {process}"
        yield bad("processes", seen, f"kill -CONT {process.pid}")
    if not dying and not stopped:
        names = ", ".join(child.name for child in processes.children)
        yield good("processes", f"{names} run")


def orphans(case: Case) -> Iterator[Result]:
    """Processes of this project that outlived their `up`."""
    if case.running:
        return
    left = [process for process in case.machine.processes() if _is_ours(process, case.project)]
    if left:
        seen = f"{' and '.join(map(str, left[:3]))} run while no 'shipworthy up' does"
        pids = " ".join(str(process.pid) for process in left)
        yield bad("orphans", seen, f"kill {pids}")
    else:
        yield good("orphans", "no process is left of an earlier 'shipworthy up'")


def _is_ours(process: Process, project: Project) -> bool:
    if process.pid == os.getpid() or process.state == DEAD:
        return False
    runs_ours = any(word.startswith(_OURS) for word in process.command)
    in_state = any(str(project.state) in word for word in process.command[1:])
    named = any(word == str(project.root) for word in process.command[1:])
    return (runs_ours and (named or in_state)) or (
        in_state and any(str(project.replicas) in word for word in process.command)
    )


def limits(case: Case) -> Iterator[Result]:
    """Open files and memory, of `up` where it runs, else of this shell."""
    holder = case.machine.lock_holder(case.project.state / LOCK) if case.running else None
    limit = case.machine.open_files_limit(holder.pid if holder else os.getpid())
    if limit is not None and limit < _LEAST_OPEN_FILES:
        seen = f"a process may open {limit} files here; the gateway needs one for each connection"
        cure = "ulimit -n 8192 before 'shipworthy up' (under systemd: LimitNOFILE=8192)"
        yield warn("open files", seen, cure)
    elif limit is not None:
        yield good("open files", f"a process may open {limit:,} files")
    memory = case.machine.memory()
    if memory is None:
        return
    available, total = memory
    if available < _LEAST_MEMORY:
        seen = f"{available / 1e6:.0f} MB of {total / 1e9:.1f} GB of memory are available"
        cure = "end what else runs here, or lower serving.replicas of the models"
        yield warn("memory", seen, cure)
    else:
        yield good("memory", f"{available / 1e9:.1f} GB are available")


def replicas(case: Case) -> Iterator[Result]:
    """Whether what should run does."""
    if not case.running:
        return
    with case.ledger() as ledger, ledger.read() as tx:
        wanted = [deployment for deployment in tx.deployments.list() if deployment.wanted]
        names = {d.id: _release_name(tx.releases.find(_reference(d)), d) for d in wanted}
    failed = [d for d in wanted if d.state is DeploymentState.FAILED]
    for deployment in failed:
        seen = f"{names[deployment.id]} in {deployment.stage} failed: {deployment.message}"
        yield bad("replicas", seen, f"see {case.project.replicas / 'logs'}; then promote again")
    slow = [
        d
        for d in wanted
        if d.state is DeploymentState.STARTING and case.clock() - d.since > 10 * STARTING
    ]
    for deployment in slow:
        seen = f"{names[deployment.id]} in {deployment.stage} is still starting"
        doing = f": {deployment.message}" if deployment.message else ""
        yield warn("replicas", f"{seen}{doing}", f"see {case.project.replicas / 'logs'}")
    if not failed and not slow:
        yield good("replicas", f"{len(wanted)} deployments are as they should be")


def _reference(deployment: Deployment) -> ReleaseReference:
    return ReleaseReference(deployment.model, digest=deployment.release)


def _release_name(release: Release | None, deployment: Deployment) -> str:
    return release.name if release else f"a release of {deployment.model}"


def locks(case: Case) -> Iterator[Result]:
    """Who holds the lake's lock, and whether it still does anything with it."""
    holder = case.machine.lock_holder(case.project.lake_lock)
    if holder is not None and holder.state == STOPPED:
        seen = f"the lake's lock is held by a stopped process: {holder}"
        yield bad("locks", seen, f"kill -CONT {holder.pid}, or kill -9 {holder.pid}")
    elif holder is not None and not case.running and not _in_use(holder):
        seen = f"the lake's lock is held by {holder} while no 'shipworthy up' runs"
        yield unseen("locks", seen, "wait until it is done, or end it")
    else:
        yield good("locks", "no lock is held by a process that does nothing")


def _in_use(holder: Process) -> bool:
    """Whether a command of ours (backup, forget) is at work."""
    return any(
        word == "shipworthy" or word.startswith("shipworthy.") or word.endswith("/shipworthy")
        for word in holder.command
    )
