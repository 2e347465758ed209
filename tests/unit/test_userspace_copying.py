"""The process that copies userspace mode's connections, on a loopback: real sockets, endpoints that behave and that do not."""

from __future__ import annotations

import contextlib
import hashlib
import os
import select
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from ipaddress import IPv4Address
from typing import Any

import pytest

from testbed.model.service import Protocol, ServicePortName
from testbed.programs.proxy_userspace import NodeSockets
from testbed.programs.userspace_loop import Notice
from testbed.programs.userspace_process import CopyProcess

Eventually = Callable[..., Any]
AT_REST = 2  # sockets of a process with one port: that, and the channel to kube-proxy
WEB, DNS = ServicePortName("ns", "web", "p80", "TCP"), ServicePortName("ns", "dns", "p53", "UDP")


class Proxy:
    """A copying process with one TCP or UDP port, and what it had to say."""

    def __init__(self, stack: contextlib.ExitStack, **options: Any) -> None:
        self.notices: list[Notice] = []
        options = {"udp_idle_s": 0.25, "seed": 1, **options}
        self.process = CopyProcess(on_notice=self.notices.append, **options)
        self.process.start()
        stack.callback(self.process.stop)
        self._stack = stack
        self.address = ("127.0.0.1", 0)

    def serve(self, name: ServicePortName, *endpoints: str, affinity_s: int = 0) -> None:
        listener = NodeSockets().listen(Protocol(name.protocol), IPv4Address("0.0.0.0"), 0)
        self._stack.callback(listener.close)
        self.listener, self.address = listener, ("127.0.0.1", listener.getsockname()[1])
        self.process.open(name, listener)
        self.process.set(name, endpoints, affinity_s)

    def connect(self, *, timeout_s: float = 10) -> socket.socket:
        return self._stack.enter_context(socket.create_connection(self.address, timeout_s))

    def ask(self, text: bytes = b"?", *, timeout_s: float = 10) -> bytes:
        """Return what one connection brings for one message, b'' when that is nothing."""
        with socket.create_connection(self.address, timeout_s) as client:
            client.sendall(text)
            try:
                return client.recv(100)
            except (ConnectionResetError, TimeoutError):
                return b""


class Endpoint:
    """A TCP server whose connections the test looks after, or that answers with its name and keeps the connection."""

    def __init__(
        self, stack: contextlib.ExitStack, name: str = "", *, host: str = "127.0.0.1", backlog: int = 4096
    ) -> None:
        self.server = stack.enter_context(socket.create_server((host, 0), backlog=backlog))
        self.server.settimeout(10)
        self.text = f"{host}:{self.server.getsockname()[1]}"
        self.name = name.encode()
        self._stack = stack
        if name:
            threading.Thread(target=self._answer, daemon=True).start()

    def accept(self) -> socket.socket:
        peer = self._stack.enter_context(self.server.accept()[0])
        peer.settimeout(10)
        return peer

    def _answer(self) -> None:
        poll, peers = select.epoll(), {}
        with contextlib.suppress(OSError, ValueError):
            self.server.setblocking(False)
            poll.register(self.server.fileno(), select.EPOLLIN)
            while True:
                for fd, _ in poll.poll():
                    if fd == self.server.fileno():
                        peer, _ = self.server.accept()
                        peers[peer.fileno()] = peer
                        poll.register(peer.fileno(), select.EPOLLIN)
                        continue
                    try:
                        data = peers[fd].recv(4096)
                        if data:
                            peers[fd].sendall(self.name + data)
                    except ConnectionError:
                        data = b""
                    if not data:
                        poll.unregister(fd)
                        peers.pop(fd).close()


@pytest.fixture
def stack() -> Iterator[contextlib.ExitStack]:
    with contextlib.ExitStack() as stack:
        yield stack


def read_all(peer: socket.socket) -> bytes:
    """Return what comes until the other side ends."""
    found = []
    with contextlib.suppress(ConnectionResetError):
        while data := peer.recv(1 << 16):
            found.append(data)
    return b"".join(found)


def test_endpoints_take_turns(stack: contextlib.ExitStack) -> None:
    """Each connection goes to the next endpoint; with affinity a client stays."""
    proxy, servers = Proxy(stack), [Endpoint(stack, name) for name in "abc"]
    proxy.serve(WEB, *(server.text for server in servers))
    seen = [proxy.ask()[:1] for _ in range(9)]
    assert sorted(seen[:3]) == [b"a", b"b", b"c"] and seen == seen[:3] * 3
    proxy.process.set(WEB, [server.text for server in servers], 100)
    assert len({proxy.ask() for _ in range(6)}) == 1


def test_bytes_arrive_as_sent(stack: contextlib.ExitStack) -> None:
    """32 MiB each way at once, readers slower than writers now and then: both ends see what the other sent."""
    proxy, server = Proxy(stack), Endpoint(stack)
    proxy.serve(WEB, server.text)
    client = proxy.connect()
    peer = server.accept()
    block = os.urandom(1 << 20)
    sent = hashlib.sha256(block * 32).digest()
    seen: dict[str, bytes] = {}

    def write(end: socket.socket) -> None:
        for _ in range(32):
            end.sendall(block)

    def read(end: socket.socket, name: str) -> None:
        found, left, naps = hashlib.sha256(), 32 << 20, 5
        while left and (data := end.recv(1 << 18)):
            found.update(data)
            left -= len(data)
            if naps:
                naps -= 1
                time.sleep(0.01)  # lets all buffers on the way fill up
        seen[name] = found.digest()

    threads = [threading.Thread(target=write, args=(end,)) for end in (client, peer)]
    threads += [threading.Thread(target=read, args=pair) for pair in ((client, "client"), (peer, "peer"))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert seen == {"client": sent, "peer": sent}


def test_no_endpoints_is_accepted_and_closed(stack: contextlib.ExitStack) -> None:
    """A Service without endpoints does not refuse: the connection is made, and ends at once."""
    proxy = Proxy(stack)
    proxy.serve(WEB)
    with proxy.connect() as client:
        assert client.recv(1) == b""


def test_half_closed_connections_are_closed(stack: contextlib.ExitStack) -> None:
    """A client that ends its sending side has all it sent delivered, and its connection closed: as upstream does."""
    proxy, server = Proxy(stack), Endpoint(stack)
    proxy.serve(WEB, server.text)
    client = proxy.connect()
    peer = server.accept()
    client.sendall(b"x" * 300_000)
    client.shutdown(socket.SHUT_WR)
    assert len(read_all(peer)) == 300_000
    assert client.recv(1) == b""
    back = proxy.connect()
    peer = server.accept()
    peer.sendall(b"bye")
    peer.shutdown(socket.SHUT_WR)
    assert read_all(back) == b"bye"


def test_dead_endpoints_are_passed_over(stack: contextlib.ExitStack) -> None:
    """An endpoint that refuses, and one that does not answer, cost no connection: the next one is tried, after 250 ms."""
    proxy, good, full, gone = Proxy(stack), Endpoint(stack, "g"), Endpoint(stack, backlog=0), Endpoint(stack)
    host, _, port = full.text.partition(":")
    for _ in range(3):  # fills its queue: what follows is not answered
        waiting = stack.enter_context(socket.socket())
        waiting.setblocking(False)
        waiting.connect_ex((host, int(port)))
    gone.server.close()
    proxy.serve(WEB, full.text, gone.text, good.text)
    started = time.monotonic()
    assert {proxy.ask() for _ in range(3)} == {b"g?"}
    assert time.monotonic() - started >= 0.25


def test_a_service_port_moves(stack: contextlib.ExitStack, eventually: Eventually) -> None:
    """Both ports are served until the old one is left; turns and affinity go on, and so do connections."""
    proxy, servers = Proxy(stack), [Endpoint(stack, name) for name in "abc"]
    endpoints = [server.text for server in servers]
    proxy.serve(WEB, *endpoints)
    seen, old, listener, client = [proxy.ask()[:1]], proxy.address, proxy.listener, proxy.connect()
    client.sendall(b"!")
    seen.append(client.recv(9)[:1])
    proxy.serve(WEB, *endpoints)
    new = proxy.address
    assert new != old
    seen.append(proxy.ask()[:1])
    proxy.address = old
    seen.append(proxy.ask()[:1])
    assert sorted(seen[:3]) == [b"a", b"b", b"c"] and seen[3] == seen[0]
    proxy.process.leave(WEB)
    listener.close()

    def is_refused() -> bool:
        try:
            proxy.ask()
        except ConnectionRefusedError:
            return True
        return False

    eventually(is_refused, within_s=5)
    client.sendall(b"!")
    assert client.recv(9)
    proxy.address = new
    assert proxy.ask()
    proxy.process.close(WEB)
    proxy.listener.close()
    eventually(is_refused, within_s=5)


def test_all_dead_closes(stack: contextlib.ExitStack, eventually: Eventually) -> None:
    """When four tries failed the client's connection is closed, and the log names the Service and the endpoint."""
    proxy, gone = Proxy(stack), Endpoint(stack)
    gone.server.close()
    proxy.serve(WEB, gone.text)
    assert proxy.ask() == b""
    [notice] = eventually(lambda: list(proxy.notices))
    assert notice.message == f"no endpoint of Service ns/web:p80 answers; the last one tried was {gone.text}"


def test_established_connections_go_on(stack: contextlib.ExitStack, eventually: Eventually) -> None:
    """Neither losing its endpoint nor losing the Service cuts a connection; new ones are refused."""
    proxy, one, two = Proxy(stack), Endpoint(stack, "1"), Endpoint(stack, "2")
    proxy.serve(WEB, one.text)
    client = proxy.connect()
    client.sendall(b"a")
    assert client.recv(10) == b"1a"
    proxy.process.set(WEB, [two.text], 0)
    eventually(lambda: proxy.ask() == b"2?")
    proxy.process.close(WEB)
    proxy.listener.close()

    def is_refused() -> bool:
        try:
            proxy.ask()
        except ConnectionRefusedError:
            return True
        except ConnectionResetError:  # it was made just before the port was closed
            return False
        return False

    eventually(is_refused)
    client.sendall(b"b")
    assert client.recv(10) == b"1b"


def test_a_thousand_connections_at_once(stack: contextlib.ExitStack) -> None:
    """All are open at the same time, and each gets its own answers, twice."""
    proxy, servers = Proxy(stack), [Endpoint(stack, name) for name in "ab"]
    proxy.serve(WEB, *(server.text for server in servers))
    clients = [proxy.connect(timeout_s=30) for _ in range(1000)]
    for turn in range(2):
        for number, client in enumerate(clients):
            client.sendall(b"%d.%d" % (turn, number))
        answers = [client.recv(100) for client in clients]
        assert [answer[1:] for answer in answers] == [b"%d.%d" % (turn, number) for number in range(1000)]
        assert sorted(answer[:1] for answer in answers).count(b"a") == 500


def test_an_endpoint_that_hangs(stack: contextlib.ExitStack, eventually: Eventually) -> None:
    """One that accepts and never reads holds up nobody else, and its descriptors are free when its client has gone."""
    proxy, hung, good = Proxy(stack), Endpoint(stack), Endpoint(stack, "g")
    proxy.serve(WEB, hung.text)
    client = proxy.connect()
    peer = hung.accept()
    client.setblocking(False)
    with contextlib.suppress(BlockingIOError):
        while True:
            client.send(b"x" * 65536)
    proxy.process.set(WEB, [good.text], 0)
    eventually(lambda: proxy.ask(timeout_s=0.5) == b"g?")
    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    client.close()  # with a reset
    eventually(lambda: open_sockets(proxy) == AT_REST)
    assert peer.fileno() >= 0


def open_sockets(proxy: Proxy) -> int:
    links = f"/proc/{proxy.process.pid}/fd"
    found = []
    for fd in os.listdir(links):
        with contextlib.suppress(FileNotFoundError):
            found.append(os.readlink(f"{links}/{fd}"))
    with open("/proc/net/unix") as sockets:  # whoever explains packets may ask there: it rests always
        table = [line.split()[6] for line in sockets if "testbed/userspace-proxy" in line]
    return sum(link.startswith("socket:") and link[8:-1] not in table for link in found)


def test_out_of_descriptors(stack: contextlib.ExitStack, eventually: Eventually) -> None:
    """Connections that find no descriptor wait, and are served when others end; kube-proxy is told; bytes go on moving."""
    proxy, server = Proxy(stack, open_files=200), Endpoint(stack, "g")
    proxy.serve(WEB, server.text)
    clients = [proxy.connect(timeout_s=20) for _ in range(100)]
    for client in clients:
        client.sendall(b"?")
    served = [c for c in clients[:40] if c.recv(10) == b"g?"]
    assert len(served) == 40
    [notice] = eventually(lambda: [n for n in proxy.notices if n.reason == "OutOfFileDescriptors"])
    assert "all of the 200 file descriptors are in use; new connections wait" in notice.message
    served[0].sendall(b"!")
    assert served[0].recv(10) == b"g!"
    late = clients[-1]
    late.setblocking(False)
    with pytest.raises(BlockingIOError):
        late.recv(10)
    for client in clients[:-1]:
        client.close()
    late.settimeout(10)
    assert late.recv(10) == b"g?"
    eventually(lambda: proxy.ask() == b"g?")


def test_killed_process_is_started_again(stack: contextlib.ExitStack, eventually: Eventually) -> None:
    """Killed with -9: connections break, one made meanwhile waits for the next process and is served; it is told."""
    proxy, server = Proxy(stack), Endpoint(stack, "g")
    proxy.serve(WEB, server.text)
    old = proxy.connect()
    old.sendall(b"a")
    assert old.recv(10) == b"ga"
    pid = proxy.process.pid
    os.kill(pid, signal.SIGKILL)
    assert proxy.ask(b"new") == b"gnew"
    assert read_all(old) == b""
    [notice] = eventually(lambda: list(proxy.notices))
    assert notice.reason == "UserspaceProxyDied" and "killed by signal 9" in notice.message
    assert proxy.process.pid not in (0, pid)


def udp_answerer(stack: contextlib.ExitStack) -> str:
    """Start an endpoint that answers each datagram with the port it came from; return ``address:port``."""
    server = stack.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
    server.setsockopt(socket.SOL_SOCKET, 33, 4 << 20)  # SO_RCVBUFFORCE
    server.bind(("127.0.0.1", 0))

    def answer() -> None:
        with contextlib.suppress(OSError):
            while True:
                data, peer = server.recvfrom(5000)
                server.sendto(b"%d %s" % (peer[1], data), peer)

    threading.Thread(target=answer, daemon=True).start()
    return f"127.0.0.1:{server.getsockname()[1]}"


def datagram(proxy: Proxy, client: socket.socket, text: bytes = b"?") -> bytes:
    client.settimeout(5)
    client.sendto(text, proxy.address)
    return client.recv(5000)


def test_udp_clients(stack: contextlib.ExitStack, eventually: Eventually) -> None:
    """A client keeps its backend socket while datagrams pass, and has another one after udpIdleTimeout without."""
    keeps, forgets = Proxy(stack, udp_idle_s=30.0), Proxy(stack, udp_idle_s=0.25)
    for proxy in (keeps, forgets):
        proxy.serve(DNS, udp_answerer(stack), udp_answerer(stack))
    one, two = (stack.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM)) for _ in range(2))
    first = datagram(keeps, one)
    assert datagram(keeps, one) == first != datagram(keeps, two)
    assert len(datagram(keeps, one, b"x" * 5000)) == 4096
    first = datagram(forgets, one)
    eventually(lambda: open_sockets(forgets) == AT_REST)
    assert datagram(forgets, one) != first


def test_udp_answers_come_from_the_address_that_was_asked(stack: contextlib.ExitStack) -> None:
    """With several addresses of the node, connection tracking would not know an answer from another one."""
    proxy = Proxy(stack)
    proxy.serve(DNS, udp_answerer(stack))
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
        client.settimeout(5)
        client.sendto(b"?", ("127.0.0.77", proxy.address[1]))
        assert client.recvfrom(100)[1] == ("127.0.0.77", proxy.address[1])


@pytest.mark.parametrize("count", [1000, pytest.param(10_000, marks=pytest.mark.slow)])
def test_many_udp_clients(stack: contextlib.ExitStack, eventually: Eventually, count: int) -> None:
    """Each of so many clients has an answer of its own endpoint socket, and all sockets are closed when they are quiet."""
    proxy = Proxy(stack, udp_idle_s=2.0)
    proxy.serve(DNS, udp_answerer(stack), udp_answerer(stack))
    clients = [socket.socket(socket.AF_INET, socket.SOCK_DGRAM) for _ in range(count)]
    try:
        answers = []
        for start in range(0, count, 250):  # no more at once than socket buffers hold
            group = clients[start : start + 250]
            for number, client in enumerate(group, start=start):
                client.settimeout(10)
                client.sendto(b"%d" % number, proxy.address)
            answers += [client.recv(100).split() for client in group]
    finally:
        for client in clients:
            client.close()
    assert [int(number) for _, number in answers] == list(range(count))
    assert len({port for port, _ in answers}) > count * 0.9  # the two endpoints may see the same port
    assert not proxy.notices
    eventually(lambda: open_sockets(proxy) == AT_REST, within_s=15)


def test_udp_out_of_descriptors(stack: contextlib.ExitStack, eventually: Eventually) -> None:
    """The clients that were quiet for longest make room for new ones, which is told."""
    proxy = Proxy(stack, open_files=150, udp_idle_s=30.0)
    proxy.serve(DNS, udp_answerer(stack))
    for _ in range(200):
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
            assert datagram(proxy, client).endswith(b" ?")
    [notice] = eventually(lambda: list(proxy.notices))
    assert "all file descriptors are in use: of UDP Service ns/dns:p53 the clients that were quiet" in notice.message
