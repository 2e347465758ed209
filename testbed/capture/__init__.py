"""Captures at many points at once, and the way of each connection through them (docs/capture.md).

::

    tcpdump (one a point, in its namespace) ── pcap ──▶ merge ──▶ pcapng file │ tcpdump's lines │ journeys
    conntrack events (one socket a node) ───────────────▶ journeys ──▶ comments in the file, --follow

`points`, `names`, `packets`, `journeys`, `story`, `merge` and `pcapng` are pure; `processes`, `sinks` and `session` act.
"""
