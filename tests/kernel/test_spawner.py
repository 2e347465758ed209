"""The spawner on a real kernel, asked by the runtime that kubelets use: what a container sees, and how it ends."""

from __future__ import annotations

import asyncio
import contextlib
import os
import pickle
import pwd
import re
import signal
import socket
import sys
import tempfile
import time
import weakref
from collections.abc import Awaitable, Callable, Iterator
from ipaddress import IPv4Address, IPv4Network
from pathlib import Path
from typing import Any

import pytest
from machine import children_named

from testbed.errors import InputError, KernelError
from testbed.kernel import linux
from testbed.kubelet.logs import ContainerLog
from testbed.kubelet.runtime import ContainerSpec, ExecResult, ExitStatus, Mount, SandboxSpec, Volume
from testbed.lab.frames import send_frame
from testbed.lab.runtime import SpawnerRuntime
from testbed.lab.sessions import FdInput, FdSession
from testbed.model.topology import Network, NodeSpec, Topology

pytestmark = pytest.mark.root

POD_CIDR = IPv4Network("10.244.1.0/24")
NODE = NodeSpec(name="node1", network="lan", address=IPv4Address("192.168.93.11"), pod_cidr=POD_CIDR)
LAN = Network(name="lan", cidr=IPv4Network("192.168.93.0/24"), gateway=IPv4Address("192.168.93.1"))
TOPOLOGY = Topology(name="t", networks=(LAN,), nodes=(NODE,))


@pytest.fixture
def log(tmp_path: Path) -> Path:
    """What the spawner of a test complains about."""
    path = tmp_path / "lab.log"
    path.touch()
    return path


@pytest.fixture
def spawner(log: Path) -> Iterator[socket.socket]:
    """A connection to a spawner with a network of one node, in namespaces that end with it."""
    with started_spawner(log) as connection:
        yield connection


@pytest.fixture
def spawner_and_forker(log: Path) -> Iterator[tuple[socket.socket, Callable[[], int]]]:
    """The same with a forker, and how to ask for its pid."""
    with started_spawner(log, with_forker=True) as connection:

        def forker() -> int:
            found = [pid for parent in children(os.getpid()) for pid in children_named("forker", parent)]
            return found[0] if found else 0

        yield connection, forker


def children(parent: int) -> list[int]:
    return [int(pid) for pid in Path(f"/proc/{parent}/task/{parent}/children").read_text().split()]


_FOLDERS: weakref.WeakKeyDictionary[socket.socket, str] = weakref.WeakKeyDictionary()


def lab_folder_of(connection: socket.socket) -> str:
    return _FOLDERS[connection]


@contextlib.contextmanager
def started_spawner(log: Path, *, with_forker: bool = False) -> Iterator[socket.socket]:
    ours, theirs = socket.socketpair()
    folder = _FOLDERS[ours] = tempfile.mkdtemp(prefix="testbed-spawner-")
    own = os.open("/proc/self/ns/pid", os.O_RDONLY)
    linux.unshare(linux.CLONE_NEWPID)
    pid = os.fork()
    linux_restore(own)
    if pid == 0:
        be_spawner(theirs, folder, log, with_forker=with_forker)
    theirs.close()
    try:
        yield ours
    finally:
        ours.close()
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        sys.stderr.write(log.read_text())
        os.rmdir(f"{folder}/private")
        os.rmdir(folder)


def linux_restore(own: int) -> None:
    with contextlib.suppress(OSError):  # in the child, which cannot and need not
        linux.setns(own, linux.CLONE_NEWPID)
    os.close(own)


def be_spawner(connection: socket.socket, folder: str, log: Path, *, with_forker: bool) -> None:
    sys.stderr = log.open("w")
    try:
        linux.set_parent_death_signal(signal.SIGKILL)  # of a pytest that is killed
        linux.unshare(linux.CLONE_NEWNET | linux.CLONE_NEWNS | linux.CLONE_NEWUTS)
        linux.mount("none", "/", "", linux.MS_REC | linux.MS_PRIVATE)
        linux.mount("proc", "/proc", "proc")
        os.mkdir(f"{folder}/private")
        linux.mount("tmpfs", f"{folder}/private", "tmpfs")
        from testbed.lab.forker import start_forker
        from testbed.lab.spawner import Spawner

        made = Spawner(TOPOLOGY, folder, connection, start_forker() if with_forker else None)
        made.network.build_topology()
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(b"\0" + folder.encode())
        listener.listen()
        made.serve(listener)
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(0)


def sandbox(**changes: Any) -> SandboxSpec:
    fields: dict[str, Any] = {
        "pod_uid": "uid-1",
        "namespace": "dev",
        "pod_name": "web",
        "node": "node1",
        "hostname": "web",
        "address": IPv4Address("10.244.1.2"),
        "network": POD_CIDR,
        "etc_files": {"hosts": "10.244.1.2 web\n", "resolv.conf": "nameserver 10.96.0.10\n", "hostname": "web\n"},
    }
    return SandboxSpec(**{**fields, **changes})


def container(*argv: str, **changes: Any) -> ContainerSpec:
    return ContainerSpec(**{"container_id": "c1", "pod_uid": "uid-1", "name": "main", "argv": argv, **changes})


class Runtime(SpawnerRuntime):
    """Keeps the output of every container, by its ID."""

    def __init__(self, connection: socket.socket) -> None:
        super().__init__(connection)
        self.logs: dict[str, ContainerLog] = {}

    async def start_container(self, spec: ContainerSpec, output: object = None) -> FdInput:
        self.logs[spec.container_id] = ContainerLog(time.time_ns)
        return await super().start_container(spec, self.logs[spec.container_id])

    def text(self, container_id: str = "c1", stream: int | None = None) -> str:
        entries = self.logs[container_id].entries()
        return b"".join(entry.data for entry in entries if stream in (None, entry.stream)).decode()


def with_runtime(connection: socket.socket, test: Callable[[Runtime], Awaitable[Any]]) -> Any:
    async def run() -> Any:
        return await asyncio.wait_for(test(Runtime(connection)), 30)

    return asyncio.run(run())


async def running(runtime: Runtime, *, made: SandboxSpec | None = None, **changes: Any) -> None:
    await runtime.create_sandbox(made or sandbox())
    await runtime.start_container(container("sleep", "60", **changes))


async def shell(runtime: Runtime, script: str, container_id: str = "c1") -> str:
    result = await runtime.exec(container_id, ["sh", "-c", script], timeout_s=10)
    return result.output


def test_what_a_container_sees(spawner: socket.socket) -> None:
    """Its own processes, hostname, /etc files, network and devices; an empty /run; the machine's programs."""

    async def test(runtime: Runtime) -> str:
        await running(runtime, env={"GREETING": "hi"})
        script = (
            "hostname; cat /etc/hosts /etc/resolv.conf /etc/hostname; ls /sys/class/net | tr '\\n' ' '; ls /run | wc -l;"
            "cat /proc/1/comm; echo $GREETING; echo x > /dev/null && echo null works; ls /dev/pts/ptmx; which ping"
        )
        return await shell(runtime, script)

    assert with_runtime(spawner, test).splitlines() == [
        "web", "10.244.1.2 web", "nameserver 10.96.0.10", "web", "eth0 lo 0", "sleep", "hi", "null works",
        "/dev/pts/ptmx", "/usr/bin/ping",
    ]  # fmt: skip


@pytest.mark.parametrize("privileged", [False, True])
def test_who_may_change_the_kernels_settings(spawner: socket.socket, privileged: bool) -> None:
    """/proc/sys and /sys are read-only, as with containerd, but to a privileged container."""

    async def test(runtime: Runtime) -> list[str]:
        await running(runtime, privileged=privileged)
        script = (
            "echo 1 > /proc/sys/net/ipv4/ip_forward; echo 1280 > /sys/class/net/eth0/mtu; cat /sys/class/net/eth0/mtu;"
            "for path in /proc/sys /proc/irq /proc/bus /proc/fs /sys;"
            "do findmnt -no OPTIONS --target $path | grep -c ^ro; done"
        )
        return [line.rpartition(": ")[2] for line in (await shell(runtime, f"({script}) 2>&1")).splitlines()]

    refused = ["Read-only file system", "Read-only file system"]
    assert with_runtime(spawner, test) == (["1280", *"00000"] if privileged else [*refused, "1500", *"11111"])


def test_a_restart_keeps_the_address_and_loses_the_files(spawner: socket.socket) -> None:
    """What one start wrote is gone in the next, on the same address; the machine's own files never change."""

    async def test(runtime: Runtime) -> list[str]:
        await running(runtime)
        script = "test -e /etc/mark && echo old; touch /etc/mark; ip -4 -o addr show eth0 | grep -o 10.244.1.2/"
        seen = [await shell(runtime, script)]
        await runtime.signal_container("c1", signal.SIGKILL)
        await runtime.wait_container("c1")
        await runtime.remove_container("c1")
        await runtime.start_container(container("sleep", "60", container_id="c2"))
        return [*seen, await shell(runtime, script, "c2")]

    assert with_runtime(spawner, test) == ["10.244.1.2/\n", "10.244.1.2/\n"]
    assert not Path("/etc/mark").exists()


@pytest.mark.parametrize(
    ("argv", "end"),
    [
        pytest.param(("sh", "-c", "exit 3"), ExitStatus(3), id="status"),
        pytest.param(("sh", "-c", "kill -TERM $$; sleep 9"), None, id="PID 1 ignores signals it has no handler for"),
        pytest.param(("true",), ExitStatus(0), id="success"),
    ],
)
def test_how_a_container_ends(spawner: socket.socket, argv: tuple[str, ...], end: ExitStatus | None) -> None:
    """The exit status of its first process is told; SIGKILL ends one that has no handler for SIGTERM, with 137."""

    async def test(runtime: Runtime) -> ExitStatus:
        await runtime.create_sandbox(sandbox())
        await runtime.start_container(container(*argv))
        if end is None:
            await runtime.signal_container("c1", signal.SIGTERM)
            await runtime.signal_container("c1", signal.SIGKILL)
        return await runtime.wait_container("c1")

    assert with_runtime(spawner, test) == (end or ExitStatus(137, 9))


def test_programs_that_cannot_start(spawner: socket.socket) -> None:
    """A program that is not there, or is no program, is an error that names pod, container and path."""

    async def test(runtime: Runtime) -> list[str]:
        await runtime.create_sandbox(sandbox())
        said = []
        for number, argv in enumerate((("nosuch",), ("/etc/passwd",))):
            with pytest.raises(KernelError) as caught:
                await runtime.start_container(container(*argv, container_id=f"c{number}"))
            said.append(str(caught.value))
        return said

    said = with_runtime(spawner, test)
    start = "dev/web: could not start container 'main': "
    assert said[0] == f'{start}exec: "nosuch": executable file not found in $PATH'
    assert said[1].startswith(f"{start}PermissionError")


def test_volumes(spawner: socket.socket) -> None:
    """An emptyDir is shared and outlives a container; a ConfigMap's files are read-only and follow updates."""

    async def test(runtime: Runtime) -> list[str]:
        volumes = (Volume(name="scratch"), Volume(name="config", files={"a.txt": "one"}))
        mounts = (Mount(volume="scratch", path="/scratch"), Mount(volume="config", path="/etc/config"))
        only_file = (*mounts, Mount(volume="config", path="/opt/here.txt", sub_path="a.txt"))
        await running(runtime, made=sandbox(volumes=volumes), mounts=only_file)
        seen = [
            await shell(
                runtime, "cat /etc/config/a.txt /opt/here.txt; echo data > /scratch/f; touch /etc/config/x 2>&1"
            )
        ]
        await runtime.update_volume(
            "uid-1", "config", {"b.txt": "two", "raw": b"\xff\x00".decode(errors="surrogateescape")}
        )
        await runtime.start_container(container("sleep", "60", container_id="c2", name="second", mounts=mounts))
        return [
            *seen,
            await shell(runtime, "ls /etc/config; od -An -tx1 /etc/config/raw; cat /etc/config/b.txt /scratch/f", "c2"),
        ]

    assert with_runtime(spawner, test) == [
        "oneonetouch: cannot touch '/etc/config/x': Read-only file system\n",
        "b.txt\nraw\n ff 00\ntwodata\n",
    ]


def test_the_files_of_a_volume_change_in_one_step(spawner: socket.socket) -> None:
    """As a kubelet lays them out: names lead through ..data, which is replaced; modes are those asked for; no rest is left."""
    modes: dict[str, Any] = {"default_mode": 0o400, "modes": {"run.sh": 0o755}}

    async def test(runtime: Runtime) -> list[str]:
        config = Volume(name="config", files={"a.txt": "one", "run.sh": "", "sub/b": "x"}, **modes)
        await running(runtime, made=sandbox(volumes=(config,)), mounts=(Mount(volume="config", path="/c"),))
        links = "for n in *; do echo $n $(readlink $n); done"
        look = f"cd /c; {links}; stat -L -c '%a %n' a.txt sub/b *.sh; ls -A | grep -c '^[.][.]2'"
        seen = [await shell(runtime, look), await shell(runtime, "readlink /c/..data")]
        same = {"a.txt": "one", "run.sh": "", "sub/b": "x"}
        await runtime.update_volume("uid-1", "config", same)
        seen.append(await shell(runtime, "readlink /c/..data"))
        await runtime.update_volume("uid-1", "config", {**same, "a.txt": "two"})
        return [*seen, await shell(runtime, f"cat /c/a.txt; echo; {look}"), await shell(runtime, "readlink /c/..data")]

    first, before, unchanged, after, changed = with_runtime(spawner, test)
    listed = "a.txt ..data/a.txt\nrun.sh ..data/run.sh\nsub ..data/sub\n400 a.txt\n400 sub/b\n755 run.sh\n1\n"
    assert (first, after) == (listed, f"two\n{listed}")
    assert before == unchanged != changed
    assert re.fullmatch(r"\.\.\d{4}(_\d\d){5}\.\d+\n", before)


def test_the_group_of_a_pod_reads_its_volumes(spawner: socket.socket) -> None:
    """With fsGroup, a user other than root reads files of mode 0400; without, not."""

    async def test(runtime: Runtime) -> str:
        secret = Volume(name="secret", files={"key": "s3cret"}, default_mode=0o400, group=2000)
        closed = Volume(name="closed", files={"key": "s3cret"}, default_mode=0o400)
        mounts = (Mount(volume="secret", path="/s"), Mount(volume="closed", path="/n"))
        made = sandbox(volumes=(secret, closed))
        await running(runtime, made=made, mounts=mounts, uid=1000, gid=1000, groups=(2000,))
        return await shell(runtime, "cat /s/key; echo; stat -L -c '%a %g' /s/key; cat /n/key 2>&1")

    assert with_runtime(spawner, test) == "s3cret\n440 2000\ncat: /n/key: Permission denied\n"


def test_a_link_in_a_container_does_not_lead_a_mount_out_of_it(spawner: socket.socket) -> None:
    """A mountPath below a symbolic link of the image is resolved inside the container; subPath stays in its volume."""

    async def test(runtime: Runtime) -> str:
        volumes = (Volume(name="scratch"),)
        await runtime.create_sandbox(sandbox(volumes=volumes))
        await runtime.start_container(container("sleep", "60", mounts=(Mount(volume="scratch", path="/var/run/data"),)))
        seen = await shell(runtime, "ls -d /run/data")
        escape = (Mount(volume="scratch", path="/x", sub_path="../../../etc"),)
        with pytest.raises(KernelError, match="subPath '../../../etc' leads out of the volume that is mounted at /x"):
            await runtime.start_container(container("true", container_id="c2", mounts=escape))
        for name in ("../../x", "/x", "a/../../x"):
            with pytest.raises(InputError, match="leads out of the volume"):
                await runtime.update_volume("uid-1", "scratch", {name: "text"})
        return seen

    assert with_runtime(spawner, test) == "/run/data\n"
    assert not Path("/run/data").exists()


def test_users_and_capabilities(spawner: socket.socket) -> None:
    """runAsUser and dropped capabilities hold, for the program and for exec; the default set cannot touch the network."""

    async def test(runtime: Runtime) -> list[str]:
        await running(runtime, uid=1000, gid=1000, groups=(2000,))
        await runtime.start_container(container("sleep", "60", container_id="c2", name="second"))
        await runtime.start_container(
            container("sleep", "60", container_id="c3", name="third", add_capabilities=("NET_ADMIN",))
        )
        add_link = "ip link add name x type bridge 2>&1 && echo made"
        return [
            await shell(runtime, "id -u; id -g; id -G"),
            await shell(runtime, add_link, "c2"),
            await shell(runtime, add_link, "c3"),
        ]

    user, default, admin = with_runtime(spawner, test)
    assert user == "1000\n1000\n1000 2000\n"
    assert "Operation not permitted" in default
    assert admin == "made\n"


def test_home_is_that_of_the_user(spawner: socket.socket) -> None:
    """HOME is what /etc/passwd says of the user and '/' for a stranger to it, unless the container's environment has it."""

    async def test(runtime: Runtime) -> list[str]:
        passwd = {"/etc/passwd": "root:x:0:0:root:/root:/bin/sh\nweb:x:1000:1000::/srv/web:/bin/sh\n"}
        await running(runtime, uid=1000, files=passwd)
        users: list[dict[str, Any]] = [{}, {"uid": 4321}, {"uid": 1000, "files": passwd, "env": {"HOME": "/tmp"}}]
        for number, user in enumerate(users, 2):
            await runtime.start_container(
                container("sleep", "60", container_id=f"c{number}", name=f"n{number}", **user)
            )
        return [await shell(runtime, "printenv HOME", f"c{number}") for number in range(1, 5)]

    root = pwd.getpwuid(0).pw_dir
    assert with_runtime(spawner, test) == ["/srv/web\n", f"{root}\n", "/\n", "/tmp\n"]


def test_exec_runs_out_of_time(spawner: socket.socket) -> None:
    """A command that takes too long is killed and answered with 124 and what it wrote until then."""

    async def test(runtime: Runtime) -> None:
        await running(runtime)
        timeout_s, result = 0.3, ExecResult(124, "")
        while result == ExecResult(124, ""):  # the time was over before the shell could say anything
            assert timeout_s < 60
            result = await runtime.exec("c1", ["sh", "-c", "echo begun; sleep 1000"], timeout_s=timeout_s)
            timeout_s *= 2
        assert result == ExecResult(124, "begun\n")

    with_runtime(spawner, test)


def test_connect_as_the_node_sees_it(spawner: socket.socket) -> None:
    """A probe's connection starts in the node's namespace: refused where nothing listens, made where something does."""

    async def test(runtime: Runtime) -> str:
        await runtime.create_sandbox(sandbox())
        listen = "import socket,time; s=socket.create_server(('',80)); c,a=s.accept(); c.sendall(a[0].encode()); time.sleep(60)"
        with pytest.raises(ConnectionRefusedError):
            await runtime.connect("node1", IPv4Address("10.244.1.2"), 80, timeout_s=2)
        await runtime.start_container(container(sys.executable, "-c", listen))
        while True:
            try:
                made = await runtime.connect("node1", IPv4Address("10.244.1.2"), 80, timeout_s=2)
            except ConnectionRefusedError:
                await asyncio.sleep(0.02)
                continue
            with made:
                return (await asyncio.get_running_loop().sock_recv(made, 99)).decode()

    assert with_runtime(spawner, test) == "10.244.1.1"


def test_host_network_and_host_path(spawner: socket.socket) -> None:
    """A hostNetwork pod has the node's links and hostname; a hostPath is a path of the node, not of the machine."""

    async def test(runtime: Runtime) -> str:
        made = sandbox(address=None, network=None, hostname="node1", volumes=(Volume(name="run", host_path="/run"),))
        await running(runtime, made=made, mounts=(Mount(volume="run", path="/node-run"),))
        return await shell(runtime, "ls /sys/class/net | tr '\\n' ' '; hostname; touch /node-run/mark")

    assert with_runtime(spawner, test) == "cni0 eth0 lo node1\n"
    assert not Path("/run/mark").exists()


def test_a_link_that_a_pod_has_made_does_not_lead_a_sub_path_out(spawner: socket.socket, tmp_path: Path) -> None:
    """A subPath is walked by the kernel, which follows no link out of the volume; what it would have made is not made."""
    outside = f"{str(tmp_path)[1:]}/made"
    links = {"/": outside, "/proc/1/root": outside, "..": "x", "../../../../../..": outside, "self/../../..": "x"}

    async def test(runtime: Runtime) -> str:
        made = sandbox(volumes=(Volume(name="scratch"),))
        await running(runtime, made=made, mounts=(Mount(volume="scratch", path="/scratch"),))
        await shell(runtime, "mkdir /scratch/self")
        for number, (link, leads_to) in enumerate(links.items()):
            await shell(runtime, f"ln -s {link} /scratch/{number}")
            through = (Mount(volume="scratch", path="/x", sub_path=f"{number}/{leads_to}"),)
            with pytest.raises(KernelError, match=r"leads out of the volume that is mounted at /x"):
                await runtime.start_container(container("true", container_id=f"c2{number}", mounts=through))
        inside = (Mount(volume="scratch", path="/x", sub_path="self/a/b"),)
        await runtime.start_container(container("sleep", "60", container_id="c3", mounts=inside))
        return await shell(runtime, "touch /x/mark", "c3") + await shell(runtime, "ls /scratch/self/a/b")

    assert with_runtime(spawner, test) == "mark\n"
    assert list(tmp_path.iterdir()) == [tmp_path / "lab.log"]


def test_nothing_is_mounted_inside_proc(spawner: socket.socket) -> None:
    """A mountPath that goes through the links of /proc, which lead out of the container, is refused."""

    async def test(runtime: Runtime) -> None:
        await runtime.create_sandbox(sandbox(volumes=(Volume(name="scratch"),)))
        for number, path in enumerate(("/proc/self/fd/3/x", "/proc/1/root/x", "/proc", "/var/../proc/x")):
            with pytest.raises(KernelError, match=f"cannot mount at '{path}': it is inside /proc"):
                await runtime.start_container(
                    container("true", container_id=f"c{number}", mounts=(Mount(volume="scratch", path=path),))
                )

    with_runtime(spawner, test)


def test_what_a_pod_writes_to_a_host_path_stays_on_its_node(spawner: socket.socket, tmp_path: Path) -> None:
    """Pods of a node share what they write there; the machine's own files, mode and owner included, stay as they are."""
    shown = tmp_path / "data"
    shown.mkdir(mode=0o750)
    (shown / "kept").write_text("machine's")
    (shown / "gone").touch()

    async def test(runtime: Runtime) -> list[str]:
        volumes = (
            Volume(name="data", host_path=str(shown)),
            Volume(name="file", host_path=str(shown / "kept"), host_type="File"),
            Volume(name="made", host_path=str(shown / "new/folder"), host_type="DirectoryOrCreate"),
            Volume(name="root", host_path="/"),
        )
        mounts = (
            Mount(volume="data", path="/data"), Mount(volume="file", path="/one"), Mount(volume="made", path="/made"),
            Mount(volume="root", path="/host"), Mount(volume="data", path="/sub", sub_path="new"),
        )  # fmt: skip
        await running(runtime, made=sandbox(volumes=volumes), mounts=mounts, privileged=True)
        script = (
            "stat -c %a /data; cat /data/kept; echo pod > /data/kept; cat /one; rm /data/gone; touch /made/here /sub/there;"
            f"touch /host{shown}/x; chmod 777 /data"
        )
        seen = [await shell(runtime, script)]
        other = sandbox(pod_uid="uid-2", pod_name="other", address=IPv4Address("10.244.1.3"), volumes=volumes[:1])
        await runtime.create_sandbox(other)
        await runtime.start_container(
            container("sleep", "60", container_id="c2", pod_uid="uid-2", mounts=(Mount(volume="data", path="/d"),))
        )
        return [*seen, await shell(runtime, "cat /d/kept; ls /d; ls /d/new", "c2")]

    assert with_runtime(spawner, test) == ["750\nmachine'spod\n", "pod\nkept\nnew\nfolder\nthere\n"]
    assert sorted(path.name for path in shown.iterdir()) == ["gone", "kept"]
    assert (shown / "kept").read_text() == "machine's"
    assert shown.stat().st_mode & 0o777 == 0o750


def test_host_paths_that_are_refused(spawner: socket.socket, tmp_path: Path) -> None:
    """What is not of the volume's type is refused in the kubelet's words; so is the lab's own folder, with its sockets."""
    lab, failed = lab_folder_of(spawner), "hostPath type check failed:"
    wrong = {
        (f"{tmp_path}/nothing", "Directory"): f"{failed} {tmp_path}/nothing is not a directory",
        (f"{tmp_path}/lab.log", "Directory"): f"{failed} {tmp_path}/lab.log is not a directory",
        (f"{tmp_path}", "File"): f"{failed} {tmp_path} is not a file",
        (f"{tmp_path}", "FileOrCreate"): f"{failed} {tmp_path} is not a file",
        (lab, ""): f"hostPath '{lab}' is the lab's own",
        (f"{lab}/private", ""): f"hostPath '{lab}/private' is the lab's own",
    }

    async def test(runtime: Runtime) -> None:
        for number, ((path, kind), words) in enumerate(wrong.items()):
            uid, address = f"uid-{number}", IPv4Address("10.244.1.2") + number
            volume = Volume(name="v", host_path=path, host_type=kind)
            await runtime.create_sandbox(
                sandbox(pod_uid=uid, pod_name=f"p{number}", address=address, volumes=(volume,))
            )
            mounts = (Mount(volume="v", path="/x"),)
            with pytest.raises((KernelError, InputError), match=re.escape(words)):
                await runtime.start_container(container("true", container_id=uid, pod_uid=uid, mounts=mounts))

    with_runtime(spawner, test)
    assert not (tmp_path / "nothing").exists()


def test_devices_of_the_machine_do_not_open(spawner: socket.socket) -> None:
    """A pod makes no device nodes; a hostPath opens none of the machine's, writes to no /dev or /sys, shows no lab's folder."""

    async def test(runtime: Runtime) -> str:
        volumes = tuple(Volume(name=name or "root", host_path=f"/{name}") for name in ("dev", "sys", ""))
        mounts = tuple(Mount(volume=volume.name, path=f"/h/{volume.name}") for volume in volumes)
        await running(runtime, made=sandbox(volumes=volumes), mounts=mounts)
        script = (
            "mknod /tmp/null c 1 3; mknod /dev/other c 1 3; cat /h/dev/zero; touch /h/dev/x; echo 1 > /h/sys/x;"
            f"ls -A /h/root{lab_folder_of(spawner)}"
        )
        return await shell(runtime, f"({script}) 2>&1")

    said = with_runtime(spawner, test).splitlines()
    assert [line.rpartition(": ")[2] for line in said] == [
        "Operation not permitted", "Operation not permitted", "Permission denied", "Read-only file system",
        "Read-only file system",
    ]  # fmt: skip
    assert not Path("/dev/x").exists()


def test_removing_a_sandbox_ends_everything(spawner: socket.socket) -> None:
    """After removal its programs have ended; removing it again succeeds; the same pod can be made again."""

    async def test(runtime: Runtime) -> ExitStatus:
        await running(runtime)
        end = asyncio.ensure_future(runtime.wait_container("c1"))
        await runtime.remove_sandbox("uid-1")
        await runtime.remove_sandbox("uid-1")
        await running(runtime)
        return await end

    assert with_runtime(spawner, test) == ExitStatus(137, 9)


def test_messages_carry_errors() -> None:
    """Every error of the tree survives the way between processes with its text and attributes."""
    from testbed.errors import CommandError, RulesRejected

    for error in (
        KernelError("x"),
        CommandError(["ip", "link"], 2, "no", where="node1"),
        RulesRejected("nft", 3, ["a"], "b"),
    ):
        copy = pickle.loads(pickle.dumps(error))
        assert (str(copy), vars(copy)) == (str(error), vars(error))


def test_what_a_container_writes_is_told_apart(spawner: socket.socket) -> None:
    """Standard output and error arrive as two streams, whole, before the end of the container is told."""

    async def test(runtime: Runtime) -> tuple[str, str]:
        await runtime.create_sandbox(sandbox())
        script = "echo out; echo err >&2; echo again > /dev/stdout; seq 20000; printf last"
        await runtime.start_container(container("sh", "-c", script, uid=1000))
        await runtime.wait_container("c1")
        return runtime.text(stream=1), runtime.text(stream=2)

    out, err = with_runtime(spawner, test)
    assert out.startswith("out\nagain\n1\n2\n")
    assert out.endswith("20000\nlast")
    assert err == "err\n"


def test_a_container_reads_what_is_typed(spawner: socket.socket) -> None:
    """With stdin a program reads what is written to it, and then the end; without, the end at once."""

    async def test(runtime: Runtime) -> str:
        await runtime.create_sandbox(sandbox())
        typed = await runtime.start_container(container("cat", stdin=True))
        await typed.write(b"hello\n")
        typed.close()
        await runtime.wait_container("c1")
        await runtime.start_container(container("cat", container_id="c2"))
        await runtime.wait_container("c2")
        return runtime.text() + runtime.text("c2")

    assert with_runtime(spawner, test) == "hello\n"


def test_a_container_with_a_terminal(spawner: socket.socket) -> None:
    """Its streams are one terminal with a name, a size and job control."""

    async def test(runtime: Runtime) -> str:
        await runtime.create_sandbox(sandbox())
        script = "tty; read line; stty size; echo got $line; echo > /dev/tty"
        typed = await runtime.start_container(container("bash", "-c", script, stdin=True, tty=True))
        typed.resize(120, 40)
        while "pts" not in runtime.text():
            await asyncio.sleep(0.01)
        await typed.write(b"abc\n")
        await runtime.wait_container("c1")
        return runtime.text()

    assert with_runtime(spawner, test).split() == ["/dev/pts/0", "abc", "40", "120", "got", "abc"]


async def talk(session: FdSession) -> tuple[bytes, bytes, int]:
    """Read a session to its end; return standard output, standard error and exit code."""
    pieces = {1: b"", 2: b""}
    while (piece := await session.read()) is not None:
        pieces[piece[0]] += piece[1]
    return pieces[1], pieces[2], (await session.wait()).code


def test_exec_with_its_streams(spawner: socket.socket) -> None:
    """Both outputs, what is typed, and the exit code; ten MiB come through one side while they go in at the other."""

    async def test(runtime: Runtime) -> tuple[tuple[bytes, bytes, int], int, tuple[bytes, bytes, int]]:
        await running(runtime)
        session = await runtime.open_exec("c1", ["sh", "-c", "cat; echo err >&2; exit 3"], stdin=True, tty=False)
        await session.write(b"typed")
        session.close()
        small = await talk(session)
        session = await runtime.open_exec("c1", ["cat"], stdin=True, tty=False)
        big = asyncio.create_task(session.write(bytes(10 << 20)))
        reading = asyncio.create_task(talk(session))
        await big
        session.close()
        terminal = await runtime.open_exec("c1", ["sh", "-c", "tty; echo err >&2; echo $TERM"], stdin=True, tty=True)
        return small, len((await reading)[0]), await talk(terminal)

    small, size, terminal = with_runtime(spawner, test)
    assert small == (b"typed", b"err\n", 3)
    assert size == 10 << 20
    assert terminal == (b"/dev/pts/0\r\nerr\r\nxterm\r\n", b"", 0)


def test_exec_of_what_is_not_there(spawner: socket.socket) -> None:
    """A program that does not exist is refused in runc's words."""

    async def test(runtime: Runtime) -> list[str]:
        await running(runtime)
        words = []
        for argv in (["nope"], ["/etc/nope"], ["/etc/hosts"]):
            with pytest.raises(KernelError) as refused:
                await runtime.open_exec("c1", argv, stdin=False, tty=False)
            words.append(str(refused.value))
        return words

    assert with_runtime(spawner, test) == [
        'exec: "nope": executable file not found in $PATH',
        'exec: "/etc/nope": stat /etc/nope: no such file or directory',
        'exec: "/etc/hosts": permission denied',
    ]


def test_an_exec_that_leaves_something_behind(spawner: socket.socket) -> None:
    """It ends when its own program has ended, though a child of it still holds its streams."""

    async def test(runtime: Runtime) -> tuple[bytes, bytes, int]:
        await running(runtime)
        session = await runtime.open_exec("c1", ["sh", "-c", "echo here; sleep 50 &"], stdin=False, tty=False)
        return await talk(session)

    assert with_runtime(spawner, test) == (b"here\n", b"", 0)


def test_a_connection_to_a_port_of_a_pod(spawner: socket.socket) -> None:
    """Port-forward reaches what listens on the pod's loopback only, and is refused where nothing does."""

    async def test(runtime: Runtime) -> bytes:
        await runtime.create_sandbox(sandbox())
        listen = (
            "import socket; s = socket.create_server(('127.0.0.1', 80)); print('up', flush=True); c, _ = s.accept(); "
            "c.sendall(c.recv(9)); c.close()"
        )
        await runtime.start_container(container(sys.executable, "-c", listen))
        while not runtime.text():
            await asyncio.sleep(0.01)
        reader, writer = await asyncio.open_connection(sock=await runtime.connect_pod("uid-1", 80, timeout_s=5))
        writer.write(b"ping")
        answer = await reader.read()
        writer.close()
        with pytest.raises(ConnectionRefusedError):
            await runtime.connect_pod("uid-1", 81, timeout_s=5)
        return answer

    assert with_runtime(spawner, test) == b"ping"


def test_a_user_without_capabilities(spawner: socket.socket) -> None:
    """A container that is not root, or that gives up everything, starts all the same, and has nothing."""

    async def test(runtime: Runtime) -> list[str]:
        await runtime.create_sandbox(sandbox())
        said = []
        for number, (uid, gid) in enumerate(((2000, 0), (2000, 2000), (0, 0), (0, 2000))):
            script = "echo $(id -u) $(id -g) $(grep CapEff /proc/self/status)"
            one = container("sh", "-c", script, container_id=f"c{number}", uid=uid, gid=gid, drop_capabilities=("ALL",))
            await runtime.start_container(one)
            await runtime.wait_container(f"c{number}")
            said.append(runtime.text(f"c{number}").strip())
        return said

    nothing = "CapEff: 0000000000000000"
    assert with_runtime(spawner, test) == [f"{ids} {nothing}" for ids in ("2000 0", "2000 2000", "0 0", "0 2000")]


def test_a_container_that_is_removed_while_its_end_is_told(spawner: socket.socket) -> None:
    """Why one does not start is answered before it is reaped; who removes it then at once disturbs nobody."""

    async def test(runtime: Runtime) -> str:
        await runtime.create_sandbox(sandbox())
        for number in range(60):
            name = f"c{number}"
            with pytest.raises(KernelError, match="executable file not found"):
                await runtime.start_container(container("nosuch", container_id=name))
            await runtime.remove_container(name)
        await runtime.start_container(container("sleep", "60", container_id="last"))
        return await shell(runtime, "echo lives", "last")

    assert with_runtime(spawner, test) == "lives\n"


def test_a_container_that_is_removed_while_something_runs_in_it(spawner: socket.socket) -> None:
    """Its first process ends only once the spawner has reaped what was executed in it."""

    async def test(runtime: Runtime) -> str:
        await runtime.create_sandbox(sandbox())
        for number in range(30):
            name = f"c{number}"
            await runtime.start_container(container("sleep", "60", container_id=name))
            await asyncio.gather(
                runtime.signal_container(name, signal.SIGKILL), runtime.exec(name, ["true"], timeout_s=0.01),
                runtime.remove_container(name), return_exceptions=True,
            )  # fmt: skip
        await runtime.start_container(container("sleep", "60", container_id="last"))
        return await shell(runtime, "echo lives", "last")

    assert with_runtime(spawner, test) == "lives\n"


def test_one_bad_request_is_nobody_elses(spawner: socket.socket, log: Path) -> None:
    """A handler that fails after its answer is logged with where, and the next request is answered."""

    async def test(runtime: Runtime) -> str:
        await running(runtime)
        send_frame(spawner, ("no number", "no_such_operation"))
        return await shell(runtime, "echo lives")

    assert with_runtime(spawner, test) == "lives\n"
    assert "ValueError: not enough values to unpack" in log.read_text()


ECHO: dict[str, Any] = {"builtin": "echo", "builtin_args": {"ports": [("TCP", 80)], "identity": {"pod": "web"}}}


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_echo_servers_without_their_forker(
    spawner_and_forker: tuple[socket.socket, Callable[[], int]], log: Path, number: int
) -> None:
    """It dies, or hangs: those that run go on, the next ones come from the spawner, and the log says so."""
    connection, forker = spawner_and_forker

    async def served(runtime: Runtime, container_id: str) -> None:
        await runtime.start_container(container(container_id=container_id, **ECHO))
        while True:
            try:
                (await runtime.connect_pod("uid-1", 80, timeout_s=2)).close()
                return
            except ConnectionRefusedError:
                await asyncio.sleep(0.02)

    async def test(runtime: Runtime) -> None:
        await runtime.create_sandbox(sandbox())
        await served(runtime, "c1")
        os.kill(forker(), number)
        (await runtime.connect_pod("uid-1", 80, timeout_s=2)).close()
        await runtime.remove_container("c1")
        await served(runtime, "c2")
        await runtime.remove_container("c2")
        await served(runtime, "c3")
        assert not forker()

    with_runtime(connection, test)
    said = log.read_text()
    assert said.count("from now on they are forked by the spawner") == 1, said
