"""kube-webhook-certgen: its command line, and the certificates that it makes."""

from __future__ import annotations

import ssl
from pathlib import Path

import pytest

from testbed.programs.webhook_certgen import UsageError, main, make_certificates, parse_options

REQUIRED = ["--secret-name=s", "--namespace", "n", "--webhook-name=w"]


@pytest.mark.parametrize(
    ("argv", "switches", "policy"),
    [
        (["patch", *REQUIRED], (True, True), ""),
        (["patch", *REQUIRED, "--patch-mutating=false", "--patch-failure-policy=Fail"], (True, False), "Fail"),
        (["patch", "--patch-validating=false", "--patch-mutating", *REQUIRED], (False, True), ""),
    ],
)
def test_the_patch_command(argv: list[str], switches: tuple[bool, bool], policy: str) -> None:
    """Both kinds of webhook are patched unless one is switched off."""
    options = parse_options(argv)
    assert (options.switches["patch-validating"], options.switches["patch-mutating"]) == switches
    assert (options.texts["namespace"], options.texts["patch-failure-policy"]) == ("n", policy)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["create", "--host=a"], 'required flag(s) "secret-name", "namespace" not set'),
        (["create", "--nope"], "unknown flag: --nope"),
        (["patch", "--patch-mutating=maybe"], 'invalid argument "maybe" for "--patch-mutating" flag: '
                                              'strconv.ParseBool: parsing "maybe"'),
        (["create", "--host"], "flag needs an argument: --host"),
        (["shred"], 'unknown command "shred" for "kube-webhook-certgen"'),
    ],
)  # fmt: skip
def test_command_lines_that_make_no_sense(argv: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Refused in cobra's words, with status 1."""
    with pytest.raises(UsageError) as refused:
        parse_options(argv)
    assert str(refused.value) == message
    assert main(argv) == 1
    assert capsys.readouterr().err == f"Error: {message}\n"


def test_outside_a_cluster(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Without the Service's variables it says what is missing."""
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    assert main(["create", "--host=a", "--secret-name=s", "--namespace=n"]) == 1
    assert "KUBERNETES_SERVICE_HOST and KUBERNETES_SERVICE_PORT must be defined" in capsys.readouterr().err


def test_the_certificates(tmp_path: Path) -> None:
    """A server that holds them is trusted by who trusts the authority, under each of the names and addresses."""
    authority, certificate, key = make_certificates(["web", "web.dev.svc", "10.96.0.9"])
    for name, data in (("cert", certificate), ("key", key)):
        (tmp_path / name).write_bytes(data)
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(tmp_path / "cert", tmp_path / "key")
    client = ssl.create_default_context(cadata=authority.decode())
    for name in ("web", "web.dev.svc", "10.96.0.9"):
        assert shake_hands(server, client, name)
    with pytest.raises(ssl.SSLCertVerificationError):
        shake_hands(server, client, "other")


def shake_hands(server: ssl.SSLContext, client: ssl.SSLContext, name: str) -> bool:
    """Do a handshake in memory."""
    pipes = [ssl.MemoryBIO() for _ in range(2)]
    ends = (client.wrap_bio(pipes[0], pipes[1], server_hostname=name), server.wrap_bio(pipes[1], pipes[0], True))
    done = [False, False]
    for _ in range(6):
        for number, end in enumerate(ends):
            try:
                end.do_handshake()
                done[number] = True
            except ssl.SSLWantReadError:
                continue
    return all(done)
