"""The image catalogue: which program stands behind the name of a container image.

::

    docker.io/library/nginx:1.17.1@sha256:…  ->  nginx  ->  the machine's nginx, set up as in the official image
    example.com/shop/cart:v3                 ->  (unknown)  ->  an echo server on the containerPorts: a stand-in

Registry prefixes, tags and digests are ignored. ``command`` and ``args`` override as in Kubernetes. Images whose default
program is a shell (busybox, alpine, debian, ubuntu) end at once unless they are given a command, as on a real cluster;
the client, netshoot and dnsutils images sleep, so that one can ``exec`` into them.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from testbed.errors import InputError
from testbed.programs.ingress.files import WAIT_SHUTDOWN
from testbed.programs.nginx import ARGV as NGINX_ARGV
from testbed.programs.nginx import nginx_files
from testbed.programs.openelb.gobgp import GOBGP_SCRIPT

# The grammar of image references: github.com/distribution/reference, regexp.go.
_DOMAIN = r"(?:[a-zA-Z0-9](?:[a-zA-Z0-9-]*[a-zA-Z0-9])?(?:\.[a-zA-Z0-9](?:[a-zA-Z0-9-]*[a-zA-Z0-9])?)*(?::[0-9]+)?/)?"
_COMPONENT = r"[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*"
_REFERENCE = re.compile(
    rf"{_DOMAIN}(?P<path>{_COMPONENT}(?:/{_COMPONENT})*)(?::\w[\w.-]{{0,127}})?"
    r"(?:@[A-Za-z][A-Za-z0-9]*(?:[-_+.][A-Za-z][A-Za-z0-9]*)*:[0-9a-fA-F]{32,})?",
    re.ASCII,
)
_PORT_FLAG = re.compile(r"--?(?:http-)?port|--?listen")
_UDP_PORT_FLAG = re.compile(r"--?udp-port")
_NUMBER = re.compile(r"(?:.*:)?([0-9]{1,5})")
_ECHO_PROGRAM = "echo-server"


class InvalidImageName(InputError):
    """An image reference that no registry could have."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PodInfo:
    """What a program may know about the pod and the container it runs in. ``ports``: protocol and number."""

    namespace: str
    pod: str
    node: str
    address: str
    ports: tuple[tuple[str, int], ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Program:
    """What to start: either ``argv``, or one of our own programs with its arguments (JSON values)."""

    argv: tuple[str, ...] = ()
    builtin: str = ""
    builtin_args: Mapping[str, object] = field(default_factory=dict)


BuiltinArgs = Callable[[str, Sequence[str], PodInfo], Mapping[str, object]]


def _no_arguments(_image: str, _argv: Sequence[str], _pod: PodInfo) -> Mapping[str, object]:
    return {}


def _no_files(_pod: PodInfo) -> Mapping[str, str]:
    return {}


@dataclass(frozen=True, slots=True, kw_only=True)
class Image:
    """What an image holds, as its Dockerfile would say it.

    ``builtin`` names the program of ours that runs when the command to run is ``program``.
    """

    name: str
    entrypoint: tuple[str, ...] = ()
    cmd: tuple[str, ...] = ()
    program: str = ""
    builtin: str = ""
    builtin_args: BuiltinArgs = _no_arguments
    stop_signal: str = "SIGTERM"
    env: Mapping[str, str] = field(default_factory=dict)
    files: Callable[[PodInfo], Mapping[str, str]] = _no_files
    own_folders: tuple[str, ...] = ()  # that belong to whoever the container runs as
    file_capabilities: tuple[str, ...] = ()  # of the program's file (setcap(8)): for users other than root
    cwd: str = "/"
    uid: int = 0
    is_stand_in: bool = False


def argv_of(image: Image, command: Sequence[str], args: Sequence[str]) -> tuple[str, ...]:
    """Return what a container runs: ``command`` replaces ENTRYPOINT and drops CMD, ``args`` replaces CMD.

    Source: Kubernetes docs, "Define a Command and Arguments for a Container".
    """
    if command:
        return (*command, *args)
    return (*image.entrypoint, *(args or image.cmd))


class Catalogue:
    """The images of a lab.

    Args:
        find_program: Returns the path of a program of the machine, or None; pods see the machine's files.
    """

    def __init__(self, find_program: Callable[[str], str | None] = shutil.which) -> None:
        self._find_program = find_program
        self._images = {name: image for image, names in _IMAGES for name in (image.name, *names)}

    def lookup(self, reference: str) -> Image:
        """Return the image behind a reference; for one that is not in the catalogue a stand-in of its name.

        Raises:
            InvalidImageName: In the words of the kubelet.
        """
        match = _REFERENCE.fullmatch(reference)
        if match is None:
            raise InvalidImageName(
                f'Failed to apply default image tag "{reference}": '
                f'couldn\'t parse image name "{reference}": '
                "invalid reference format"
            )
        path = match["path"]
        name = path.rpartition("/")[2]
        # "controller" says nothing without the folder before it: others have images of that name too.
        found = self._images.get("/".join(path.split("/")[-2:])) or self._images.get(name)
        return found or Image(
            name=name,
            entrypoint=(_ECHO_PROGRAM,),
            program=_ECHO_PROGRAM,
            builtin="echo",
            builtin_args=_stand_in_args,
            is_stand_in=True,
        )

    def program(
        self, image: Image, reference: str, command: Sequence[str], args: Sequence[str], pod: PodInfo
    ) -> Program:
        """Return what a container of an image runs. Without a command at all ``argv`` is empty.

        A stand-in has none of the image's programs: a command that the machine has too is run (``sleep 3600``), every
        other one becomes the echo server.
        """
        argv = argv_of(image, command, args)
        if image.builtin and argv:
            is_own = argv[0].rpartition("/")[2] == image.program
            if is_own or (image.is_stand_in and self._find_program(argv[0]) is None):
                return Program(builtin=image.builtin, builtin_args=image.builtin_args(reference, argv, pod))
        return Program(argv=argv)


def stands_in(image: Image, program: Program) -> bool:
    """Say whether the echo server runs in the place of an image that the catalogue does not know."""
    return image.is_stand_in and bool(program.builtin)


# --- our own programs' arguments -------------------------------------------------------------------------------------


def _identity(pod: PodInfo) -> dict[str, str]:
    return {"pod": pod.pod, "namespace": pod.namespace, "node": pod.node, "podIP": pod.address}


def _stand_in_args(reference: str, _argv: Sequence[str], pod: PodInfo) -> Mapping[str, object]:
    return {
        "ports": [list(port) for port in pod.ports],
        "identity": {**_identity(pod), "standInFor": reference},
    }


def _echo_args(*default_ports: tuple[str, int]) -> BuiltinArgs:
    """Return arguments of an echo image: ports by flags, else its containerPorts, else those of the real image."""

    def arguments(_reference: str, argv: Sequence[str], pod: PodInfo) -> Mapping[str, object]:
        ports: list[tuple[str, int]] = []
        text = ""
        words = iter(argv[1:])
        for word in words:
            flag, equals, value = word.partition("=")
            if not flag.startswith("-"):
                continue  # a subcommand: agnhost netexec
            if not equals and (_PORT_FLAG.fullmatch(flag) or _UDP_PORT_FLAG.fullmatch(flag) or flag.endswith("-text")):
                value = next(words, "")
            number = _NUMBER.fullmatch(value)
            if flag in ("-text", "--text"):
                text = value
            elif number and _UDP_PORT_FLAG.fullmatch(flag):
                ports.append(("UDP", int(number[1])))
            elif number and _PORT_FLAG.fullmatch(flag):
                ports.append(("TCP", int(number[1])))
        chosen = ports or pod.ports or default_ports
        args: dict[str, object] = {
            "ports": [list(port) for port in dict.fromkeys(chosen)],
            "identity": _identity(pod),
        }
        return {**args, "text": text} if text else args

    return arguments


def _argv_args(_reference: str, argv: Sequence[str], _pod: PodInfo) -> Mapping[str, object]:
    return {"argv": list(argv)}


def _coredns_args(_reference: str, argv: Sequence[str], pod: PodInfo) -> Mapping[str, object]:
    return {"argv": list(argv), "address": pod.address}


def _echo(name: str, *ports: tuple[str, int]) -> Image:
    return Image(
        name=name,
        entrypoint=(_ECHO_PROGRAM,),
        program=_ECHO_PROGRAM,
        builtin="echo",
        builtin_args=_echo_args(*ports),
    )


def _sleeping(name: str) -> Image:
    return Image(name=name, entrypoint=(name,), program=name, builtin="client")


_IMAGES: tuple[tuple[Image, tuple[str, ...]], ...] = (
    (
        Image(
            name="nginx",
            cmd=NGINX_ARGV,
            stop_signal="SIGQUIT",
            files=lambda pod: nginx_files(pod.namespace, pod.pod),
        ),
        (),
    ),
    (_echo("echo", ("TCP", 8080), ("UDP", 8080)), ("echo-server", "echoserver")),
    (_echo("agnhost", ("TCP", 8080), ("UDP", 8081)), ()),
    (_echo("http-echo", ("TCP", 5678)), ()),
    (_echo("whoami", ("TCP", 80)), ()),
    (Image(name="pause", entrypoint=("/pause",), program="pause", builtin="pause"), ()),
    (
        Image(
            name="kube-proxy",
            cmd=("/usr/local/bin/kube-proxy",),
            program="kube-proxy",
            builtin="kube-proxy",
            builtin_args=_argv_args,
        ),
        (),
    ),
    (
        Image(
            name="kube-webhook-certgen",
            entrypoint=("/kube-webhook-certgen",),
            program="kube-webhook-certgen",
            builtin="kube-webhook-certgen",
            builtin_args=_argv_args,
            uid=65532,  # distroless' nonroot
        ),
        (),
    ),
    (
        Image(
            name="coredns",
            entrypoint=("/coredns",),
            program="coredns",
            builtin="coredns",
            builtin_args=_coredns_args,
        ),
        (),
    ),
    (
        Image(
            name="openelb-controller",
            entrypoint=("openelb-controller",),
            program="openelb-controller",
            builtin="openelb-controller",
            builtin_args=_argv_args,
        ),
        (),
    ),
    (
        Image(
            name="openelb-speaker",
            entrypoint=("openelb-speaker",),
            program="openelb-speaker",
            builtin="openelb-speaker",
            builtin_args=_argv_args,
            files=lambda pod: {"/usr/local/bin/gobgp": GOBGP_SCRIPT},
        ),
        (),
    ),
    (
        Image(
            name="ingress-nginx/controller",
            cmd=("/nginx-ingress-controller",),
            program="nginx-ingress-controller",
            builtin="nginx-ingress-controller",
            builtin_args=_argv_args,
            uid=101,  # www-data of the real image
            files=lambda pod: {"/wait-shutdown": WAIT_SHUTDOWN},
            own_folders=("/etc/nginx",),
            file_capabilities=("NET_BIND_SERVICE",),
        ),
        (),
    ),
    (_sleeping("client"), ("netshoot", "dnsutils", "jessie-dnsutils")),
    (Image(name="curl", entrypoint=("curl",)), ()),
    (Image(name="iperf3", entrypoint=("iperf3",)), ()),
    (Image(name="busybox", cmd=("sh",)), ()),
    (Image(name="alpine", cmd=("/bin/sh",)), ()),
    (Image(name="debian", cmd=("bash",)), ("ubuntu",)),
)
