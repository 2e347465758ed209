"""The main loop of a DNS pod, in virtual time: what is written when, a dnsmasq that ends, a Corefile that changes."""

# ruff: noqa: E501  # whole messages, in tables

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from dns_model import endpoint, endpoint_slice, namespace, port, service

from testbed.dataplane.corefile import DnsConfig, parse_corefile
from testbed.dataplane.dns import Zone
from testbed.errors import InputError, KernelError
from testbed.lab.cluster_dns import corefile
from testbed.model.dns import RecordType
from testbed.programs import dns as program
from testbed.programs.dns import ClusterDns, Ended, is_remarkable, parse_command
from testbed.programs.dns_responder import Responder
from testbed.programs.kube_proxy import Changed, Listed

SERVICES, SLICES, NAMESPACES, PODS = "services", "endpointslices.discovery.k8s.io", "namespaces", "pods"
COREFILE = corefile("cluster.local")


class FakeDnsmasq:
    """A `Dnsmasq` without a process: reads its hosts file in `reading_s` of virtual time, and refuses what it is told to."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._hosts = ""
        self.hosts_file = "/hosts"
        self.pid = 0
        self.configurations: list[str] = []
        self.refuses = ""
        self.shown: list[str] = []
        self.reading_s = 0.0
        self.last_reload_s = 0.0
        self.is_answering = True

    def configure(self, text: str) -> None:
        if self.refuses and self.refuses in text:
            raise KernelError(f"dnsmasq refuses its configuration: {self.refuses}")
        self.configurations.append(text)

    def start(self) -> None:
        self.pid += 1

    def stop(self) -> None:
        self._world.ended.append(Ended(self.pid, -9))

    def show(self, hosts: str) -> bool:
        if hosts == self._hosts:
            return False
        self._hosts = hosts
        self.shown.append(hosts)
        return True

    def wait_until_read(self) -> bool:
        if not self.is_answering:
            return False
        self._world.now_s += self.reading_s
        self.last_reload_s = self.reading_s
        return True


class World:
    def __init__(self) -> None:
        self.now_s = 100.0
        self.ended: list[Ended] = []
        self.logged: list[str] = []
        self.watched: list[str] = []
        self.dnsmasq = FakeDnsmasq(self)
        config = self.read(COREFILE)
        self.responder = Responder(Zone(config.zone), config)
        self.dns = ClusterDns(
            config, COREFILE, self.dnsmasq, self.responder,  # type: ignore[arg-type]
            addresses=("10.244.1.2",), log=self.logged.append, on_watch=self.watched.append, clock=lambda: self.now_s,
        )  # fmt: skip
        self.dns.start()

    def read(self, text: str) -> DnsConfig:
        return parse_corefile(text, read_file=lambda path: "nameserver 192.168.93.53\n")

    def list_everything(self) -> None:
        self.accept(
            Listed(NAMESPACES, (namespace("dev"),)), Listed(SERVICES, (web("10.96.0.1"),)), Listed(SLICES, ())
        )  # fmt: skip

    def accept(self, *messages: Any) -> None:
        self.dns.accept(messages)
        self.dns.step()

    def wait(self) -> float:
        """Let the time pass that the loop would sleep, and step; return how long that was."""
        waited = self.dns.wait_s()
        self.now_s += waited
        self.dns.step()
        return waited

    def knows(self, name: str) -> bool:
        return bool(
            self.responder.read(lambda zone: zone.answer(f"{name}.dev.svc.cluster.local", RecordType.A).records)
        )


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> World:
    found = World()

    def sleep(seconds: float) -> None:
        found.now_s += seconds

    monkeypatch.setattr(program.time, "sleep", sleep)
    return found


def web(address: str) -> dict[str, Any]:
    return service("web", clusterIP=address, clusterIPs=[address], ports=[port("http", 80)])


def test_nothing_is_shown_before_everything_was_listed(world: World) -> None:
    """Half a list would look like names that are gone."""
    world.accept(Listed(SERVICES, (web("10.96.0.1"),)))
    world.accept(Listed(NAMESPACES, (namespace("dev"),)))
    assert (world.dnsmasq.shown, world.dns.is_ready) == ([], False)
    world.accept(Listed(SLICES, ()))
    assert world.dnsmasq.shown == ["10.96.0.1 web.dev.svc.cluster.local\n"]
    assert world.dns.is_ready


def test_an_empty_cluster_is_ready_too(world: World) -> None:
    """With nothing to show, dnsmasq is still waited for."""
    world.accept(*(Listed(resource, ()) for resource in (SERVICES, SLICES, NAMESPACES)))
    assert world.dns.is_ready


def test_what_comes_together_is_read_once(world: World) -> None:
    """A burst of changes is one reading; the responder knows all of it at once."""
    world.list_everything()
    endpoints = endpoint_slice("db", endpoint("10.244.0.1"))
    db = service("db", clusterIP="None", clusterIPs=["None"], ports=[port("http", 80)])
    world.accept(
        Changed(SERVICES, False, db), Changed(SLICES, False, endpoints), Changed(SERVICES, True, web("10.96.0.1"))
    )
    assert len(world.dnsmasq.shown) == 2
    assert world.dnsmasq.shown[-1] == "10.244.0.1 10-244-0-1.db.dev.svc.cluster.local db.dev.svc.cluster.local\n"


def test_dnsmasq_is_given_time_to_answer(world: World) -> None:
    """After a reading that took long, the next waits; meanwhile the responder knows already, and nothing is lost."""
    world.dnsmasq.reading_s = 0.1
    world.list_everything()
    world.accept(Changed(SERVICES, False, web("10.96.0.2")))
    world.accept(Changed(SERVICES, False, web("10.96.0.3")))
    assert len(world.dnsmasq.shown) == 1
    assert world.knows("web")
    assert world.wait() == pytest.approx(0.2)
    assert world.dnsmasq.shown[1:] == ["10.96.0.3 web.dev.svc.cluster.local\n"]


def test_changes_that_the_hosts_file_does_not_show(world: World) -> None:
    """An ExternalName is the responder's alone: dnsmasq is not disturbed."""
    world.list_everything()
    world.accept(Changed(SERVICES, False, service("x", type="ExternalName", externalName="a.example.com")))
    assert len(world.dnsmasq.shown) == 1
    assert world.knows("x")


def test_a_dnsmasq_that_ends_is_started_again(world: World) -> None:
    """At once, unless it had just started; an end that was told late, of an earlier one, means nothing."""
    world.list_everything()
    world.now_s += 10
    before = world.now_s
    world.accept(Ended(1, -9))
    assert (world.dnsmasq.pid, world.now_s) == (2, before)
    world.accept(Ended(1, -9))
    assert world.dnsmasq.pid == 2
    world.accept(Ended(2, 2))
    assert (world.dnsmasq.pid, world.now_s) == (3, before + 0.5)
    assert world.logged == [
        "dnsmasq ended with status -9; starting it again", "dnsmasq ended with status 2; starting it again",
    ]  # fmt: skip


def test_not_ready_as_long_as_dnsmasq_does_not_answer(world: World) -> None:
    """A dnsmasq that never answers makes no ready pod; the next one may."""
    world.dnsmasq.is_answering = False
    world.list_everything()
    assert not world.dns.is_ready
    world.dnsmasq.is_answering = True
    world.accept(Ended(1, 2))
    assert world.dns.is_ready


def test_a_dnsmasq_that_reads_late_is_asked_again(world: World) -> None:
    """Its pod becomes ready without any object having changed; between two looks it is left alone."""
    world.dnsmasq.is_answering = False
    world.list_everything()
    assert not world.dns.is_up_to_date
    assert world.wait() == pytest.approx(0.4)
    assert not world.dns.is_ready
    world.dnsmasq.is_answering = True
    world.wait()
    assert world.dns.is_ready
    assert world.dns.is_up_to_date
    assert len(world.dnsmasq.shown) == 1


@pytest.mark.parametrize(
    ("line", "is_said"),
    [
        ("dnsmasq[7]: started, version 2.90 cache disabled\n", False),
        ("dnsmasq[7]: compile time options: IPv6 GNU-getopt DBus\n", False),
        ("dnsmasq[7]: using nameserver 127.0.0.1#5355 for domain cluster.local \n", False),
        ("dnsmasq[7]: using only locally-known addresses for serial.testbed\n", False),
        ("dnsmasq[7]: read /run/coredns/hosts - 6 names\n", False),
        (
            "dnsmasq[7]: LOUD WARNING: listening on 100.78.183.194 may accept requests via interfaces other than eth0\n",
            False,
        ),
        ("dnsmasq[7]: query[A] 6.serial.testbed from 127.0.0.1\n", False),
        ("dnsmasq[7]: query[A] web.dev.svc.cluster.local from 10.244.1.7\n", True),
        ("dnsmasq[7]: /run/coredns/hosts web.dev.svc.cluster.local is 10.96.1.1\n", True),
        ("dnsmasq[7]: query[A] using.serial.testbed.example.com from 10.244.1.7\n", True),
        ("dnsmasq[7]: Maximum number of concurrent DNS queries reached (max: 2000)\n", True),
        ("dnsmasq[7]: failed to load names from /run/coredns/hosts: No such file or directory\n", True),
        ("\n", True),
        ("dnsmasq: failed to create listening socket for 10.244.1.3: Address already in use\n", True),
    ],
)
def test_what_dnsmasq_says_that_belongs_into_the_log(line: str, is_said: bool) -> None:
    assert is_remarkable(line) is is_said


def follow(world: World, change: Callable[[str], str]) -> None:
    world.dns.follow(change(COREFILE), world.read)
    messages, world.ended = world.ended, []
    world.accept(*messages)


def test_another_ttl(world: World) -> None:
    """dnsmasq is started anew with it, and the responder uses it."""
    world.list_everything()
    world.now_s += 10
    follow(world, lambda text: text.replace("ttl 30", "ttl 7"))
    assert "local-ttl=7" in world.dnsmasq.configurations[-1]
    assert world.dnsmasq.pid == 2
    answer = world.responder.read(lambda zone: zone.answer("web.dev.svc.cluster.local", RecordType.A))
    assert answer.records[0].ttl == 7
    assert world.logged[0] == "[INFO] Reloading complete"


def test_pods_are_watched_when_they_are_to_be_verified(world: World) -> None:
    """Nobody watches pods before that."""
    world.list_everything()
    assert PODS not in world.watched
    follow(world, lambda text: text.replace("pods insecure", "pods verified"))
    assert world.watched == [SERVICES, SLICES, NAMESPACES, PODS]
    assert world.dnsmasq.pid == 1  # which knows nothing of pods


@pytest.mark.parametrize(
    ("change", "refuses", "said"),
    [
        (("ttl 30", "ttl x"), "", "[ERROR] Restart failed: Corefile:10 - Error during parsing: plugin/kubernetes: ttl must be in range [0, 3600]: x"),
        (("ttl 30", "ttl 8"), "local-ttl=8", "[ERROR] Restart failed: dnsmasq refuses its configuration: local-ttl=8"),
    ],
)  # fmt: skip
def test_a_corefile_that_is_refused(world: World, change: tuple[str, str], refuses: str, said: str) -> None:
    """By us or by dnsmasq: it is said once, and the old configuration stays."""
    world.list_everything()
    world.dnsmasq.refuses = refuses
    for _ in range(3):
        follow(world, lambda text: text.replace(*change))
    assert world.logged == [said]
    assert world.dns.config.zone.ttl == 30
    assert world.dnsmasq.pid == 1


def test_the_command_line() -> None:
    """CoreDNS' own flags; anything else is refused."""
    env = {"TESTBED_API_SOCKET": "/api.sock"}
    assert parse_command(["/coredns", "-conf", "/etc/coredns/Corefile"], env) == {
        "corefile": "/etc/coredns/Corefile", "api_socket": "/api.sock",
    }  # fmt: skip
    assert parse_command(["coredns", "--conf=/c", "-quiet", "-dns.port", "53"], env)["corefile"] == "/c"
    for argv, given, problem in (
        (["coredns", "-x"], env, "coredns: flag provided but not defined: -x"),
        (["coredns", "-dns.port=1053"], env, "coredns: only port 53 is served here, got '1053'"),
        (["coredns"], {}, "coredns: TESTBED_API_SOCKET is not set: mount the API's folder, as Deployment coredns does"),
    ):
        with pytest.raises(InputError) as caught:
            parse_command(argv, given)
        assert str(caught.value) == problem
