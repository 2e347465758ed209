"""What a new cluster begins with, as far as it can be said without one."""

from __future__ import annotations

import yaml

from testbed.lab.bootstrap import proxy_configuration
from testbed.lab.control import dump_yaml
from testbed.manifests import find_topology, load_topology
from testbed.model.proxyconfig import KubeProxyConfig, parse_proxy_config


def test_proxy_configuration_means_the_defaults() -> None:
    """Of kubeadm's long form nothing but the cluster's CIDR differs from what an empty configuration means."""
    topology = load_topology(find_topology("three-nodes"))
    for mode in ("iptables", "nftables", "ipvs"):
        text = dump_yaml(proxy_configuration(topology, mode))
        config, problems = parse_proxy_config(yaml.safe_load(text))
        assert problems == ()
        assert config == KubeProxyConfig(mode=mode, cluster_cidr=str(topology.cluster.pod_cidr))
        assert f"mode: {mode if mode != 'iptables' else chr(34) * 2}\n" in text
