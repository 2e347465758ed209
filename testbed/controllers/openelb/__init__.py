"""What OpenELB decides: pools and their addresses, which Service gets which, and what the webhook refuses.

::

    Eip ──parse_pool──▶ Pool ─┐
    Service ──────────────────┼─ plan_service ─▶ ServicePlan: statuses of Eips, changes of the Service, events
    Namespace labels ─────────┘
    Eip ──────────────────────── plan_eip ─────▶ EipPlan: finalizer, status

Pure; `testbed.programs.openelb.controller` carries the plans out. Who announces an address is in `testbed.dataplane.openelb`.
Source: openelb v0.6 pkg/controllers/ipam, api/v1alpha2/eip_webhook.go.
"""
