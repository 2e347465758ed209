"""The speaker image's ``gobgp``: the stock manifest's readiness probe runs it, and so learns whether the speaker works."""

from __future__ import annotations

from typing import Final

READY_FILE: Final = "/run/openelb-speaker.ready"
"""Written when the speaker works."""

GOBGP_SCRIPT: Final = f"""#!/bin/sh
# The stock manifest's readiness probe asks gobgp. This speaker does not speak BGP yet: it says whether it runs.
if [ -e {READY_FILE} ]; then
  echo "BGP server hasn't started yet (this speaker announces by layer2 only)"
else
  echo "rpc error: code = Unavailable desc = connection refused" >&2
  exit 1
fi
"""
