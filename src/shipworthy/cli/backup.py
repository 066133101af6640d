"""`shipworthy backup …`."""

from __future__ import annotations

from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from shipworthy.app.backing_up import Backup, create_backup, verify_backup
from shipworthy.app.restoring import restore_backup
from shipworthy.app.session import open_session
from shipworthy.cli.output import byte_progress, say, say_json
from shipworthy.errors import IntegrityError

backup = typer.Typer(
    no_args_is_help=True,
    help="The whole state of a project in one file: make it, check it, restore it.",
)

Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@backup.command("create")
def create(
    file: Annotated[Path, typer.Argument(help="The archive to write, such as shop.tar.")],
    *,
    json: Json = False,
) -> None:
    """Back the project up while it runs: ledger, lake, journals, blobs, secrets and settings.

    Whoever can read the file can act as this machine and read what its clients sent: guard it.

    Example: shipworthy backup create /mnt/backups/shop-2026-08-01.tar
    """
    made = create_backup(open_session(), file, partial(byte_progress, f"writing {file.name}"))
    if json:
        say_json(made)
    else:
        say(f"Backed up {_told(made)}, to {file}.")
        say("Guard it like the machine: its secrets are inside. Next: keep it on another disk;")
        say(f"'shipworthy backup verify {file}' reads every byte again.")
    _complain(made)


@backup.command("verify")
def verify(
    file: Annotated[Path, typer.Argument(help="An archive that 'backup create' made.")],
    *,
    json: Json = False,
) -> None:
    """Read every byte of a backup again and compare it with what was written.

    Example: shipworthy backup verify /mnt/backups/shop-2026-08-01.tar
    """
    found = verify_backup(file, partial(byte_progress, f"reading {file.name}"))
    if json:
        say_json(found)
    else:
        say(f"{file} is whole: {_told(found)}.")
    _complain(found)


@backup.command("restore")
def restore(
    file: Annotated[Path, typer.Argument(help="An archive that 'backup create' made.")],
    folder: Annotated[
        Path, typer.Argument(help="Where: absent, empty, or a project without state.")
    ],
    ledger: Annotated[
        str | None,
        typer.Option(help="Keep the ledger here from now on: the URL of an empty database."),
    ] = None,
    *,
    json: Json = False,
) -> None:
    """Put a backup's project into a folder, every byte checked before anything is in place.

    Stop the machine that it came from first: two with the same state would both decide.

    Example: shipworthy backup restore /mnt/backups/shop-2026-08-01.tar /srv/shop
    """
    show = partial(byte_progress, f"restoring {file.name}")
    restored = restore_backup(file, folder, show, ledger=ledger)
    if json:
        say_json(restored)
    else:
        say(f"Restored {_told(restored)}, to {folder.resolve()}.")
        say(
            "The machine that it came from must not run any more: both would decide. Next, in that"
            " folder: 'shipworthy audit verify', then 'shipworthy up'."
        )
    _complain(restored)


def _told(found: Backup) -> str:
    at = datetime.fromtimestamp(found.at, UTC)
    kinds = ", ".join(
        f"{found.files.get(kind, 0):,} {what}"
        for kind, what in (
            ("blobs", "blobs"),
            ("lake", "files of the lake"),
            ("journals", "segments of journals"),
        )
    )
    return f"the state of {at:%Y-%m-%d %H:%M:%S} UTC, {_size(found.bytes)} ({kinds})"


def _size(count: int) -> str:
    size = float(count)
    for unit in ("bytes", "kB", "MB"):
        if size < 1000:
            return f"{size:,.0f} {unit}"
        size /= 1000
    return f"{size:,.1f} GB"


def _complain(found: Backup) -> None:
    """End with a refusal when blobs had been damaged before they were backed up."""
    if found.damaged:
        message = (
            f"{len(found.damaged)} blobs in it were damaged before already, such as"
            f" {found.damaged[0]}; 'shipworthy release verify' tells whose they are, and an older"
            " backup may have them whole"
        )
        raise IntegrityError(message)
