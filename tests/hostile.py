"""Texts that would do something if a shell, an option parser or a configuration file took them for more than text."""

from __future__ import annotations


def hostile_texts(canary: str) -> list[str]:
    """Return texts each of which, taken for more than text somewhere, makes the file ``canary``, or a rule of that name."""
    touch = f"touch {canary}"
    return [
        f"$({touch})",
        f"`{touch}`",
        f"; {touch} #",
        f"| {touch}",
        f"& {touch} &",
        f"x\n{touch}\n",
        f"'; {touch}; '",
        f'"; {touch}; "',
        f"${{IFS}}touch${{IFS}}{canary}",
        f"x\0{touch}",
        f"--output={canary}",
        f"-w{canary}",
        f"../../../../../../../..{canary}",
        f"x\nlog-facility={canary}\n",  # dnsmasq
        f"x; error_log {canary}; }}",  # nginx
        "x\n-A INPUT -m comment --comment canary -j ACCEPT",  # iptables-restore
        '"; add table ip canary; "',  # nft
        f"{{{{ '{canary}' }}}}",
        f"%s%n$(({touch}))",
    ]
