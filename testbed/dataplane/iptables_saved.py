"""What ``iptables-save`` printed, as far as one proxy mode's own chains and jumps are concerned."""

from __future__ import annotations

from collections.abc import Collection, Mapping

#: A table and a chain of it, or a table and a whole rule as it is saved.
Place = tuple[str, str]


def parse_saved(
    saved: str, chains: Mapping[str, Collection[str]], jumps: Collection[Place]
) -> tuple[dict[Place, tuple[str, ...]], frozenset[Place]]:
    """Return the rules of the chains that are there, by table and chain, and those of the jumps that are.

    Args:
        saved: The output of ``iptables-save`` (all tables).
        chains: Which chains are ours, by table.
        jumps: Rules of other chains that lead into ours.
    """
    found: dict[Place, list[str]] = {}
    present: set[Place] = set()
    wanted = set(jumps)
    table = ""
    for line in map(str.rstrip, saved.splitlines()):
        if line.startswith("*"):
            table = line[1:]
        elif line.startswith(":"):
            chain = line[1:].split(" ", 1)[0]
            if chain in chains.get(table, ()):
                found[table, chain] = []
        elif line.startswith("-A "):
            place = (table, line.split(" ", 2)[1])
            if place in found:
                found[place].append(line)
            elif (table, line) in wanted:
                present.add((table, line))
    return {place: tuple(rules) for place, rules in found.items()}, frozenset(present)
