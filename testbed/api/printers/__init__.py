"""The columns that kubectl shows, kind by kind. Pure: objects and the time in, cells out."""

from __future__ import annotations

from testbed.api.printers import core, network, others, workloads
from testbed.api.printers.cells import Column, Printer
from testbed.api.printers.others import custom_printer, default_printer

__all__ = ["PRINTERS", "Column", "Printer", "custom_printer", "default_printer"]

PRINTERS: dict[str, Printer] = {**core.PRINTERS, **workloads.PRINTERS, **network.PRINTERS, **others.PRINTERS}
