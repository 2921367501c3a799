"""The machine's NUMA nodes, and which of them the executor uses."""

import re
from collections.abc import Iterable, Mapping, Set
from dataclasses import dataclass
from pathlib import Path

from kt_vllm.errors import ConfigError

NO_NODE = -1  # as the executor takes it: memory comes from wherever the kernel finds it
_LIST = re.compile(r"\d{1,4}(-\d{1,4})?(,\d{1,4}(-\d{1,4})?)*")


@dataclass(frozen=True)
class NumaNode:
    """One node that has CPUs. memory: the node its threads take memory from, itself unless that is not to be had."""

    number: int
    cpus: frozenset[int]
    memory: int


def parse_list(text: str) -> set[int]:
    """'0-1,8' -> {0, 1, 8}; raises ValueError for anything else."""
    numbers: set[int] = set()
    for part in text.strip().split(","):
        first, _, last = part.partition("-")
        numbers.update(range(int(first), int(last or first) + 1))
    return numbers


def format_list(numbers: Iterable[int]) -> str:
    """{0, 1, 2, 8} -> '0-2,8'"""
    runs: list[list[int]] = []
    for number in sorted(set(numbers)):
        if runs and runs[-1][1] == number - 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)


def check_numa(value: object) -> None:
    """Raises ConfigError unless value is auto, off or a list of nodes, whether they exist or not."""
    if value in ("auto", "off"):
        return
    if isinstance(value, str) and _LIST.fullmatch(value) and parse_list(value):
        return
    raise ConfigError(f"--kt-numa is {value!r}; give auto, off, or a list of NUMA nodes such as 0 or 0,2-3.")


def allowed_memory(status_path: str = "/proc/self/status") -> set[int] | None:
    """The nodes whose memory this process may use (its cpuset). None when the kernel does not tell: then all."""
    try:
        lines = Path(status_path).read_text().splitlines()
        (nodes,) = [line.partition(":")[2] for line in lines if line.startswith("Mems_allowed_list:")]
        return parse_list(nodes)
    except (OSError, ValueError):
        return None


def read_nodes(sysfs_root: str = "/sys", memory_allowed: Set[int] | None = None) -> dict[int, NumaNode]:
    """All nodes with CPUs, ascending; a node of memory alone is none of ours. Empty when sysfs tells of no nodes.

    A node without memory, or whose memory is not in memory_allowed, takes that of the nearest node that has some: its
    threads and that node's then share one copy of the work, instead of a binding that the kernel would refuse.
    """
    root = Path(sysfs_root) / "devices" / "system" / "node"
    cpus = {node: found for node in _listed(root) if (found := _read_list(root / f"node{node}" / "cpulist"))}
    with_memory = _read_list(root / "has_memory") or set(_listed(root))
    usable = with_memory if memory_allowed is None else with_memory & memory_allowed
    return {
        node: NumaNode(node, frozenset(found), _nearest(root, node, usable)) for node, found in sorted(cpus.items())
    }


def select_nodes(numa: str, nodes: Mapping[int, NumaNode], allowed_cpus: Set[int]) -> list[NumaNode]:
    """The nodes that --kt-numa names, each cut to the CPUs this process may use and with at least one.

    One node without a number for "off" and for machines without nodes. Raises ConfigError for a list with a node that
    is not there or has no such CPU.
    """
    check_numa(numa)
    present = {
        number: NumaNode(number, node.cpus & allowed_cpus, node.memory)
        for number, node in nodes.items()
        if node.cpus & allowed_cpus
    }
    if numa not in ("auto", "off"):
        missing = parse_list(numa) - present.keys()
        if missing:
            there = f"give auto, off or some of: {format_list(present)}" if present else "give auto or off"
            raise ConfigError(
                f"--kt-numa is {numa!r} and this process may use no CPU of NUMA node {format_list(missing)}; {there}."
            )
        return [present[number] for number in sorted(parse_list(numa))]
    if numa == "off" or not present:
        return [NumaNode(NO_NODE, frozenset(allowed_cpus), NO_NODE)]
    # A CPU that no node lists would be a node of its own for nothing.
    stray = allowed_cpus - frozenset().union(*(node.cpus for node in present.values()))
    first, *others = present.values()
    return [NumaNode(first.number, first.cpus | stray, first.memory), *others]


def _listed(root: Path) -> list[int]:
    """The numbers of the folders node0, node1, ..."""
    return sorted(int(path.name[4:]) for path in root.glob("node[0-9]*") if path.name[4:].isdecimal())


def _read_list(path: Path) -> set[int]:
    try:
        return parse_list(path.read_text())
    except (OSError, ValueError):
        return set()


def _nearest(root: Path, node: int, usable: Set[int]) -> int:
    """The node of `usable` that is nearest to `node`, the lowest of several; NO_NODE when there is none."""
    if node in usable or not usable:
        return node if node in usable else NO_NODE
    try:
        # One distance a node that is online, ascending.
        row = map(int, (root / f"node{node}" / "distance").read_text().split())
        distances = dict(zip(_listed(root), row, strict=True))
    except (OSError, ValueError):
        distances = {}
    return min(sorted(usable), key=lambda other: distances.get(other, 255))
