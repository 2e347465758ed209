"""Keys, names and resources of OpenELB. Source: openelb v0.6 pkg/constant/constants.go."""

from __future__ import annotations

from typing import Final

GROUP: Final = "network.kubesphere.io"
EIPS: Final = f"eips.{GROUP}"
BGP_CONFS: Final = f"bgpconfs.{GROUP}"
BGP_PEERS: Final = f"bgppeers.{GROUP}"
SYSTEM_NAMESPACE: Final = "openelb-system"

#: Annotation of Services: without this value they are not OpenELB's.
OPT_IN: Final = "lb.kubesphere.io/v1alpha1"
OPT_IN_VALUE: Final = "openelb"
#: Annotation of Services: the pool by name. The controller writes it as a label of Services that have an address.
EIP_NAME: Final = "eip.openelb.kubesphere.io/v1alpha2"
#: Annotation of Services: one fixed address.
FIXED_IP: Final = "eip.openelb.kubesphere.io/v1alpha1"
#: Annotation of Eips: the pool of Services that nothing else gives one.
IS_DEFAULT: Final = "eip.openelb.kubesphere.io/is-default-eip"
SERVICE_FINALIZER: Final = "finalizer.lb.kubesphere.io/v1alpha1"
EIP_FINALIZER: Final = "finalizer.ipam.kubesphere.io/v1alpha1"

LAYER2: Final = "layer2"
VIP: Final = "vip"
BGP: Final = "bgp"
WEBHOOK: Final = "validate.eip.network.kubesphere.io"
