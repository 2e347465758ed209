#!/usr/bin/env python3
"""How a speaker of OpenELB answers ARP, and how long an address is silent when its node fails.

Starts a lab of its own with OpenELB in it and prints, for each rate of RATES: how many of a client's ARP requests a second
were lost, and how long answers took. Then the longest time without an answer that a client sees which keeps asking by HTTP
while the announcing node's link is cut. ``--json`` prints the same for machines. Needs root.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import sys
import threading
import time
from collections.abc import Callable
from ipaddress import IPv4Address
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

RATES = (1000, 5000)
SECONDS = 3.0
LB = IPv4Address("192.168.93.231")
OWNER = "openeuler-2"
ETH_P_ARP = 0x0806


def flood(address: IPv4Address, rate: int, seconds: float) -> dict[str, float]:
    """Ask at a rate for a while, each time as another sender, and return what came of it. Runs in the client."""
    from scapy.layers.l2 import ARP, Ether

    with socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(ETH_P_ARP)) as made:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 8 << 20)
        made.bind(("eth0", ETH_P_ARP))
        mac = made.getsockname()[4]
        # The sender's address counts the questions: 10.x.y.z comes back as the answer's target.
        template = bytes(
            Ether(dst="ff:ff:ff:ff:ff:ff", src=mac) / ARP(op=1, hwsrc=mac, psrc="10.0.0.0", pdst=str(address))
        )
        sent: dict[bytes, float] = {}
        took: list[float] = []
        asked = threading.Event()

        def receive() -> None:
            made.settimeout(0.2)
            end = None
            while end is None or (time.monotonic() < end and len(took) < len(sent)):
                if asked.is_set() and end is None:
                    end = time.monotonic() + 2.0
                try:
                    frame = made.recv(128)
                except TimeoutError:
                    continue
                if frame[20:22] == b"\0\2" and frame[28:32] == address.packed and frame[38:42] in sent:
                    took.append(time.monotonic() - sent[frame[38:42]])

        reader = threading.Thread(target=receive)
        reader.start()
        began = time.monotonic()
        for number in range(int(rate * seconds)):
            left = began + number / rate - time.monotonic()
            if left > 0:
                time.sleep(left)
            who = bytes((10, *number.to_bytes(3, "big")))
            sent[who] = time.monotonic()
            made.send(template[:28] + who + template[32:])
        spent = time.monotonic() - began
        asked.set()
        reader.join()
    took.sort()
    return {
        "asked": len(sent),
        "rate": round(len(sent) / spent),
        "lost": len(sent) - len(took),
        "median_ms": round(statistics.median(took) * 1000, 3) if took else float("nan"),
        "p99_ms": round(took[int(len(took) * 0.99)] * 1000, 3) if took else float("nan"),
    }


def keep_asking(seconds: float) -> float:
    """Return the longest time between two answers by HTTP. Runs in the client."""
    end, last, longest = time.monotonic() + seconds, time.monotonic(), 0.0
    while time.monotonic() < end:
        try:
            with socket.create_connection((str(LB), 80), timeout=0.3) as made:
                made.sendall(b"GET / HTTP/1.0\r\n\r\n")
                if made.recv(100):
                    longest = max(longest, time.monotonic() - last)
                    last = time.monotonic()
        except OSError:
            continue
        time.sleep(0.01)
    return max(longest, time.monotonic() - last)


def wait(check: Callable[[], Any], within_s: float = 90.0) -> None:
    end = time.monotonic() + within_s
    while not check():
        if time.monotonic() > end:
            sys.exit("the lab did not become ready")
        time.sleep(0.1)


def measure() -> dict[str, Any]:
    from testbed.lab.start import start_lab
    from testbed.manifests import load_objects
    from testbed.manifests.topology import load_topology
    from testbed.probes import ask_arp

    topology = load_topology(ROOT / "topologies/tutorial.yaml")
    results: dict[str, Any] = {"rates": {}}
    with start_lab(topology, name=f"bench-openelb-{os.getpid()}", proxy_mode="iptables", attached=True) as lab:

        def apply(file: str) -> None:
            for source in load_objects(ROOT / "scenarios/openelb-failover" / file):
                lab.api.apply(source.object)

        apply("openelb.yaml")
        wait(
            lambda: (
                lab.api.get("daemonsets.apps", "openelb-system", "openelb-speaker")["status"].get("numberReady") == 3
                and lab.api.get("deployments.apps", "openelb-system", "openelb-controller")["status"].get(
                    "readyReplicas"
                )
            )
        )
        apply("ip-pool.yaml")
        apply("web.yaml")
        wait(lambda: lab.call("client", ask_arp, LB, 0.3, timeout_s=30))
        wait(lambda: lab.call("client", keep_asking, 0.5, timeout_s=30) < 0.4)
        for rate in RATES:
            results["rates"][rate] = lab.call("client", flood, LB, rate, SECONDS, timeout_s=120)
        timer = threading.Timer(1.0, lambda: lab.set_link(OWNER, False))
        timer.start()
        results["link_cut_longest_silence_s"] = round(lab.call("client", keep_asking, 6.0, timeout_s=60), 2)
        timer.join()
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    if os.geteuid() != 0:
        sys.exit("benchmarks/openelb.py needs root: it starts a lab")
    measured = measure()
    if options.json:
        print(json.dumps(measured))
        return
    print(f"ARP requests of one client to one address, {SECONDS:g} s each")
    print("  asked/s         lost    median ms    p99 ms")
    for rate, seen in measured["rates"].items():
        lost = f"{seen['lost']}/{seen['asked']}"
        print(f"  {rate:>7} {lost:>12}   {seen['median_ms']:>10.3f}   {seen['p99_ms']:>7.3f}")
    print("  budget: none lost at 1000/s, median 1 ms")
    print(
        f"link of the announcing node cut: longest silence {measured['link_cut_longest_silence_s']:.2f} s (budget 3 s)"
    )


if __name__ == "__main__":
    main()
