"""OpenELB's webhook in the API: which Eips are denied, in which words, and while whom it can be asked."""

# ruff: noqa: E501 (whole texts in one line)

from __future__ import annotations

import pytest
from openelb_support import EIPS, define_eips, eip, manifest_objects
from registry_support import make_registry, refusal

from testbed.controllers.openelb.names import IS_DEFAULT, WEBHOOK
from testbed.controllers.openelb.webhook import EipWebhook
from testbed.model.objects import Object
from testbed.registry import Registry

CONFIGURATIONS = "validatingwebhookconfigurations.admissionregistration.k8s.io"
DENIED = f'admission webhook "{WEBHOOK}" denied the request: '


@pytest.fixture
def registry() -> Registry:
    """A registry with OpenELB's manifest in it, and its controller ready."""
    made = make_registry()
    define_eips(made)
    made.create("namespaces", {"metadata": {"name": "openelb-system"}})
    for obj in manifest_objects("Service"):
        made.create("services", obj)
    subset = {"addresses": [{"ip": "10.244.1.5"}], "ports": [{"name": "https-webhook", "port": 443}]}
    made.create(
        "endpoints", {"metadata": {"name": "openelb-controller", "namespace": "openelb-system"}, "subsets": [subset]}
    )
    made.admission.webhooks[WEBHOOK] = EipWebhook(made.store)
    for obj in manifest_objects("ValidatingWebhookConfiguration"):
        made.create(CONFIGURATIONS, obj)
    made.create(EIPS, eip(default=True))
    return made


@pytest.mark.parametrize(
    ("new", "text"),
    [
        pytest.param(eip("x", "10-5"), "invalid eip address format", id="no address"),
        pytest.param(eip("x", "192.168.93.9-192.168.93.5"), "invalid eip address format", id="ends before it begins"),
        pytest.param(eip("x", "192.168.93.0/255.255.255.0"), "invalid eip address format", id="a netmask"),
        pytest.param(
            eip("x", "10.0.0.1", interface=None),
            "if protocol is layer2 or vip, interface should not be empty",
            id="layer2 without interface",
        ),
        pytest.param(
            eip("x", "10.0.0.1", protocol="vip", interface=""),
            "if protocol is layer2 or vip, interface should not be empty",
            id="vip without interface",
        ),
        pytest.param(
            eip("x", "192.168.93.238-192.168.93.240"), "eip address overlap with eip-pool", id="overlap at an end"
        ),
        pytest.param(
            eip("x", "192.168.93.0/24", protocol="bgp"),
            "eip address overlap with eip-pool",
            id="overlap, whatever the protocol",
        ),
        pytest.param(eip("x", "10.0.0.1", default=True), "already exists a default EIP", id="a second default one"),
    ],
)
def test_which_eips_are_denied(registry: Registry, new: Object, text: str) -> None:
    """403 Forbidden, in OpenELB's words; nothing is stored."""
    error = refusal(registry.create, EIPS, new)
    assert (error.code, error.reason, error.message) == (403, "Forbidden", DENIED + text)
    assert registry.store.get(EIPS, "", "x") is None


def test_a_disabled_pool_overlaps_too(registry: Registry) -> None:
    """Its addresses are still its own."""
    registry.patch(EIPS, "", "eip-pool", {"spec": {"disable": True}})
    assert (
        refusal(registry.create, EIPS, eip("x", "192.168.93.231")).message
        == f"{DENIED}eip address overlap with eip-pool"
    )


@pytest.mark.parametrize(
    ("patch", "text"),
    [
        pytest.param(
            {"spec": {"address": "10.0.0.1"}}, "the address field is not allowed to be modified", id="address"
        ),
        pytest.param(
            {"spec": {"interface": None}},
            "if protocol is layer2 or vip, interface should not be empty",
            id="interface removed",
        ),
        pytest.param(
            {"metadata": {"annotations": {IS_DEFAULT: "true"}}},
            "already exists a default EIP",
            id="becomes the second default",
        ),
    ],
)
def test_which_changes_are_denied(registry: Registry, patch: Object, text: str) -> None:
    """The address is for life, a link is needed, and one default is enough."""
    registry.create(EIPS, eip("x", "10.0.0.7"))
    assert refusal(registry.patch, EIPS, "", "x", patch).message == DENIED + text


@pytest.mark.parametrize(
    "patch", [{"spec": {"disable": True}}, {"spec": {"priority": 3}}, {"metadata": {"labels": {"a": "b"}}}]
)
def test_which_changes_pass(registry: Registry, patch: Object) -> None:
    """Everything else may change, also of the default pool."""
    registry.patch(EIPS, "", "eip-pool", patch)


def test_bgp_needs_no_interface(registry: Registry) -> None:
    """Nor does a pool that names no protocol, which is bgp."""
    registry.create(EIPS, eip("x", "10.0.0.1", protocol=None, interface=None))


def test_a_pool_in_use_may_be_deleted(registry: Registry) -> None:
    """The webhook is not asked about deletions."""
    current = registry.get(EIPS, "", "eip-pool")
    registry.update(EIPS, {**current, "status": {"used": {"192.168.93.231": "dev/web"}}}, subresource="status")
    registry.delete(EIPS, "", "eip-pool")


def test_the_enum_is_the_schemas(registry: Registry) -> None:
    """A protocol that does not exist is refused by the definition, 422."""
    error = refusal(registry.create, EIPS, eip("x", "10.0.0.1", protocol="l2"))
    assert (error.code, error.message) == (
        422, 'Eip.network.kubesphere.io "x" is invalid: spec.protocol: Unsupported value: "l2": supported values: "bgp", "layer2", "vip"',
    )  # fmt: skip


def test_without_a_ready_controller_no_eip_can_be_made(registry: Registry) -> None:
    """The webhook's pods are the controller's: while none is ready, writes fail in the API server's words."""
    registry.delete("endpoints", "openelb-system", "openelb-controller")
    assert refusal(registry.create, EIPS, eip("x", "10.0.0.1")).message == (
        f'Internal error occurred: failed calling webhook "{WEBHOOK}": failed to call webhook: Post '
        '"https://openelb-controller.openelb-system.svc:443/validate-network-kubesphere-io-v1alpha2-eip?timeout=10s": '
        'no endpoints available for service "openelb-controller"'
    )
    registry.delete(CONFIGURATIONS, "", "openelb-admission")
    registry.create(EIPS, eip("x", "10-5"))
