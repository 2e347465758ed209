"""Pods on a node: what the kubelet decides (agent), and the seam to whatever runs namespaces for it (runtime)."""
