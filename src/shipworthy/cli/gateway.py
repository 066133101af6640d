"""The gateway's workers: `gateway restart`."""

from __future__ import annotations

import typer

from shipworthy.app.children import Renewal
from shipworthy.app.renewing import renew_workers
from shipworthy.app.session import start_here
from shipworthy.cli.output import say, waiting
from shipworthy.settings import find_project

gateway = typer.Typer(no_args_is_help=True, help="The gateway of a running project.")


@gateway.command()
def restart() -> None:
    """Replace the gateway's workers one by one, without a dropped request.

    They follow what shipworthy.yaml now says, but for host, port, socket and whether TLS is spoken.
    Sending SIGHUP to 'shipworthy up' does the same.

    Example: shipworthy gateway restart
    """
    with waiting("restarting the gateway's workers") as show:

        def tell(renewal: Renewal) -> None:
            show(f"restarting the gateway's workers: {renewal.done} of {renewal.of} done")

        done = renew_workers(find_project(start_here()), tell)
    for note in done.notes:
        say(f"Note: {note}.")
    say(f"All {done.of} workers were restarted.")
