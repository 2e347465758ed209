"""A stand-in for nft that holds a table and refuses what the real one refuses, and a namespace for the real one."""

from __future__ import annotations

import contextlib
import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator, Sequence

import pytest

from testbed.dataplane.nft_table import Chain, Element, Hook, NftTable, SetSpec, as_listed
from testbed.errors import CommandError
from testbed.kernel.nftables import Nftables
from testbed.kernel.runner import Runner, SubprocessRunner


class FakeNft:
    """Stands for ``nft`` and one table. ``refuses`` is a text: a command with it is refused, as by the kernel.

    Like the real one it carries out all commands or none, deletes nothing that is in use, and prints rules in its own words.
    """

    def __init__(self) -> None:
        self.table: NftTable | None = None
        self.payloads: list[str] = []
        self.calls: list[list[str]] = []
        self.refuses = ""
        self.generation = 0

    def run(self, argv: Sequence[str], *, stdin: str = "", timeout_s: float = 60) -> str:
        self.calls.append(list(argv))
        if list(argv) == ["nft", "list", "table", "ip", "kube-proxy"]:
            if self.table is None:
                raise CommandError(argv, 1, "Error: No such file or directory\nlist table ip kube-proxy\n")
            return _printed(self.table)
        assert list(argv) == ["nft", "-f", "-"], argv
        self.payloads.append(stdin)
        table = None if self.table is None else _copy(self.table)
        for number, line in enumerate(stdin.splitlines(), start=1):
            try:
                if self.refuses and self.refuses in line:
                    raise ValueError("Could not process rule: Operation not supported")
                table = self._carry_out(table, line)
            except ValueError as error:
                raise CommandError(
                    argv, 1, f"/dev/stdin:{number}:1-{len(line)}: Error: {error}\n{line}\n^^^^\n"
                ) from None
        self.table = table
        self.generation += 1
        return ""

    def _carry_out(self, table: NftTable | None, line: str) -> NftTable | None:
        verb, kind, _, _, *rest = line.split(" ", 5)[:5] + line.split(" ", 5)[5:]
        if kind == "table":
            if verb == "delete":
                if table is None:
                    raise ValueError("Could not process rule: No such file or directory")
                return None
            return table or NftTable(comment=_quoted(line))
        if table is None:
            raise ValueError("Could not process rule: No such file or directory")
        name, text = rest[0], rest[1] if len(rest) > 1 else ""
        getattr(self, f"_{verb}_{kind.replace('map', 'set')}")(table, name, text, kind)
        return table

    def _add_set(self, table: NftTable, name: str, text: str, kind: str) -> None:
        type_ = re.search(r"type (.+?) ;", text)
        timeout = re.search(r"timeout (\d+)s", text)
        assert type_
        table.sets[name] = SetSpec(kind, type_[1], _quoted(text), int(timeout[1]) if timeout else 0)

    def _delete_set(self, table: NftTable, name: str, text: str, kind: str) -> None:
        _must(name in table.sets, "No such file or directory")
        _must(
            not any(f"@{name}" in shlex.split(r) for c in table.chains.values() for r in c.rules),
            "Device or resource busy",
        )
        del table.sets[name]
        table.elements = {key: e for key, e in table.elements.items() if key[0] != name}

    def _add_chain(self, table: NftTable, name: str, text: str, kind: str) -> None:
        hook = re.search(r"type (\w+) hook (\w+) priority (-?\d+)", text)
        if name not in table.chains:
            table.chains[name] = Chain((), Hook(hook[1], hook[2], int(hook[3])) if hook else None, _quoted(text))

    def _flush_chain(self, table: NftTable, name: str, text: str, kind: str) -> None:
        _must(name in table.chains, "No such file or directory")
        chain = table.chains[name]
        table.chains[name] = Chain((), chain.hook, chain.comment)

    def _delete_chain(self, table: NftTable, name: str, text: str, kind: str) -> None:
        _must(name in table.chains, "No such file or directory")
        targets = [r for c in table.chains.values() for r in c.rules] + [e.value for e in table.elements.values()]
        _must(not any(f" {name} " in f" {text} " for text in targets), "Device or resource busy")
        del table.chains[name]

    def _add_rule(self, table: NftTable, name: str, text: str, kind: str) -> None:
        _must(name in table.chains, "No such file or directory")
        for used in re.findall(r"(?:goto|jump) ([^\s,}]+)", text):
            _must(used in table.chains, "No such file or directory")
        for used in re.findall(r"@(\S+)(?= |$)", re.sub(r'"[^"]*"', "", text)):
            _must(used in table.sets, "No such file or directory")
        chain = table.chains[name]
        table.chains[name] = Chain((*chain.rules, text), chain.hook, chain.comment)

    def _add_element(self, table: NftTable, name: str, text: str, kind: str) -> None:
        _must(name in table.sets, "No such file or directory")
        element = _element(name, text)
        known = table.elements.get((name, element.key))
        _must(known is None or known == element, "File exists")
        _must(len(element.comment) <= 128, "comment too long, 128 characters maximum allowed")
        if element.value.startswith("goto "):
            _must(element.value.removeprefix("goto ") in table.chains, "No such file or directory")
        table.elements[name, element.key] = element

    def _delete_element(self, table: NftTable, name: str, text: str, kind: str) -> None:
        key = _element(name, text).key
        _must((name, key) in table.elements, "No such file or directory")
        del table.elements[name, key]


def _must(holds: bool, otherwise: str) -> None:
    if not holds:
        raise ValueError(otherwise if " maximum " in otherwise else f"Could not process rule: {otherwise}")


def _element(name: str, text: str) -> Element:
    body = text.removeprefix("{ ").removesuffix(" }")
    key, _, value = body.partition(" : ")
    return Element(name, key.partition(' comment "')[0], value, _quoted(key))


def _quoted(text: str) -> str:
    return text.split('"')[1] if '"' in text else ""


def _copy(table: NftTable) -> NftTable:
    return NftTable(table.comment, dict(table.sets), dict(table.chains), dict(table.elements))


def _printed(table: NftTable) -> str:
    lines = ["table ip kube-proxy {", f'\tcomment "{table.comment}"']
    for name, spec in table.sets.items():
        lines += [f"\t{spec.kind} {name} {{", f"\t\ttype {spec.type}"]
        lines += [f"\t\tflags dynamic,timeout\n\t\ttimeout {spec.timeout_s}s"] if spec.timeout_s else []
        lines += [f'\t\tcomment "{spec.comment}"'] if spec.comment else []
        elements = [element.written for (owner, _), element in table.elements.items() if owner == name]
        lines += ["\t\telements = { " + ",\n\t\t\t     ".join(elements) + " }"] if elements else []
        lines.append("\t}\n")
    for name, chain in table.chains.items():
        lines.append(f"\tchain {name} {{")
        lines += [f'\t\tcomment "{chain.comment}"'] if chain.comment else []
        hook = chain.hook
        lines += [f"\t\ttype {hook.type} hook {hook.hook} priority {hook.priority}; policy accept;"] if hook else []
        lines += [f"\t\t{as_listed(rule)}" for rule in chain.rules]
        lines.append("\t}\n")
    return "\n".join([*lines, "}"]) + "\n"


@contextlib.contextmanager
def real_nft() -> Iterator[Runner]:
    """Give a runner in a network namespace of its own; skip the test when nft is not there."""
    if shutil.which("nft") is None:
        pytest.skip("nft is not installed (apt-get install nftables)")
    holder = subprocess.Popen(["unshare", "--net", "cat"], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert holder.stdin and holder.stdout
    try:
        holder.stdin.write(b"x")
        holder.stdin.flush()
        holder.stdout.read(1)  # cat runs, so the namespace is there
        runner = SubprocessRunner(prefix=["nsenter", f"--net=/proc/{holder.pid}/ns/net"])
        try:
            runner.run(["nft", "list", "tables"])
        except CommandError as error:
            pytest.skip(f"the kernel has no nf_tables: {error.stderr.strip()}")
        yield runner
    finally:
        holder.communicate()


def kube_proxy_table(runner: Runner) -> Nftables:
    """Return the applier of kube-proxy's table."""
    generation = (lambda: runner.generation) if isinstance(runner, FakeNft) else (lambda: None)
    return Nftables(runner, "ip", "kube-proxy", generation=generation)
