"""Putting text into nginx.conf so that it stays one word of it.

Inside double quotes nginx ends a word at ``"`` only, and reads ``\\"`` and ``\\\\`` as the character (ngx_conf_file.c).
There is no way to write a ``$`` that is no variable, so where variables are read a ``geo`` variable stands for it.
"""

from __future__ import annotations

import re
from typing import Final

DOLLAR: Final = "${literal_dollar}"
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")


def quoted(text: str) -> str:
    """Return one word of nginx.conf that means this text, where no variables are read.

    Raises:
        ValueError: the text holds a control character; whoever lets values in has to refuse it.
    """
    if _CONTROL.search(text):
        raise ValueError(f"control character in {text!r}")
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'


def quoted_value(text: str, *, variables: bool = False) -> str:
    """Return one word that means this text where nginx reads variables; with ``variables`` they are left to it."""
    return quoted(text if variables else text.replace("$", DOLLAR))
