"""Deletes connection tracking entries in the network namespace of the runner."""

from __future__ import annotations

from ipaddress import IPv4Address

from testbed.errors import CommandError
from testbed.kernel.runner import Runner


def delete_udp_flows(
    runner: Runner,
    *,
    destination: IPv4Address | None = None,
    port: int = 0,
    endpoint: IPv4Address | None = None,
) -> None:
    """Delete UDP entries by original destination or destination port, and by the address it was translated to.

    Deleting what is absent succeeds: conntrack(8) then ends with status 1 and says that it deleted 0 entries.
    """
    argv = ["conntrack", "-D"]
    argv += ["--orig-dst", str(destination)] if destination is not None else []
    argv += ["-p", "udp"]
    argv += ["--dport", str(port)] if port else []
    argv += ["--dst-nat", str(endpoint)] if endpoint is not None else []
    try:
        runner.run(argv)
    except CommandError as error:
        if "0 flow entries have been deleted" not in error.stderr:
            raise
