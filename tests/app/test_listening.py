"""The sockets that `up` opens, and the certificate that is shown on them."""

from __future__ import annotations

import os
import socket
import stat
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path

import pytest

from shipworthy.app.certificates import check_certificate, fingerprint
from shipworthy.app.listening import listen
from shipworthy.app.workers import certificate_notes
from shipworthy.errors import InvalidDocument, Unavailable, UsageError
from shipworthy.settings import Project, load_project

CERTIFICATES = Path(__file__).parent / "certificates"


def project(root: Path, gateway: str = "port: 0") -> Project:
    (root / "shipworthy.yaml").write_text(f"gateway: {{{gateway}}}\n")
    return load_project(root)


# --- sockets --------------------------------------------------------------------------------------


def test_a_port_that_is_taken_is_one_clear_sentence(tmp_path):
    with closing(listen(project(tmp_path))) as first:
        assert first.host == "127.0.0.1"
        port = first.port
        assert len(first.descriptors) == 1
        with pytest.raises(Unavailable) as told:
            listen(project(tmp_path, f"port: {first.port}"))
        assert str(told.value) == (
            f"the gateway can't listen on 127.0.0.1:{first.port} (Address already in use); free"
            " the port, or set gateway.port in shipworthy.yaml (0 takes any free one)"
        )
    listen(project(tmp_path, f"port: {port}")).close()


@pytest.mark.parametrize("host", ["192.0.2.1", "no such host", "x" * 70])
def test_a_host_that_is_not_ours_is_one_clear_sentence(tmp_path, host):
    with pytest.raises(Unavailable, match=r"can't listen on .* \(.+\); free the port, or set"):
        listen(project(tmp_path, f"port: 0, host: '{host}'"))


def test_a_unix_socket_is_its_owners_alone_and_goes_with_up(tmp_path):
    before = os.umask(0)
    try:
        with closing(listen(project(tmp_path, "port: 0, unix_socket: gw.sock"))) as listeners:
            assert os.umask(0) == 0
            path = tmp_path / "gw.sock"
            assert listeners.unix_path == path
            assert stat.S_IMODE(path.stat().st_mode) == 0o600
            assert len(listeners.descriptors) == 2
            with socket.socket(socket.AF_UNIX) as client:
                client.connect(str(path))
    finally:
        os.umask(before)
    assert not path.exists()


def test_what_a_killed_up_left_is_replaced_and_nothing_else(tmp_path):
    path = tmp_path / "gw.sock"
    killed = f"import os, socket; socket.socket(socket.AF_UNIX).bind({str(path)!r}); os._exit(9)"
    subprocess.run([sys.executable, "-c", killed], check=False)
    assert path.is_socket()
    there = project(tmp_path, "port: 0, unix_socket: gw.sock")
    with closing(listen(there)) as first:
        with pytest.raises(Unavailable, match=r"somebody listens on .*gw\.sock already; stop"):
            listen(there)
        with socket.socket(socket.AF_UNIX) as client:  # they did the first one no harm
            client.connect(str(path))
        path.unlink()
        second = listen(there)
        first.close()
        assert path.is_socket(), "the socket of another one stays"
        second.close()
    path.write_text("precious")
    with pytest.raises(Unavailable, match="is there and no socket; remove it"):
        listen(there)
    assert path.read_text() == "precious"
    (tmp_path / "link").symlink_to(path)
    with pytest.raises(Unavailable, match="is there and no socket"):
        listen(project(tmp_path, "port: 0, unix_socket: link"))


@pytest.mark.parametrize("path", ["no/such/folder/gw.sock", "x" * 120])
def test_a_path_that_can_not_be_made_is_told_and_leaves_the_port_free(tmp_path, path):
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    with pytest.raises(Unavailable, match=r"gateway.unix_socket"):
        listen(project(tmp_path, f"port: {port}, unix_socket: {path}"))
    listen(project(tmp_path, f"port: {port}")).close()


# --- settings -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("gateway", "says"),
    [
        ("workers: 0", "workers"),
        ("workers: 65", "workers"),
        ("tls: {certificate: a.pem}", "key"),
        ("tls: {key: a.key}", "certificate"),
        ("tls: {certificate: a.pem, key: a.key, password: x}", "'password' is not a key here"),
        ("drain: -1", "drain"),
        ("access_log: 2", "access_log"),
    ],
)
def test_settings_of_the_gateway_that_make_no_sense_are_refused(tmp_path, gateway, says):
    with pytest.raises(InvalidDocument, match=f"shipworthy.yaml:1: .*{says}"):
        project(tmp_path, gateway)


# --- certificates ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("certificate", "key", "says"),
    [
        ("first.pem", "second.key", "second.key is not the key of .*first.pem; give the two that"),
        ("none.pem", "first.key", r"certificate: .*none.pem can't be read \(No such file"),
        ("first.pem", "none.key", r"key: .*none.key can't be read \(No such file"),
        ("first.pem", ".", r"key: .* can't be read \(Is a directory\)"),
        ("first.pem", "locked.key", "locked.key is locked by a password; give the key without"),
        ("first.key", "first.key", "both must be PEM files"),
        ("../conftest.py", "first.key", "both must be PEM files"),
        ("future.pem", "other.key", "future.pem is not valid yet; check the clock"),
    ],
)
def test_a_certificate_that_can_not_be_used_is_one_clear_sentence(certificate, key, says):
    with pytest.raises(UsageError, match=f"^gateway.tls.*{says}"):
        check_certificate(CERTIFICATES / certificate, CERTIFICATES / key, time.time())


def test_how_long_a_certificate_lasts_is_told_in_time(tmp_path):
    there = project(
        tmp_path, f"tls: {{certificate: {CERTIFICATES}/first.pem, key: {CERTIFICATES}/first.key}}"
    )
    now = time.time()
    left = check_certificate(CERTIFICATES / "first.pem", CERTIFICATES / "first.key", now)
    assert left > 80 * 365 * 86_400
    assert list(certificate_notes(there, now)) == []
    [note] = certificate_notes(there, now + left - 36 * 3600)
    assert note.endswith("first.pem expires in 1.5 days; renew it")
    expired = project(
        tmp_path, f"tls: {{certificate: {CERTIFICATES}/expired.pem, key: {CERTIFICATES}/other.key}}"
    )
    [note] = certificate_notes(expired, now)
    assert note.endswith("expired.pem has expired, so clients will refuse it; renew it")
    assert list(certificate_notes(project(tmp_path), now)) == []


def test_a_fingerprint_is_that_of_the_first_certificate_in_the_file(tmp_path):
    first, second = (CERTIFICATES / name for name in ("first.pem", "second.pem"))
    chain = tmp_path / "chain.pem"
    chain.write_text(f"whoever\n{first.read_text()}{second.read_text()}")
    assert fingerprint(chain) == fingerprint(first) != fingerprint(second)
    for bad in (b"", b"-----BEGIN CERTIFICATE-----\n!", b"\xff\xfe"):
        chain.write_bytes(bad)
        with pytest.raises(UsageError, match="no certificate can be read"):
            fingerprint(chain)
