"""`shipworthy demo`: three real models go to production, and the third one comes back.

Everything goes by the same road as any team's models: files in a folder, the commands of this very
command line, `shipworthy up` as a process of its own, and HTTP requests with keys. What is heavy is
imported when the demo runs, so that every other command starts fast.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def demo(
    context: typer.Context,
    folder: Annotated[
        Path, typer.Option(help="Where to make the project; one of an earlier demo is replaced.")
    ] = Path(".demo"),
    port: Annotated[
        int | None,
        typer.Option(min=0, max=65_535, help="The gateway's; without: 8080, or any free one."),
    ] = None,
    json: Annotated[
        Path | None, typer.Option("--json", help="Write the figures to this file.")
    ] = None,
    *,
    leave: Annotated[
        bool, typer.Option("--exit", help="End when the story is told, instead of staying up.")
    ] = False,
) -> None:
    """Train three models on handwritten digits and take them to production, with real traffic.

    The second is better and gets all traffic, step by step. The third passes its tests and fails
    on live inputs: it is caught and rolled back, and users see no error. Takes under two minutes.

    Exit code 0: all of that really happened; 1: it did not, and it says what.

    Example: shipworthy demo --exit --json figures.json
    """
    from shipworthy.cli.demo.story import tell

    raise typer.Exit(tell(context, folder=folder, port=port, json_file=json, leave=leave))
