"""Mininet, imported without what it does to a machine and without what it does not need.

`Mininet.init` rewrites the host's sysctls; marking it done keeps it from that. mininet.node imports ``distutils`` for
one version comparison of Open vSwitch: with setuptools' stand-in that costs 300 ms and 15 MiB, which every forked pod
would carry (and Python 3.12 has no distutils at all), so a stand-in of one class is put in its place for the import.
"""

from __future__ import annotations

import os
import sys
from types import ModuleType


def _import_without_distutils() -> None:
    if "distutils" in sys.modules:
        import mininet.net

        return
    package, module = ModuleType("distutils"), ModuleType("distutils.version")
    module.StrictVersion = str  # type: ignore[attr-defined]  # used by OVSSwitch alone, which we never make
    sys.modules.update({"distutils": package, "distutils.version": module})
    try:
        import mininet.net  # noqa: F401
    finally:
        del sys.modules["distutils"], sys.modules["distutils.version"]


_import_without_distutils()

from mininet.cli import CLI  # noqa: E402
from mininet.link import Intf, Link  # noqa: E402
from mininet.net import Mininet  # noqa: E402
from mininet.node import Host, Switch  # noqa: E402
from mininet.util import numCores  # noqa: E402

Mininet.inited = True
numCores.ncores = os.cpu_count()  # what it would grep from /proc/cpuinfo in a subprocess

__all__ = ["CLI", "Host", "Intf", "Link", "Mininet", "Switch"]
