"""Labs from the command line: isolation, places, and that nothing is left however they end."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from machine import children_named

from testbed.lab.folder import claim_folder, list_records, state_root
from testbed.lab.start import _TOOLS

pytestmark = [pytest.mark.root, pytest.mark.timeout(180)]

TESTBED = [sys.executable, "-m", "testbed"]


def mine(name: str) -> str:
    """Return a lab name of this test process alone: others may run beside it."""
    return f"{name}-{os.getpid()}"


def command(*argv: str, status: int = 0, **options: object) -> subprocess.CompletedProcess[str]:
    done = subprocess.run([*TESTBED, *argv], capture_output=True, text=True, timeout=120, check=False, **options)  # type: ignore[call-overload]
    assert done.returncode == status, f"{argv}: {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done


@pytest.fixture(scope="module", autouse=True)
def end_what_failed() -> Iterator[None]:
    """A test that fails halfway leaves no lab behind."""
    yield
    for record in list_records():
        if record.name.endswith(f"-{os.getpid()}"):
            command("down", record.name)


@pytest.fixture(scope="module")
def lab() -> Iterator[str]:
    """A lab that the tests of this file share."""
    name = f"test-{os.getpid()}"
    command("up", name)
    yield name
    command("down", name)


def host_state() -> dict[str, str]:
    """Return everything of the host that a lab could have changed."""
    commands = {
        "links": "ip -o link show | sed 's/qlen.*//'",
        "addresses": "ip -o addr",
        "routes": "ip route show table all; ip rule",
        "rules": "iptables-save | grep -v '^#'; nft list ruleset; ipset list",
        "namespaces": "ls /var/run/netns 2>/dev/null",
        "mounts": "sort /proc/self/mountinfo | cut -d' ' -f4-",
        "bridges": "ls /sys/class/net",
        "sysctls": "sysctl -a 2>/dev/null | grep '^net' | grep -v 'netfilter.nf_conntrack_count\\|inode\\|neigh.*gc'",
        "hostname": "hostname",
        "files": "cat /etc/hosts /etc/resolv.conf /etc/hostname; ls /etc | sort",
    }
    return {
        name: subprocess.run(["sh", "-c", command], capture_output=True, text=True, check=False).stdout
        for name, command in commands.items()
    }


def descendants(first: int) -> dict[int, str]:
    """Return the living processes below one, which is left out: pid -> command line.

    Zombies have ended, and how soon a detached lab's are collected is up to the machine's init.
    """
    parents: dict[int, int] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                state, parent = (entry / "stat").read_text().rpartition(")")[2].split()[:2]
                if state != "Z":
                    parents[int(entry.name)] = int(parent)
    found: dict[int, str] = {}
    heads = {first}
    while heads:
        heads = {pid for pid, parent in parents.items() if parent in heads}
        for pid in heads:
            with contextlib.suppress(OSError):
                found[pid] = Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ")
    return found


def still_alive(processes: dict[int, str]) -> dict[int, str]:
    """Return those that are still there under the same command line."""
    alive = {}
    for pid, line in processes.items():
        with contextlib.suppress(OSError):
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
            if state != "Z" and Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ") == line:
                alive[pid] = line
    return alive


def lab_pid(name: str) -> int:
    return next(record.pid for record in list_records() if record.name == name)


def test_the_host_stays_as_it_is() -> None:
    """Links, addresses, routes, rules, mounts, sysctls and files are the same before, during and after a lab."""
    before = host_state()
    command("up", mine("isolated"))
    during = host_state()
    command("down", mine("isolated"))
    assert during == before
    assert host_state() == before


def test_killing_the_first_process_removes_everything(eventually: Callable[..., object]) -> None:
    """Soon after SIGKILL no process of the lab is left, and the next `ls` removes its folder."""
    command("up", mine("victim"))
    pid = lab_pid(mine("victim"))
    processes = descendants(pid)
    assert len(processes) >= 10  # spawner, control, four machines, three kube-proxies, …
    os.kill(pid, signal.SIGKILL)
    eventually(lambda: not still_alive(processes))
    assert (state_root() / mine("victim")).is_dir()
    assert mine("victim") not in command("ls", "-o", "json").stdout
    assert not (state_root() / mine("victim")).exists()


def test_two_labs_of_one_topology(lab: str) -> None:
    """Labs run side by side with the same names and addresses, and a rule in one is not in the other."""
    command("up", mine("second"))
    try:
        both = {row["name"]: row for row in json.loads(command("ls", "-o", "json").stdout)}
        assert both[mine("second")]["nodes"] == both[lab]["nodes"] == ["node1", "node2", "node3"]
        command("exec", "-l", mine("second"), "node1", "--", "iptables", "-N", "ONLY-HERE")
        assert "ONLY-HERE" in command("exec", "-l", mine("second"), "node1", "--", "iptables-save").stdout
        assert "ONLY-HERE" not in command("exec", "-l", lab, "node1", "--", "iptables-save").stdout
        refusal = command("exec", "node1", "--", "true", status=3).stderr
        assert "several labs are running" in refusal
        assert "name one" in refusal
    finally:
        command("down", mine("second"))


def test_a_name_that_is_taken(lab: str) -> None:
    """A second lab of a name is refused, and the first one keeps running."""
    refusal = command("up", lab, status=3).stderr
    assert f"a lab named '{lab}' is running already; stop it with `testbed down {lab}`" in refusal
    command("exec", "-l", lab, "node1", "--", "true")


@pytest.mark.parametrize("name", ["../x", "a b", "x;y", "A", "", "x\ny", "a" * 40])
def test_names_that_could_lead_elsewhere(name: str) -> None:
    """A lab's name that is no plain name is refused before anything is made."""
    assert "must be at most 32 lower-case letters" in command("up", "--", name, status=2).stderr
    assert not name or not (state_root() / name).exists()


def test_what_a_dead_lab_left_is_reused() -> None:
    """A folder that nobody holds is taken over with nothing of the old lab in it."""
    folder = claim_folder("leftover")
    (folder.path / "spawner.sock").touch()
    (folder.path / "private").mkdir()
    folder.unlock()
    again = claim_folder("leftover")
    assert sorted(entry.name for entry in again.path.iterdir()) == ["api", "lock"]
    again.remove()
    assert not (state_root() / "leftover").exists()


def test_kube_proxy_has_synced_when_up_returns(lab: str) -> None:
    """On every node the chains of Service default/kubernetes are there; its endpoint is the lab itself."""
    for node in ("node1", "node2", "node3"):
        rules = command("exec", "-l", lab, node, "--", "iptables-save").stdout
        assert (
            '-A KUBE-SERVICES -d 10.96.0.1/32 -p tcp -m comment --comment "default/kubernetes:https cluster IP"'
            in rules
        )


@pytest.mark.parametrize(
    ("argv", "status"),
    [
        pytest.param(["sh", "-c", "exit 7"], 7, id="status of the command"),
        pytest.param(["nosuch-program"], 127, id="not found, as a shell says it"),
        pytest.param(["sh", "-c", "kill -9 $$"], 137, id="killed"),
        pytest.param(["true"], 0, id="success"),
    ],
)
def test_exec_ends_as_the_command_does(lab: str, argv: list[str], status: int) -> None:
    """`testbed exec` has the exit status of what it ran."""
    command("exec", "-l", lab, "node1", "--", *argv, status=status)


def test_exec_passes_streams_and_words_through(lab: str) -> None:
    """Standard input, output and error stay apart; words are not read as our options, nor by a shell."""
    done = command("exec", "-l", lab, "client", "--", "sh", "-c", 'cat; echo "$1" >&2', "-", "-l $(id)", input="in\n")
    assert (done.stdout, done.stderr) == ("in\n", "-l $(id)\n")


def test_tcpdump_as_typed(lab: str) -> None:
    """`testbed exec node1 -- tcpdump -ni any` shows packets until it is interrupted."""
    argv = [*TESTBED, "exec", "-l", lab, "node1", "--", "tcpdump", "-lni", "any", "icmp"]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as dump:
        assert dump.stdout
        assert dump.stderr
        while "listening on any" not in dump.stderr.readline():
            pass
        command("exec", "-l", lab, "client", "--", "ping", "-c1", "-W2", "192.168.93.11")
        line = dump.stdout.readline()
        dump.send_signal(signal.SIGTERM)
        assert dump.wait(timeout=10) == 0
    assert "192.168.93.100 > 192.168.93.11: ICMP echo request" in line


@pytest.mark.parametrize("where", ["nowhere", "dev/nothing", "$(id)", "../node1", "lan"])
def test_places_that_are_not_there(lab: str, where: str) -> None:
    """An unknown place is an error that lists the ones there are."""
    refusal = command("exec", "-l", lab, where, "--", "true", status=2).stderr
    assert repr(where) in refusal
    assert "node1, node2, node3, client" in refusal or "kube-system/kube-proxy-" in refusal


def test_exec_without_a_command(lab: str) -> None:
    """Nothing to run is bad input, with the form to type."""
    assert "testbed exec node1 -- CMD..." in command("exec", "-l", lab, "node1", status=2).stderr


def test_exec_in_a_pod(lab: str, eventually: Callable[..., object]) -> None:
    """A pod is NAMESPACE/POD; the command joins its processes, files and network."""
    pods = eventually(lambda: _kube_proxy_pods(lab))
    assert isinstance(pods, list)
    done = command("exec", "-l", lab, pods[0], "--", "sh", "-c", "cat /proc/1/comm; ls /var/run/testbed")
    assert done.stdout == "kube-proxy\napi.sock\n"


def _kube_proxy_pods(lab: str) -> list[str]:
    refusal = command("exec", "-l", lab, "dev/nothing", "--", "true", status=2).stderr
    return [word.strip(",\n ") for word in refusal.split() if word.startswith("kube-system/kube-proxy-")]


def test_mininet_cli(lab: str, tmp_path: Path) -> None:
    """Mininet's own command line runs on the caller's descriptors; a file of commands is run to its end."""
    commands = tmp_path / "commands"
    commands.write_text("nodes\nnode1 hostname\nclient ping -c1 -W2 192.168.93.11\nnode2 hostname\nexit\n")
    with commands.open() as stdin:
        done = command("cli", "-l", lab, stdin=stdin)
    assert done.stdout == "mininet> " * 5
    said = done.stderr.splitlines()  # where Mininet's log goes, and its CLI prints through that
    assert (said[0], said[2]) == ("available nodes are: ", "node1")
    assert [name for name in said[1].split() if "/" not in name] == ["client", "lan", "node1", "node2", "node3"]
    assert any(", 0% packet loss" in line for line in said)
    assert said[-1] == "node2"


def test_interrupted_start(eventually: Callable[..., object]) -> None:
    """Ctrl-C in the middle of a start ends with 130, and everything is gone."""
    for _ in range(5):
        with subprocess.Popen(
            [*TESTBED, "up", mine("halfway")], stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        ) as start:
            processes = eventually(lambda: descendants(start.pid), within_s=10)
            start.send_signal(signal.SIGINT)
            _, stderr = start.communicate(timeout=20)
        if start.returncode != 0:
            break
        command("down", mine("halfway"))  # it was ready before the signal came
    assert start.returncode == 130
    assert "interrupted" in stderr
    assert not still_alive(processes)
    assert not (state_root() / mine("halfway")).exists()


def test_a_starter_that_is_killed_takes_its_lab_along(eventually: Callable[..., object]) -> None:
    """SIGKILL to `testbed up` before the lab is ready leaves no process behind."""
    with subprocess.Popen(
        [*TESTBED, "up", mine("orphan")], stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL
    ) as start:
        eventually(lambda: descendants(start.pid), within_s=10)
        start.kill()
    # The lab's processes hold the lock of its folder, which is removed when nobody does any more.
    eventually(lambda: command("ls") and not (state_root() / mine("orphan")).exists(), within_s=10)


NOTHING_HAPPENS = """\
apiVersion: testbed/v1
kind: Scenario
metadata: {name: NAME}
spec:
  topology: three-nodes
  proxyModes: [iptables]
  steps:
    - exec: {in: node1, run: 'true'}
    - expect: {from: node1, tcp: '192.168.93.99:1', within: 60s}
    - exec: {in: node1, run: 'true'}
"""


@pytest.mark.parametrize("how", ["down", "spawner"])
def test_a_lab_that_ends_while_a_scenario_runs(how: str, tmp_path: Path, eventually: Callable[..., object]) -> None:
    """`run` says so at once, with the lab's last words, and reports what was seen until then; status 3."""
    name = mine(f"ends-{how[0]}")
    file = tmp_path / "scenario.yaml"
    file.write_text(NOTHING_HAPPENS.replace("NAME", name))
    with subprocess.Popen(
        [*TESTBED, "run", str(file), "--report", str(tmp_path / "out")],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    ) as run:  # fmt: skip
        assert run.stdout
        while "✓ 1/3" not in run.stdout.readline():
            pass
        os.write(os.open(state_root() / name / "lab.log", os.O_WRONLY | os.O_APPEND), b"its last words\n")
        if how == "down":
            command("down", name)
        else:
            [spawner] = children_named("spawner", lab_pid(name))
            os.kill(spawner, signal.SIGKILL)
        stdout, stderr = run.communicate(timeout=30)
    assert run.returncode == 3
    assert "seen    the lab ended" in stdout
    assert "3/3" in stdout and "not run" in stdout
    assert f"error: scenario {name} in iptables: the lab ended: lab {name!r} was stopped, or" in stderr
    assert "    its last words" in stderr
    assert '"failed"' in (tmp_path / "out" / "scenario.json").read_text()
    assert not (state_root() / name).exists()


def test_down_is_complete() -> None:
    """`down` returns when every process has ended; a second `down` says that there is no such lab."""
    command("up", mine("short"))
    assert command("down", mine("short")).stdout == f"lab {mine('short')} is gone\n"
    assert f"no lab named {mine('short')!r} is running" in command("down", mine("short"), status=3).stderr


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (["up", "x"], "a lab needs root: run this command as root, or with sudo"),
        (["ls"], "belongs to another user (its folder is {folder}): run this command as root, or with sudo"),
        (["exec", "node1", "--", "ls"], "belongs to another user (its folder is {folder}): run this command as root"),
    ],
)
def test_not_root(lab: str, words: list[str], error: str) -> None:
    """Without root, one line says so, also while root's labs run."""
    root = Path(__file__).resolve().parents[2]
    code = f"import os, sys; sys.path.insert(0, {str(root)!r}); import testbed.cli.main as m, click, msgspec, yaml\n"
    code += "import testbed.lab.start, testbed.lab.handle, testbed.manifests, testbed.scenario.modes\n"
    code += f"os.setuid(65534); sys.argv = ['testbed', *{words!r}]; m.main()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    folders = [str(path) for path in state_root().iterdir()]
    assert any(error.format(folder=folder) in line for folder in folders), line


def test_missing_tool(tmp_path: Path) -> None:
    """A tool that is not installed is named, with its package."""
    for tool in _TOOLS:
        if tool != "tini":
            (tmp_path / tool).symlink_to("/bin/true")
    done = command("up", "x", status=3, env={**os.environ, "PATH": str(tmp_path)})
    assert "missing: tini; install with `apt-get install tini`" in done.stderr


@pytest.mark.parametrize("backend", ["legacy", "nft"])
def test_the_backend_of_iptables_can_be_chosen(backend: str) -> None:
    """What up says is what ``iptables`` is in a node, and where kube-proxy's rules are."""
    name = f"{backend}-{os.getpid()}"
    try:
        assert (
            f"kube-proxy mode iptables, iptables-{backend}" in command("up", name, "--iptables-backend", backend).stdout
        )
        version = command("exec", "-l", name, "node1", "--", "iptables", "--version").stdout
        assert {"legacy": "(legacy)", "nft": "(nf_tables)"}[backend] in version
        assert "KUBE-SERVICES" in command("exec", "-l", name, "node1", "--", "iptables-save", "-t", "nat").stdout
        [row] = [row for row in json.loads(command("ls", "-o", "json").stdout) if row["name"] == name]
        assert row["iptablesBackend"] == backend
    finally:
        command("down", name)


def test_kube_proxy_shares_the_nodes_xtables_lock(lab: str) -> None:
    """Who takes the lock on a node keeps kube-proxy waiting, and the other way round: it is one file, one for each node."""
    stat = ("stat", "-c", "%d:%i", "/run/xtables.lock")
    of_nodes = {command("exec", "-l", lab, node, "--", *stat).stdout for node in ("node1", "node2", "node3")}
    of_pods = {command("exec", "-l", lab, pod, "--", *stat).stdout for pod in _kube_proxy_pods(lab)}
    assert len(of_nodes) == 3
    assert of_pods == of_nodes
