"""nginx as the official image sets it up, with the machine's own nginx binary."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from importlib.resources import files

#: SIGQUIT is STOPSIGNAL of the official image: nginx then finishes the requests it has before it ends.
ARGV = ("nginx", "-g", "daemon off;")


def nginx_files(namespace: str, pod: str) -> Mapping[str, str]:
    """Return path -> text of what the official image holds and the machine does not."""
    return {
        "/etc/nginx/nginx.conf": _text("nginx.conf").replace("@SERVED_BY@", f"{namespace}/{pod}"),
        "/etc/nginx/conf.d/default.conf": _text("default.conf"),
        "/usr/share/nginx/html/index.html": _text("index.html"),
        "/usr/share/nginx/html/50x.html": _text("50x.html"),
    }


@cache
def _text(name: str) -> str:
    return files("testbed.programs").joinpath("files", name).read_text(encoding="utf-8")
