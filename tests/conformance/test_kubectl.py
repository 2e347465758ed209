"""What kubectl prints, command by command: the files in golden/ are the specification.

::

    $ get svc -n dev            a command; commands of one file share one cluster and run in order
    NAME   TYPE …               what it prints
    ! Error from server …       what it prints to standard error
    ? 1                         its exit status, when it is not 0
"""

from __future__ import annotations

import shlex
import subprocess
from pathlib import Path

import pytest
from support import HERE, Server, Uids, transcript

GOLDEN = sorted((HERE / "golden").glob("*.txt"))


def read_blocks(path: Path) -> list[tuple[str, str]]:
    """Return (command, expected transcript) for each command of a file; comments belong to the command after them."""
    blocks: list[tuple[str, list[str]]] = []
    for line in path.read_text().splitlines():
        if line.startswith("$ "):
            blocks.append((line[2:], []))
        elif line.startswith("# ") or not blocks:
            continue
        else:
            blocks[-1][1].append(line)
    return [(command, "\n".join(lines).strip("\n")) for command, lines in blocks]


def written(path: Path, outputs: list[str]) -> str:
    """Return a golden file's text with new outputs, its comments where they were."""
    lines: list[str] = []
    remaining = iter(outputs)
    for line in path.read_text().splitlines():
        if line.startswith("# "):
            lines.append(line)
        elif line.startswith("$ "):
            output = next(remaining)
            lines += [line, *([output] if output else []), ""]
    return "\n".join(lines).rstrip("\n") + "\n"


@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.stem)
def test_kubectl_prints_what_the_golden_file_says(
    path: Path, server: Server, kubectl: Path, request: pytest.FixtureRequest
) -> None:
    """Every command of a golden file prints what it says, on a new cluster."""
    seen, wanted, uids = [], [], Uids()
    for command, expected in read_blocks(path):
        done = server.kubectl(*shlex.split(command), program=kubectl)
        seen.append(transcript(done, uids))
        wanted.append(f"$ {command}\n{expected}")
    if request.config.getoption("--update-golden"):
        path.write_text(written(path, seen))
        return
    commands = [command for command, _ in read_blocks(path)]
    assert [f"$ {command}\n{output}" for command, output in zip(commands, seen, strict=True)] == wanted


def test_get_w_follows(server: Server, kubectl: Path) -> None:
    """kubectl get -w prints a row for each change, under one header."""
    done = server.kubectl("create", "service", "clusterip", "a", "--tcp=80", program=kubectl)
    assert done.returncode == 0, done.stderr
    env = {"KUBECONFIG": str(server.kubeconfig), "HOME": str(server.folder)}
    with subprocess.Popen([kubectl, "get", "svc", "-w"], env=env, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            rows = [process.stdout.readline().split()[0] for _ in range(2)]
            server.kubectl("create", "service", "nodeport", "b", "--tcp=80", program=kubectl)
            server.kubectl("delete", "svc", "a", program=kubectl)
            rows += [process.stdout.readline().split()[0] for _ in range(2)]
        finally:
            process.terminate()
            process.communicate(timeout=10)
    assert rows == ["NAME", "a", "b", "a"]


def test_there_are_enough_commands() -> None:
    """Issue 3 asks for at least 60 commands."""
    assert sum(len(read_blocks(path)) for path in GOLDEN) >= 60
