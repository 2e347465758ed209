"""tools/provision.sh in a clean Debian 12 root: apt, pip and all; then the command that came of it.

The short form, with the same script in an overlay over this machine, is tests/unit/test_provision.py. A mirror must be in reach;
TESTBED_DEBIAN_MIRROR names another one, TESTBED_DEBOOTSTRAP_CACHE a folder in which the packages of debootstrap are kept.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PROJECT = Path(__file__).parents[2]
sys.path.insert(0, str(PROJECT / "tools"))

import vagrant_box  # noqa: E402
from vagrant_steps import StepFailed, Steps  # noqa: E402

pytestmark = [pytest.mark.root, pytest.mark.slow, pytest.mark.timeout(1800)]

NOT_COPIED = shutil.ignore_patterns(".git", ".venv", "reports", "*.egg-info", "__pycache__", ".*_cache", ".hypothesis")
HOME = "/home/vagrant/testbed"
# "$1" is the root, the rest is run in it; mounts end with the namespace
ENTER = """
mount -t proc proc "$1/proc" && mount --rbind /dev "$1/dev" && cp -L /etc/resolv.conf "$1/etc/resolv.conf" && exec chroot "$@"
"""


@pytest.fixture(scope="module")
def steps(tmp_path_factory: pytest.TempPathFactory) -> Steps:
    """Steps with their logs in a folder."""
    return Steps(logs=tmp_path_factory.mktemp("logs"))


@pytest.fixture(scope="module")
def root(steps: Steps, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A minimal Debian 12 with the project in it."""
    if shutil.which("debootstrap") is None:
        pytest.skip("debootstrap is not installed (Debian package debootstrap)")
    folder = tmp_path_factory.mktemp("debian") / "root"
    cache = os.environ.get("TESTBED_DEBOOTSTRAP_CACHE")
    mirror = vagrant_box.find_mirror()
    try:
        vagrant_box.debootstrap(steps, folder, ("ca-certificates",), mirror, Path(cache) if cache else None)
    except StepFailed as error:
        if "InRelease" in str(error) or "Release" in str(error):
            pytest.skip(f"no Debian mirror in reach: {mirror.main}")
        raise
    vagrant_box.carry_site(folder, mirror)
    shutil.copytree(PROJECT, folder / HOME.lstrip("/"), ignore=NOT_COPIED, symlinks=True)
    (folder / "home/vagrant").chmod(0o700)
    inside(steps, folder, "update-ca-certificates")
    yield folder
    shutil.rmtree(folder)


def inside(steps: Steps, root: Path, *words: str, limit_s: float = 300) -> str:
    """Run a program in the root, with namespaces that end everything it leaves; return what it printed."""
    return steps.run(vagrant_box.in_build(["sh", "-c", ENTER, "sh", root, *words]), limit_s=limit_s, log="inside")


def test_provisioned_from_nothing(steps: Steps, root: Path) -> None:
    """The script makes a clean Debian ready; `testbed` is there for everybody; a second time nothing is done."""
    first = inside(steps, root, f"{HOME}/tools/provision.sh", HOME, limit_s=1500)
    assert first.splitlines()[-1] == f"provision: ready: cd {HOME} && sudo ./dev demo"
    assert inside(steps, root, "testbed", "--version").startswith("testbed, version ")
    assert inside(steps, root, "readlink", "/usr/local/bin/testbed") == "/opt/testbed/venv/bin/testbed\n"
    assert not (root / HOME.lstrip("/") / ".venv").exists()
    modules = (root / "etc/modules-load.d/testbed.conf").read_text().split()
    assert {"ip_vs", "ip_vs_rr", "sch_netem", "dummy"} <= set(modules)
    # who is not root comes to the project, too: pods run as other users
    as_nobody = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", "testbed", "validate"]
    assert inside(steps, root, *as_nobody, f"{HOME}/scenarios/quickstart").endswith("valid\n")
    again = inside(steps, root, f"{HOME}/tools/provision.sh", HOME)
    assert "installing" not in again
    assert "writes" not in again
