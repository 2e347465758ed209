"""Files of the controller's image that its machine does not have."""

from __future__ import annotations

from typing import Final

#: The preStop hook of ingress-nginx' manifests: ends nginx gracefully, and returns when it has ended.
WAIT_SHUTDOWN: Final = """#!/bin/sh
# The controller is the first process of its container. It removes the file when nginx has ended.
kill -TERM 1 && while [ -e /tmp/nginx/running ]; do sleep 0.1; done
"""
