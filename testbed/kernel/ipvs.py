"""IPVS virtual and real servers of the network namespace this process is in, by pyroute2's netlink.

pyroute2 (its words are service and dest) finds the kernel's IPVS family and encodes the messages; they are sent in
batches. Real servers are read as the first ipvsadm did, by a socket option: one system call for each virtual server, a third of
the time that a netlink dump takes. /proc/net/ip_vs has all of them at once, but where several namespaces have virtual servers,
as here every node has, it leaves some out: it goes on after each page at a place that counts those of all namespaces, and looks
for that place among its own (ip_vs_info_seq_next, ip_vs_info_array).

Sources: linux/ip_vs.h; net/netfilter/ipvs/ip_vs_ctl.c.
"""

from __future__ import annotations

import errno
import socket
import struct
from collections.abc import Mapping
from functools import lru_cache
from itertools import takewhile
from types import TracebackType
from typing import Any, Final

from testbed.dataplane.ipvs import Balancing, Server, VirtualServer
from testbed.errors import KernelError, MissingFeature
from testbed.kernel import linux
from testbed.kernel.netlink import NetlinkSocket, Request, attributes
from testbed.kernel.pyroute2_messages import Shape

_NETLINK_GENERIC: Final = 16
_NEW_SERVICE, _SET_SERVICE, _DEL_SERVICE, _GET_SERVICE = 1, 2, 3, 4
_NEW_DEST, _SET_DEST, _DEL_DEST = 5, 6, 7
_SET_CONFIG, _FLUSH = 12, 17
_ATTR_SERVICE: Final = 1
_PERSISTENT, _SCHED_2 = 0x1, 0x10  # IP_VS_SVC_F_PERSISTENT; of mh: hash the port as well
_GENERIC_HEADER_BYTES: Final = 4
_PROTOCOLS: Final = {"tcp": 6, "udp": 17, "sctp": 132}
_NAMES: Final = {number: name for name, number in _PROTOCOLS.items()}
_REASONS: Final = {
    errno.ESRCH: "no such virtual server", errno.EEXIST: "it is there already",
    errno.ENOENT: "no such scheduler or real server",
}  # fmt: skip

#: In the places of an address and a port while a message's shape is encoded; neither occurs otherwise.
_ADDRESS, _PORT = b"\xfe\xed\xfa\xce", b"\xbe\xef"
_REAL_ADDRESS, _REAL_PORT = b"\xfa\xce\xfe\xed", b"\xef\xbe"
_WEIGHT: Final = 0x5EEDFACE

#: IP_VS_SO_GET_DESTS; its question, struct ip_vs_get_dests: protocol, address, port, firewall mark, room for how many; and each
#: struct ip_vs_dest_entry of the answer: address, port, weight, active and inactive connections. The kernel does not say how
#: many there are.
_GET_REALS: Final = 64 + 1024 + 64 + 4
_ASKED: Final = struct.Struct("=H2x4s2s2xII4x")
_REAL: Final = struct.Struct("=4s2s6xi8xII64x")
_NOBODY: Final = bytes(4)
_FEW: Final = 15

#: An address and port that no node uses (RFC 5737, TEST-NET-2): whether a scheduler is there is found out with it.
_PROBE: Final = VirtualServer("tcp", "198.51.100.0", 20000)


class Ipvs:
    """The IPVS of the network namespace that this was made in.

    Args:
        where: Names the namespace in error messages.

    Raises:
        MissingFeature: the kernel has no IPVS.
    """

    def __init__(self, where: str) -> None:
        self._family = find_family()
        self._netlink = NetlinkSocket(where, _NETLINK_GENERIC, _REASONS)
        self._asking = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self._answer = bytearray(_ASKED.size + _FEW * _REAL.size)

    def close(self) -> None:
        self._netlink.close()
        self._asking.close()

    def __enter__(self) -> Ipvs:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # -- requests --------------------------------------------------------------------------------------------------

    def add_server(self, key: VirtualServer, balancing: Balancing) -> Request:
        return self._server(_NEW_SERVICE, key, balancing, "add")

    def set_server(self, key: VirtualServer, balancing: Balancing) -> Request:
        return self._server(_SET_SERVICE, key, balancing, "change")

    def delete_server(self, key: VirtualServer) -> Request:
        """Remove a virtual server with its real servers; succeeds when it is gone already."""
        body = _named_shape(self._family, _DEL_SERVICE, key.protocol).fill(*_packed(key))
        return Request(self._family, 0, body, f"delete virtual server {key}", frozenset({errno.ESRCH}))

    def _server(self, command: int, key: VirtualServer, balancing: Balancing, verb: str) -> Request:
        body = _server_shape(self._family, command, key.protocol, balancing).fill(*_packed(key))
        return Request(self._family, 0, body, f"{verb} virtual server {key}")

    def add_real(self, key: VirtualServer, real: str, weight: int = 1) -> Request:
        return self._real(_NEW_DEST, key, real, weight, "add")

    def set_real(self, key: VirtualServer, real: str, weight: int) -> Request:
        return self._real(_SET_DEST, key, real, weight, "change")

    def delete_real(self, key: VirtualServer, real: str) -> Request:
        """Remove a real server; succeeds when it is gone already."""
        return self._real(_DEL_DEST, key, real, 0, "delete", frozenset({errno.ENOENT, errno.ESRCH}))

    def _real(
        self, command: int, key: VirtualServer, real: str, weight: int, verb: str, ignore: frozenset[int] = frozenset()
    ) -> Request:
        address, _, port = real.partition(":")
        body = _real_shape(self._family, command, key.protocol).fill(
            *_packed(key), socket.inet_aton(address), struct.pack(">H", int(port)), struct.pack("=I", weight)
        )
        return Request(self._family, 0, body, f"{verb} real server {real} of {key}", ignore)

    # -- the kernel ------------------------------------------------------------------------------------------------

    @property
    def netlink(self) -> NetlinkSocket:
        """Where the requests are to be sent."""
        return self._netlink

    def list_servers(self) -> dict[VirtualServer, Server]:
        """Return every virtual server with its real ones; those of firewall marks are not kube-proxy's and left out.

        Raises:
            KernelError: they cannot be read.
        """
        body = _command(_GET_SERVICE)
        found = {}
        for answer in self._netlink.dump(self._family, body, "list virtual servers"):
            service = _service_of(answer)
            if service is not None:
                key, balancing = service
                found[key] = Server(balancing, {real: weight for real, weight, _ in self._real_servers(key)})
        return found

    def count_connections(self, key: VirtualServer) -> dict[str, int]:
        """Return how many connections, active and inactive, each real server of a virtual server has; none when it is gone.

        Raises:
            KernelError: they cannot be read.
        """
        return {real: connections for real, _, connections in self._real_servers(key)}

    def _real_servers(self, key: VirtualServer) -> list[tuple[str, int, int]]:
        """Return address, weight and number of connections of each real server; none when the virtual server is gone."""
        while True:
            answer = self._answer
            answer[:] = bytes(len(answer))
            room = (len(answer) - _ASKED.size) // _REAL.size
            address, port = _packed(key)
            _ASKED.pack_into(answer, 0, _PROTOCOLS[key.protocol], address, port, 0, room)
            try:
                linux.getsockopt(self._asking.fileno(), socket.IPPROTO_IP, _GET_REALS, answer)
            except OSError as error:
                if error.errno == errno.ESRCH:
                    return []
                what = f"could not list real servers of {key}: {error.strerror}"
                raise KernelError(f"{self._netlink.where}: {what}") from error
            entries = _REAL.iter_unpack(memoryview(answer)[_ASKED.size :])
            found = [
                (f"{socket.inet_ntoa(real)}:{int.from_bytes(port, 'big')}", weight, active + inactive)
                for real, port, weight, active, inactive in takewhile(lambda entry: entry[0] != _NOBODY, entries)
            ]
            if len(found) < room:
                return found
            self._answer = bytearray(_ASKED.size + 2 * room * _REAL.size)  # there may be more

    def set_timeouts(self, tcp_s: int = 0, tcp_fin_s: int = 0, udp_s: int = 0) -> None:
        """Set how long idle connections are kept, as ``ipvsadm --set`` does; 0 leaves a value as it is.

        Raises:
            KernelError: the kernel refused.
        """
        values = struct.pack("=" + "HHI" * 3, 8, 4, tcp_s, 8, 5, tcp_fin_s, 8, 6, udp_s)
        self._netlink.send([Request(self._family, 0, _command(_SET_CONFIG) + values, "set IPVS timeouts")])

    def flush(self) -> None:
        """Remove every virtual server.

        Raises:
            KernelError: the kernel refused.
        """
        self._netlink.send([Request(self._family, 0, _command(_FLUSH), "remove all virtual servers")])

    def probe_scheduler(self, scheduler: str) -> None:
        """Return when the kernel has a scheduler; it is asked by adding a virtual server, which loads its module.

        Raises:
            MissingFeature: it has not.

        Source: kubernetes pkg/proxy/ipvs/proxier.go, CanUseIPVSProxier (v1.30).
        """
        request = self.add_server(_PROBE, Balancing(scheduler, 0, scheduler == "mh"))
        for refusal in self._netlink.try_send([request]):
            if refusal.number == errno.EEXIST:
                continue  # left behind by one that was killed while it asked
            if refusal.number == errno.ENOENT:
                raise MissingFeature(
                    f"the kernel has no IPVS scheduler {scheduler!r} (tried to load module ip_vs_{scheduler}): "
                    "set ipvs.scheduler to one that it has, such as rr"
                )
            raise self._netlink.error([request], refusal)
        self._netlink.send([self.delete_server(_PROBE)])


def find_family() -> int:
    """Return the number of the kernel's IPVS netlink family.

    Raises:
        MissingFeature: the kernel has no IPVS.
    """
    from pyroute2.netlink.exceptions import NetlinkError
    from pyroute2.netlink.generic.ipvs import IPVSSocket

    try:
        with IPVSSocket() as found:
            return int(found.prid)
    except NetlinkError as error:
        if error.code != errno.ENOENT:
            raise KernelError(f"could not ask for the kernel's IPVS: {error}") from error
        raise MissingFeature(
            "the kernel has no IPVS (module ip_vs): `modprobe ip_vs` as root, or use another proxy mode"
        ) from None


def _command(command: int) -> bytes:
    return struct.pack("=BBH", command, 1, 0)


def _packed(key: VirtualServer) -> tuple[bytes, bytes]:
    return socket.inet_aton(key.address), struct.pack(">H", key.port)


def _message(command: int, **parts: Mapping[str, Any]) -> Any:
    from pyroute2.netlink.generic.ipvs import ipvsmsg

    message = ipvsmsg()
    message["cmd"], message["version"] = command, 1
    message["attrs"] = [
        [f"IPVS_CMD_ATTR_{part}", {"attrs": [[f"IPVS_{prefix}_ATTR_{name}", value] for name, value in values.items()]}]
        for part, values in parts.items()
        for prefix in ("SVC" if part == "SERVICE" else "DEST",)
    ]
    return message


def _name_attributes(protocol: str) -> dict[str, Any]:
    return {
        "AF": socket.AF_INET,
        "PROTOCOL": _PROTOCOLS[protocol],
        "ADDR": socket.inet_ntoa(_ADDRESS),
        "PORT": int.from_bytes(_PORT, "big"),
    }


@lru_cache(maxsize=64)
def _named_shape(family: int, command: int, protocol: str) -> Shape:
    return Shape(_message(command, SERVICE=_name_attributes(protocol)), family, [_ADDRESS, _PORT])


@lru_cache(maxsize=256)
def _server_shape(family: int, command: int, protocol: str, balancing: Balancing) -> Shape:
    flags = (_PERSISTENT if balancing.persistence_s else 0) | (_SCHED_2 if balancing.by_port else 0)
    service = {
        **_name_attributes(protocol),
        "SCHED_NAME": balancing.scheduler,
        "FLAGS": {"flags": flags, "mask": 0xFFFFFFFF},
        "TIMEOUT": balancing.persistence_s,
        "NETMASK": "255.255.255.255",
    }
    return Shape(_message(command, SERVICE=service), family, [_ADDRESS, _PORT])


@lru_cache(maxsize=64)
def _real_shape(family: int, command: int, protocol: str) -> Shape:
    real = {
        "ADDR_FAMILY": socket.AF_INET,
        "ADDR": socket.inet_ntoa(_REAL_ADDRESS),
        "PORT": int.from_bytes(_REAL_PORT, "big"),
        "FWD_METHOD": 0,  # masquerading
        "WEIGHT": _WEIGHT,
        "U_THRESH": 0,
        "L_THRESH": 0,
    }
    markers = [_ADDRESS, _PORT, _REAL_ADDRESS, _REAL_PORT, struct.pack("=I", _WEIGHT)]
    return Shape(_message(command, SERVICE=_name_attributes(protocol), DEST=real), family, markers)


def _service_of(answer: bytes) -> tuple[VirtualServer, Balancing] | None:
    """Read one virtual server of a dump; None for one that goes by a firewall mark or has another address family."""
    values = dict(attributes(dict(attributes(answer[_GENERIC_HEADER_BYTES:])).get(_ATTR_SERVICE, b"")))
    if 3 not in values or struct.unpack("=H", values[1])[0] != socket.AF_INET:
        return None
    protocol = _NAMES.get(struct.unpack("=H", values[2])[0])
    if protocol is None:
        return None
    (flags,) = struct.unpack_from("=I", values[7])
    (timeout,) = struct.unpack("=I", values[8])
    key = VirtualServer(protocol, socket.inet_ntoa(values[3][:4]), int.from_bytes(values[4][:2], "big"))
    scheduler = values[6].rstrip(b"\0").decode()
    return key, Balancing(scheduler, timeout if flags & _PERSISTENT else 0, bool(flags & _SCHED_2))
