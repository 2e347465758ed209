#!/usr/bin/env python3
"""Compare two dumps of what kube-proxy programmed (see README.md). Exit status 0 when they mean the same."""

import re
import sys
from pathlib import Path

UNORDERED = {"KUBE-SERVICES", "KUBE-NODEPORTS", "KUBE-EXTERNAL-SERVICES", "KUBE-PROXY-FIREWALL", "KUBE-IPVS-OUT-FILTER"}


def parse(text):
    """Return {(section, chain or kind): list of lines} for one dump."""
    found, section, table = {}, "", ""
    for line in text.splitlines():
        line = re.sub(r" \[\d+:\d+\]$", "", line.strip())
        if line.startswith("# ") and line[2:] in ("ipvsadm -Sn", "ipset save", "kube-ipvs0", "sysctl", "iptables"):
            section = line[2:]
        elif not line or line.startswith("#") or line == "COMMIT":
            continue
        elif line.startswith("*"):
            section, table = "iptables", line[1:]
        elif section in ("", "iptables"):
            chain = line.split()[0][1:] if line[0] == ":" else line.split()[1]
            rules = found.setdefault((table, chain), [])
            if line[0] != ":":
                rules.append(line)
        else:
            found.setdefault((section, ""), []).append(line)
    for (where, chain), lines in found.items():
        if where in ("ipvsadm -Sn", "ipset save", "kube-ipvs0"):
            lines.sort()
        elif chain in UNORDERED:
            last = [entry for entry in lines if "must be the last rule" in entry]
            lines[:] = sorted(entry for entry in lines if entry not in last) + last if table != "" else lines
    return found


def differences(a, b):
    """Yield readable differences between two parsed dumps, '-' only in a, '+' only in b."""
    for key in sorted(a.keys() | b.keys()):
        if key not in a:
            yield f"+ {key[0]} {key[1]}: only in the second"
        elif key not in b:
            yield f"- {key[0]} {key[1]}: only in the first"
        elif a[key] != b[key]:
            yield f"! {key[0]} {key[1]}"
            yield from (f"-   {entry}" for entry in a[key] if entry not in b[key])
            yield from (f"+   {entry}" for entry in b[key] if entry not in a[key])
            if sorted(a[key]) == sorted(b[key]):
                yield "    same lines in another order"


if __name__ == "__main__":
    rows = list(differences(*(parse(Path(path).read_text()) for path in sys.argv[1:3])))
    print("\n".join(rows[:60]) or "equal")
    sys.exit(bool(rows))
