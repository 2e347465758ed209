"""The image catalogue: names, default programs, overrides, stand-ins, and nginx's own files."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from testbed.programs.catalogue import Catalogue, InvalidImageName, PodInfo, Program, argv_of, stands_in

POD = PodInfo(namespace="dev", pod="web-1", node="node1", address="10.244.1.5", ports=(("TCP", 8080), ("UDP", 53)))
NO_PORTS = PodInfo(namespace="dev", pod="web-1", node="node1", address="10.244.1.5")
IDENTITY = {"pod": "web-1", "namespace": "dev", "node": "node1", "podIP": "10.244.1.5"}


@pytest.fixture
def catalogue() -> Catalogue:
    """A catalogue on a machine that has sleep and nothing else."""
    return Catalogue(find_program=lambda name: "/bin/sleep" if name == "sleep" else None)


def program(
    catalogue: Catalogue,
    reference: str,
    pod: PodInfo = POD,
    *,
    command: tuple[str, ...] = (),
    args: tuple[str, ...] = (),
) -> Program:
    return catalogue.program(catalogue.lookup(reference), reference, command, args, pod)


@pytest.mark.parametrize(
    ("reference", "name"),
    [
        ("nginx", "nginx"),
        ("nginx:1.17.1", "nginx"),
        ("docker.io/library/nginx:1.17.1@sha256:" + "ab" * 32, "nginx"),
        ("localhost:5000/nginx", "nginx"),
        ("registry.example.com:5000/a/b-c/nginx:v1_x.y", "nginx"),
        ("registry.k8s.io/kube-proxy:v1.30.0", "kube-proxy"),
        ("hashicorp/http-echo", "http-echo"),
        ("nicolaka/netshoot", "client"),
        ("nginxinc/nginx-unprivileged", "nginx-unprivileged"),
    ],
)
def test_registry_tag_and_digest_do_not_matter(catalogue: Catalogue, reference: str, name: str) -> None:
    """An image is known by the last word of its path."""
    assert catalogue.lookup(reference).name == name


@pytest.mark.parametrize(
    "reference", ["", "NGINX", "nginx:", "nginx::1", "nginx:-x", "a b", "nginx@sha256:12", "/nginx", "nginx/", "a//b",
                  "nginx;reboot", "$(id)", "../nginx", "nginx\n"],
)  # fmt: skip
def test_impossible_names_are_refused(catalogue: Catalogue, reference: str) -> None:
    """What no registry could hold is refused in the kubelet's words, and never becomes a stand-in."""
    with pytest.raises(InvalidImageName, match="invalid reference format") as caught:
        catalogue.lookup(reference)
    words = f'Failed to apply default image tag "{reference}": ' + "couldn't parse image name"
    assert str(caught.value).startswith(words)


@pytest.mark.parametrize(
    ("command", "args", "wanted"),
    [
        ((), (), ("nginx", "-g", "daemon off;")),
        (("sleep",), (), ("sleep",)),
        (("sleep",), ("9",), ("sleep", "9")),
        ((), ("nginx-debug",), ("nginx-debug",)),
    ],
)
def test_command_replaces_entrypoint_and_drops_cmd(
    catalogue: Catalogue, command: tuple[str, ...], args: tuple[str, ...], wanted: tuple[str, ...]
) -> None:
    """command and args override as Kubernetes' table says, for an image that has CMD only."""
    assert argv_of(catalogue.lookup("nginx"), command, args) == wanted


def test_args_follow_an_entrypoint(catalogue: Catalogue) -> None:
    """args replace CMD and keep ENTRYPOINT."""
    assert program(catalogue, "networkstatic/iperf3", args=("-s",)).argv == ("iperf3", "-s")


@pytest.mark.parametrize(
    ("reference", "args", "ports"),
    [
        ("echo", (), [["TCP", 8080], ["UDP", 53]]),
        ("registry.k8s.io/e2e-test-images/agnhost:2.45", ("netexec", "--http-port=8083", "--udp-port", "8084"),
         [["TCP", 8083], ["UDP", 8084]]),
        ("hashicorp/http-echo", ("-listen=:9000",), [["TCP", 9000]]),
        ("traefik/whoami", ("--port", "8000"), [["TCP", 8000]]),
    ],
)  # fmt: skip
def test_echo_images_listen_where_they_are_told(
    catalogue: Catalogue, reference: str, args: tuple[str, ...], ports: list[list[object]]
) -> None:
    """Flags of the real images win over containerPorts."""
    made = program(catalogue, reference, args=args)
    assert (made.builtin, made.builtin_args) == ("echo", {"ports": ports, "identity": IDENTITY})


@pytest.mark.parametrize(
    ("reference", "ports"),
    [
        ("echo", [["TCP", 8080], ["UDP", 8080]]),
        ("hashicorp/http-echo", [["TCP", 5678]]),
        ("traefik/whoami", [["TCP", 80]]),
    ],
)
def test_echo_images_have_the_real_images_port(catalogue: Catalogue, reference: str, ports: list[list[object]]) -> None:
    """Without containerPorts an echo image listens where the real one does."""
    assert program(catalogue, reference, NO_PORTS).builtin_args["ports"] == ports


def test_http_echo_answers_its_text(catalogue: Catalogue) -> None:
    """-text reaches the program, in both spellings."""
    for args in (("-text=hello",), ("-text", "hello")):
        assert program(catalogue, "hashicorp/http-echo", args=args).builtin_args["text"] == "hello"


def test_an_unknown_image_gets_a_stand_in_on_its_ports(catalogue: Catalogue) -> None:
    """The echo server runs in the place of an unknown image and knows for which."""
    image = catalogue.lookup("example.com/cart:v3")
    made = program(catalogue, "example.com/cart:v3")
    assert stands_in(image, made)
    assert made.builtin_args == {
        "ports": [["TCP", 8080], ["UDP", 53]],
        "identity": {**IDENTITY, "standInFor": "example.com/cart:v3"},
    }


def test_a_stand_in_runs_what_the_machine_has(catalogue: Catalogue) -> None:
    """A command of an unknown image is run if the machine has it; else it was the image's own, and echo stands in."""
    image = catalogue.lookup("example.com/cart:v3")
    sleeping = program(catalogue, "example.com/cart:v3", command=("sleep", "3600"))
    serving = program(catalogue, "example.com/cart:v3", command=("/app/cart",), args=("--fast",))
    assert sleeping == Program(argv=("sleep", "3600"))
    assert not stands_in(image, sleeping)
    assert serving.builtin == "echo"
    assert stands_in(image, serving)


@pytest.mark.parametrize("name", ["client", "nicolaka/netshoot", "dnsutils"])
def test_client_images_sleep(catalogue: Catalogue, name: str) -> None:
    """The images that one execs into stay, and still run a command that they are given."""
    assert program(catalogue, name).builtin == "client"
    assert program(catalogue, name, command=("curl", "-s", "web")).argv == ("curl", "-s", "web")


@pytest.mark.parametrize(
    ("name", "argv"), [("busybox:1.36", ("sh",)), ("alpine", ("/bin/sh",)), ("ubuntu:24.04", ("bash",))]
)
def test_shell_images_have_their_real_default(catalogue: Catalogue, name: str, argv: tuple[str, ...]) -> None:
    """A shell without a terminal ends at once, as on a real cluster."""
    assert program(catalogue, name) == Program(argv=argv)


def test_kube_proxy_gets_its_command_line(catalogue: Catalogue) -> None:
    """The command of kubeadm's DaemonSet is our program with those words."""
    made = program(catalogue, "registry.k8s.io/kube-proxy:v1.30.0", command=("/usr/local/bin/kube-proxy", "--v=2"))
    assert (made.builtin, made.builtin_args) == ("kube-proxy", {"argv": ["/usr/local/bin/kube-proxy", "--v=2"]})


def test_nginx_stops_gracefully_and_says_who_it_is(catalogue: Catalogue) -> None:
    """nginx has STOPSIGNAL SIGQUIT, the official layout, and the header that names the pod."""
    image = catalogue.lookup("nginx")
    files = image.files(POD)
    assert image.stop_signal == "SIGQUIT"
    assert 'X-Served-By  "dev/web-1"' in files["/etc/nginx/nginx.conf"]
    assert "listen       80;" in files["/etc/nginx/conf.d/default.conf"]
    assert "<h1>Welcome to nginx!</h1>" in files["/usr/share/nginx/html/index.html"]


@pytest.mark.skipif(shutil.which("nginx") is None, reason="needs nginx (apt: nginx-light)")
def test_nginx_takes_its_configuration(catalogue: Catalogue, tmp_path: Path) -> None:
    """`nginx -t` accepts the files, moved below a folder so that the machine's own stay out of it."""
    files = catalogue.lookup("nginx").files(POD)
    for path, text in files.items():
        moved = re.sub(r"(?<=[\s;])/(etc/nginx/(?!mime)|usr/share|run/)", rf"{tmp_path}/\1", text)
        moved = moved.replace("listen       80", f"listen       unix:{tmp_path}/socket").replace(
            "/dev/std", f"{tmp_path}/std"
        )
        (tmp_path / path[1:]).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path[1:]).write_text(moved)
    (tmp_path / "run").mkdir()
    temporary = "".join(
        f"{kind}_temp_path {tmp_path}/{kind};" for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    main = tmp_path / "etc/nginx/nginx.conf"
    main.write_text(main.read_text().replace("http {", f"http {{ {temporary}"))
    checked = subprocess.run(
        ["nginx", "-t", "-e", f"{tmp_path}/stderr", "-c", str(main)], capture_output=True, text=True, timeout=20
    )
    assert checked.returncode == 0, checked.stderr
