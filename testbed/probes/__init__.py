"""Real requests, sent from inside a place's namespaces, and what came back. No judgement."""

from testbed.probes.arp import ArpAnswer, ask_arp
from testbed.probes.dns import Resolution, dig_argv, read_dig
from testbed.probes.observation import Observation, Outcome
from testbed.probes.requests import ask

__all__ = ["ArpAnswer", "Observation", "Outcome", "Resolution", "ask", "ask_arp", "dig_argv", "read_dig"]
