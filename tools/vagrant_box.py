"""A Vagrant box with Debian 12, built on the spot: debootstrap, ext4, GRUB written with dd's own means, qcow2.

No loop device, no hypervisor and no Vagrant Cloud is needed; only root. The disk::

    sector 0      MBR: the first 440 bytes of GRUB's boot.img, then a partition table with one Linux partition
    sector 1 …    GRUB's core.img, with biosdisk, part_msdos and ext2 inside
    sector 2048   the ext4 file system, filled by mkfs.ext4 -d

Everything about this machine that a VM needs to reach the package mirrors is in the box: its Debian mirror, apt's settings about
reaching it, its own certificate authorities, pip's index. So the project's Vagrantfile and provision script stay free of it.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import struct
import subprocess
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from vagrant_steps import WITH_US, StepFailed, Steps

RELEASE = "bookworm"
DEFAULT_MIRROR = "http://deb.debian.org/debian"
#: What a public Debian box has, and nothing of what ./dev setup must install.
BOX_PACKAGES = (
    "openssh-server", "sudo", "linux-image-amd64", "systemd-sysv", "dbus", "libpam-systemd", "ca-certificates", "ifupdown",
    "isc-dhcp-client", "udev", "iproute2", "rsync", "kmod", "initramfs-tools", "procps", "zstd",
)  # fmt: skip
DISK_GB = 12
SECTOR = 512
FIRST_SECTOR = 2048  # of the partition: the usual 1 MiB, with room for core.img before it
LABEL = "testbed-root"
# Public on purpose: every box starts with it (github.com/hashicorp/vagrant, keys/vagrant.pub); Vagrant brings the other half.
VAGRANT_PUBLIC_KEYS = (
    "/usr/share/rubygems-integration/all/gems/vagrant-*/keys/vagrant.pub",  # Debian's package
    "/opt/vagrant/embedded/gems/**/keys/vagrant.pub",  # HashiCorp's
)

_INTERFACES = """\
auto lo
iface lo inet loopback

auto eth0
iface eth0 inet dhcp
"""
_GRUB_CFG = f"""\
set timeout=0
serial --unit=0
terminal_output console serial
linux /vmlinuz root=LABEL={LABEL} ro net.ifnames=0 console=ttyS0
initrd /initrd.img
boot
"""
_FSTAB = f"LABEL={LABEL} / ext4 errors=remount-ro 0 1\n"


@dataclass(frozen=True, slots=True, kw_only=True)
class Mirror:
    """Where Debian packages come from."""

    main: str
    security: str

    def sources(self) -> str:
        """Return /etc/apt/sources.list."""
        return (
            f"deb {self.main} {RELEASE} main\ndeb {self.main} {RELEASE}-updates main\n"
            f"deb {self.security} {RELEASE}-security main\n"
        )


def find_mirror() -> Mirror:
    """Return the mirror that apt is configured for here, or Debian's own on a machine without one for this release."""
    done = subprocess.run(
        ["apt-get", "indextargets", "--format", "$(ORIGIN) $(CODENAME) $(REPO_URI)", "Created-By: Packages"],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    return choose_mirror(done.stdout, os.environ.get("TESTBED_DEBIAN_MIRROR", ""))


def choose_mirror(targets: str, wanted: str = "") -> Mirror:
    """Return the mirror of ``apt-get indextargets`` lines (origin, code name, URI); ``wanted`` wins when given."""
    found: dict[str, str] = {}
    for line in targets.splitlines():
        words = line.split()
        if len(words) == 3 and words[0] == "Debian" and words[2].startswith(("http://", "https://")):
            found.setdefault(words[1], words[2].rstrip("/"))
    main = (wanted or found.get(RELEASE, DEFAULT_MIRROR)).rstrip("/")
    security = found.get(f"{RELEASE}-security", main.removesuffix("/debian") + "/debian-security")
    return Mirror(main=main, security=security)


def debootstrap(steps: Steps, root: Path, packages: tuple[str, ...], mirror: Mirror, cache: Path | None) -> None:
    """Install a minimal Debian into a new folder; packages that were fetched before are taken from ``cache``."""
    options = ["--variant=minbase", f"--include={','.join(packages)}"]
    if cache is not None:
        cache.mkdir(parents=True, exist_ok=True)
        options.append(f"--cache-dir={cache}")
    steps.run(in_build(["debootstrap", *options, RELEASE, root, mirror.main]), limit_s=1800, log="debootstrap")


def in_build(argv: Sequence[str | Path]) -> list[str | Path]:
    """Return the command that runs another one where its mounts, and what it leaves running, end with it.

    debootstrap mounts proc and sys in the new root; when it is killed they would stay, and removing the root reach into them.
    """
    alone = ["unshare", "--mount", "--propagation", "private", "--pid", "--fork", "--kill-child=KILL", "--"]
    return [*WITH_US, *alone, *argv]


def carry_site(root: Path, mirror: Mirror) -> None:
    """Give a Debian root what this machine needs to reach the package mirrors."""
    (root / "etc/apt/sources.list").write_text(mirror.sources())
    dump = subprocess.run(["apt-config", "dump", "Acquire"], capture_output=True, text=True, timeout=60, check=False)
    (root / "etc/apt/apt.conf.d/90site").write_text(apt_site_settings(dump.stdout))
    certificates = sorted(Path("/usr/local/share/ca-certificates").glob("**/*.crt"))
    target = root / "usr/local/share/ca-certificates"
    target.mkdir(parents=True, exist_ok=True)
    for certificate in certificates:
        shutil.copy(certificate, target / certificate.name)
    listing = subprocess.run(["/usr/bin/python3", "-m", "pip", "config", "list"], capture_output=True, text=True, timeout=60,
                             check=False)  # fmt: skip
    (root / "etc/pip.conf").write_text(pip_site_settings(listing.stdout, has_own_authorities=bool(certificates)))


def apt_site_settings(dump: str) -> str:
    """Return the lines of ``apt-config dump`` that say how to reach a mirror: proxies, and checks of dates."""
    wanted = re.compile(r"Acquire::(https?|Retries|Check-Valid-Until|Check-Date)\b")
    return "".join(f"{line}\n" for line in dump.splitlines() if wanted.match(line) and not line.endswith(' "";'))


def pip_site_settings(listing: str, *, has_own_authorities: bool) -> str:
    """Return a pip.conf for a VM from ``pip config list``: indexes that are reached over the network, and whom to trust.

    pip brings its own list of authorities, so one that is installed in the system has to be told to it.
    """
    values = {}
    for line in listing.splitlines():
        match = re.fullmatch(r"(?:global|user|site|:env:)\.([a-z-]+)='(.*)'", line)
        if match and match[1] in (
            "index-url",
            "extra-index-url",
            "trusted-host",
            "proxy",
            "timeout",
            "default-timeout",
        ):
            name = match[1].removeprefix("default-")
            words = [word for word in match[2].split() if not word.startswith("file:")]
            if words:
                values[name] = " ".join(words)
    if has_own_authorities:
        values["cert"] = "/etc/ssl/certs/ca-certificates.crt"
    lines = [f"{name} = {value}" for name, value in sorted(values.items())]
    return "\n".join(["[global]", *lines, ""])


def make_bootable(steps: Steps, root: Path, mirror: Mirror) -> None:
    """Turn a Debian root into that of a box: user vagrant, network, boot files."""
    carry_site(root, mirror)
    for name, text in {
        "etc/fstab": _FSTAB, "etc/hostname": "testbed\n", "etc/network/interfaces": _INTERFACES,
        "etc/hosts": "127.0.0.1 localhost\n127.0.1.1 testbed\n",
        "etc/sudoers.d/vagrant": "vagrant ALL=(ALL) NOPASSWD: ALL\n",
        "etc/ssh/sshd_config.d/vagrant.conf": "UseDNS no\n",
        "boot/grub/grub.cfg": _GRUB_CFG,
    }.items():  # fmt: skip
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    # Only what finds the disk: an initramfs for all machines has 60 MB, which an emulated processor takes a minute to unpack.
    (root / "etc/initramfs-tools/conf.d/testbed").write_text("MODULES=list\n")
    with (root / "etc/initramfs-tools/modules").open("a") as modules:
        modules.write("virtio_pci\nvirtio_blk\nvirtio_scsi\nsd_mod\ncrc32c_generic\next4\n")

    def inside(*words: str) -> None:
        steps.run(in_build(["chroot", root, *words]), limit_s=300, log="image")

    inside("useradd", "--create-home", "--shell", "/bin/bash", "vagrant")
    ssh = root / "home/vagrant/.ssh"
    ssh.mkdir(mode=0o700)
    keys = [path for pattern in VAGRANT_PUBLIC_KEYS for path in Path("/").glob(pattern.lstrip("/"))]
    if not keys:
        raise StepFailed(f"Vagrant's public key is at none of {', '.join(VAGRANT_PUBLIC_KEYS)}: is vagrant installed?")
    (ssh / "authorized_keys").write_text(keys[0].read_text())
    inside("chown", "-R", "vagrant:vagrant", "/home/vagrant/.ssh")
    inside("update-ca-certificates")
    inside("update-initramfs", "-u")
    inside("apt-get", "clean")
    # each VM makes its own
    (root / "etc/machine-id").write_text("")


def save_time(root: Path) -> None:
    """Leave out what an emulated processor is slow at and nobody misses in a VM that is thrown away.

    These are bytecode before it is needed, the second copy that dpkg waits for, manuals, and descriptions of packages.
    """
    with (root / "etc/pip.conf").open("a") as config:
        config.write("[install]\nno-compile = true\n")
    (root / "etc/dpkg/dpkg.cfg.d/testbed").write_text(
        "force-unsafe-io\npath-exclude=/usr/share/man/*\npath-exclude=/usr/share/doc/*\npath-exclude=/usr/share/locale/*\n"
    )
    (root / "etc/apt/apt.conf.d/91testbed").write_text('Acquire::Languages "none";\n')


def make_image(steps: Steps, root: Path, folder: Path) -> Path:
    """Return a qcow2 image that boots the root."""
    disk, image = folder / "disk.raw", folder / "box.img"
    with disk.open("wb") as stream:
        stream.truncate(DISK_GB << 30)
    blocks = ((DISK_GB << 30) - FIRST_SECTOR * SECTOR) // 4096
    # GRUB 2.06 reads no file system with metadata_csum_seed, which newer mke2fs turn on
    steps.run(
        ["mkfs.ext4", "-q", "-F", "-b", "4096", "-L", LABEL, "-O", "^metadata_csum_seed", "-E",
         f"offset={FIRST_SECTOR * SECTOR}", "-d", root, disk, str(blocks)],
        limit_s=600, log="image",
    )  # fmt: skip
    core = folder / "core.img"
    steps.run(
        ["grub-mkimage", "-O", "i386-pc", "-o", core, "-p", "(hd0,msdos1)/boot/grub", "biosdisk", "part_msdos", "ext2",
         "normal", "linux", "configfile", "serial", "terminal", "echo"],
        limit_s=60, log="image",
    )  # fmt: skip
    sectors = (DISK_GB << 30) // SECTOR - FIRST_SECTOR
    with disk.open("r+b") as stream:
        stream.write(boot_sectors(Path("/usr/lib/grub/i386-pc/boot.img").read_bytes(), core.read_bytes(), sectors))
    steps.run(["qemu-img", "convert", "-f", "raw", "-O", "qcow2", disk, image], limit_s=600, log="image")
    disk.unlink()
    return image


def boot_sectors(boot: bytes, core: bytes, sectors: int) -> bytes:
    """Return the sectors before the partition.

    boot.img loads sector 1 unless it is told otherwise, and core.img begins with the list of its own sectors, from 2 on:
    these defaults are right for this place (grub-core/boot/i386/pc/boot.S, diskboot.S; grub-mkimage fills in the length).

    Raises:
        ValueError: core.img does not fit before the partition.
    """
    if len(core) > (FIRST_SECTOR - 1) * SECTOR:
        raise ValueError(
            f"core.img has {len(core)} bytes, and {(FIRST_SECTOR - 1) * SECTOR} are free before the partition"
        )
    # active, cylinders and heads unused (LBA), type 0x83 (Linux), first sector, number of sectors
    entry = struct.pack("<B3sB3sII", 0x80, b"\xfe\xff\xff", 0x83, b"\xfe\xff\xff", FIRST_SECTOR, sectors)
    mbr = boot[:440] + b"TBED\0\0" + entry + bytes(48) + b"\x55\xaa"
    return mbr + core


def pack_box(image: Path, driver: str, box: Path) -> None:
    """Write a box for vagrant-libvirt. What concerns emulation stands in the box's own Vagrantfile, not in the project's."""
    (image.parent / "metadata.json").write_text(
        json.dumps({"provider": "libvirt", "format": "qcow2", "virtual_size": DISK_GB})
    )
    (image.parent / "Vagrantfile").write_text(box_vagrantfile(driver))
    with tarfile.open(box, "w") as archive:
        for name in ("metadata.json", "Vagrantfile", image.name):
            archive.add(image.parent / name, name)


def box_vagrantfile(driver: str) -> str:
    """Return the Vagrantfile of the box: under emulation booting takes minutes, and a new key is not worth its time."""
    return f"""\
Vagrant.configure("2") do |config|
  config.vm.boot_timeout = 900
  config.ssh.insert_key = false
  config.vm.provider :libvirt do |libvirt|
    libvirt.driver = "{driver}"
    libvirt.video_type = "none"
    libvirt.graphics_type = "none"
  end
end
"""


def register_metadata(name: str, box: Path, metadata: Path) -> None:
    """Write the file by which ``vagrant box add`` registers the box under a public box's name."""
    document = {
        "name": name,
        "versions": [{"version": "12.0.0", "providers": [{"name": "libvirt", "url": box.as_uri()}]}],
    }
    metadata.write_text(json.dumps(document))
