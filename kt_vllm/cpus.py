"""Which logical CPUs the executor's threads are pinned to, and which NUMA node each belongs to."""

import os
from collections.abc import Sequence, Set
from dataclasses import dataclass
from pathlib import Path

from kt_vllm.errors import ConfigError
from kt_vllm.numa import allowed_memory, parse_list, read_nodes, select_nodes


@dataclass(frozen=True)
class CpuChoice:
    """One entry a thread, threads of a node side by side; warning: what a user should know about it, or None.

    cpus: logical CPUs; nodes: the NUMA node each takes its memory from, -1 for none.
    """

    cpus: tuple[int, ...]
    nodes: tuple[int, ...]
    warning: str | None


def allowed_cpus() -> set[int]:
    """The logical CPUs this process may run on.

    Call it before vLLM starts its workers: these confine their own main thread to fewer.
    """
    return os.sched_getaffinity(0)


def choose_cpus(
    num_threads: int | None,
    allowed: Set[int],
    sysfs_root: str = "/sys",
    *,
    numa: str = "auto",
    status_path: str = "/proc/self/status",
) -> CpuChoice:
    """Where to pin `num_threads` threads (None: one a physical core, but one core left to everything else).

    Threads are dealt over the nodes that `numa` names (auto, off or a list) in proportion to their physical cores. In
    a node, one logical CPU of each core first, then the cores' further ones. The lowest core of all comes last each
    time, since the system and vLLM's main thread are mostly there. Raises ConfigError for less than one thread and for
    a list with a node that is not there.
    """
    if not allowed:
        raise ConfigError("this process may run on no CPU at all: check its CPU affinity")
    if num_threads is not None and num_threads < 1:
        raise ConfigError(f"--kt-cpu-infer is {num_threads} and at least 1 thread is needed: give 1 or more")
    groups: dict[int, set[int]] = {}  # the node that the memory is on -> CPUs
    for node in select_nodes(numa, read_nodes(sysfs_root, allowed_memory(status_path)), allowed):
        groups.setdefault(node.memory, set()).update(node.cpus)
    cores = {node: _cores(cpus, Path(sysfs_root)) for node, cpus in sorted(groups.items())}
    home = min(cores, key=lambda node: cores[node][0])
    cores[home].append(cores[home].pop(0))
    num_cores = sum(map(len, cores.values()))
    num_cpus = sum(map(len, groups.values()))
    if num_threads is None:
        num_threads = max(1, num_cores - 1)
    warning = None
    if num_threads > num_cpus:
        warning = (
            f"--kt-cpu-infer is {num_threads} and this process may use {num_cpus} logical CPUs ({num_cores} "
            f"physical cores), so threads will share CPUs and be slower: give at most {num_cores}"
        )
    # While a core can stay free, it is the lowest, and does not count.
    weights = {node: len(of_node) - (node == home and num_threads < num_cores) for node, of_node in cores.items()}
    if num_threads < num_cores:
        limits = weights
    elif num_threads <= num_cpus:
        limits = {node: len(cpus) for node, cpus in groups.items()}
    else:
        limits = dict.fromkeys(groups, num_threads)
    cpus: list[int] = []
    nodes: list[int] = []
    for number, share in _deal(num_threads, weights, limits, last=home).items():
        of_node = cores[number]
        order = [core[i] for i in range(max(map(len, of_node))) for core in of_node if i < len(core)]
        cpus += [order[i % len(order)] for i in range(share)]
        nodes += [number] * share
    return CpuChoice(tuple(cpus), tuple(nodes), warning)


def nodes_of(
    cpus: Sequence[int], sysfs_root: str = "/sys", *, numa: str = "auto", status_path: str = "/proc/self/status"
) -> tuple[int, ...]:
    """The node that each of the given CPUs takes its memory from, -1 for none. Raises ConfigError as choose_cpus()."""
    selected = select_nodes(numa, read_nodes(sysfs_root, allowed_memory(status_path)), set(cpus))
    memory = {cpu: node.memory for node in selected for cpu in node.cpus}
    outside = sorted(set(cpus) - memory.keys())
    if outside:
        raise ConfigError(
            f"cpus names CPU {outside[0]}, which is on none of the nodes of --kt-numa {numa}; change one."
        )
    return tuple(memory[cpu] for cpu in cpus)


def _deal(total: int, weights: dict[int, int], limits: dict[int, int], last: int) -> dict[int, int]:
    """`total` threads over nodes in proportion to `weights`, none above its limit; at a tie `last` is passed over.

    Rounded as seats are by Webster's method, which is exact whenever the proportions are whole numbers.
    """
    shares = dict.fromkeys(weights, 0)
    for _ in range(total):
        # A tie goes to the first of them.
        open_nodes = sorted((node for node in shares if shares[node] < limits[node]), key=lambda node: node == last)
        shares[max(open_nodes, key=lambda node: weights[node] / (2 * shares[node] + 1))] += 1
    return shares


def _cores(allowed: Set[int], sysfs_root: Path) -> list[list[int]]:
    """The allowed logical CPUs of each physical core, in ascending order. A CPU that sysfs lacks is its own core."""
    cores: list[list[int]] = []
    placed: set[int] = set()
    for cpu in sorted(allowed):
        if cpu in placed:
            continue
        path = sysfs_root / "devices" / "system" / "cpu" / f"cpu{cpu}" / "topology" / "thread_siblings_list"
        try:
            siblings = parse_list(path.read_text())
        except (OSError, ValueError):
            siblings = set()
        core = sorted((siblings & allowed | {cpu}) - placed)
        placed.update(core)
        cores.append(core)
    return cores
