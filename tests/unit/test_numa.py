"""Threads go to the nodes there are, in proportion, and memory is never asked of a node that cannot give it."""

from collections import Counter
from pathlib import Path

import pytest

from kt_vllm.cpus import CpuChoice, allowed_cpus, choose_cpus, nodes_of
from kt_vllm.errors import ConfigError
from kt_vllm.numa import allowed_memory, check_numa, format_list, parse_list, read_nodes


class Machine:
    """A sysfs tree. nodes: number -> cpulist ("" for none); smt: each CPU has a sibling so far up."""

    def __init__(
        self,
        root: Path,
        nodes: dict[int, str],
        smt: int = 0,
        memory: str | None = None,
        mems_allowed: str | None = None,
    ) -> None:
        self.root, self.status = root, root / "status"
        folder = root / "devices" / "system" / "node"
        self.cpus: set[int] = set()
        for node, cpulist in nodes.items():
            (folder / f"node{node}").mkdir(parents=True)
            (folder / f"node{node}" / "cpulist").write_text(cpulist + "\n")
            # Nodes are nearer the nearer their numbers.
            row = " ".join(str(10 + 10 * abs(node - other)) for other in sorted(nodes))
            (folder / f"node{node}" / "distance").write_text(row + "\n")
            self.cpus |= parse_list(cpulist) if cpulist else set()
        for name in ("online", "possible", "has_cpu", "power"):
            (folder / name).mkdir() if name == "power" else (folder / name).write_text("0\n")
        if memory is not None:
            (folder / "has_memory").write_text(memory + "\n")
        for cpu in self.cpus:
            topology = root / "devices" / "system" / "cpu" / f"cpu{cpu}" / "topology"
            topology.mkdir(parents=True)
            siblings = f"{cpu % smt},{cpu % smt + smt}" if smt else str(cpu)
            (topology / "thread_siblings_list").write_text(siblings + "\n")
        if mems_allowed is not None:
            self.status.write_text(f"Name:\tpython\nMems_allowed:\t0001\nMems_allowed_list:\t{mems_allowed}\nx:\t1\n")

    def choose(self, num_threads: int | None, allowed: set[int] | None = None, numa: str = "auto") -> CpuChoice:
        return choose_cpus(num_threads, allowed or self.cpus, str(self.root), numa=numa, status_path=str(self.status))


def shares(choice: CpuChoice) -> dict[int, int]:
    """How many threads each node has; also checks that they are side by side and on CPUs of their own."""
    assert len(choice.cpus) == len(choice.nodes)
    runs = [node for i, node in enumerate(choice.nodes) if i == 0 or choice.nodes[i - 1] != node]
    assert len(runs) == len(set(runs)), "a node's threads are not side by side"
    return dict(Counter(choice.nodes))


TWO = {0: "0-3,8-11", 1: "4-7,12-15"}  # 2 x 4 cores, two threads each
EIGHT = {node: f"{4 * node}-{4 * node + 3}" for node in range(8)}


@pytest.mark.parametrize(
    ("nodes", "smt", "num_threads", "expected"),
    [
        ({0: "0-3"}, 0, None, {0: 3}),
        (TWO, 8, None, {0: 3, 1: 4}),
        (TWO, 8, 8, {0: 4, 1: 4}),
        (TWO, 8, 6, {0: 3, 1: 3}),
        (TWO, 8, 1, {1: 1}),  # not where the system is
        (TWO, 8, 12, {0: 6, 1: 6}),
        (TWO, 8, 13, {0: 6, 1: 7}),
        (TWO, 8, 16, {0: 8, 1: 8}),
        (TWO, 8, 20, {0: 10, 1: 10}),  # more than there are
        ({node: f"{8 * node}-{8 * node + 7}" for node in range(4)}, 0, None, {0: 7, 1: 8, 2: 8, 3: 8}),
        (EIGHT, 0, None, {0: 3} | dict.fromkeys(range(1, 8), 4)),
        (EIGHT, 0, 16, dict.fromkeys(range(8), 2)),
        (EIGHT, 0, 5, dict.fromkeys(range(1, 6), 1)),  # fewer threads than nodes
        ({0: "0-3", 1: "4-15"}, 0, None, {0: 3, 1: 12}),  # uneven
        ({0: "0-3", 1: "4-15"}, 0, 8, {0: 2, 1: 6}),
        ({0: "0-3", 3: "4-7"}, 0, 8, {0: 4, 3: 4}),  # numbers with gaps
        ({0: "0,2,4,6", 1: "1,3,5,7"}, 0, None, {0: 3, 1: 4}),  # numbered in turn
        ({0: "0-3", 1: "4-7", 2: ""}, 0, 8, {0: 4, 1: 4}),  # memory alone, as CXL
        # Sub-NUMA clustering: two nodes a socket, siblings far apart.
        ({0: "0-1,8-9", 1: "2-3,10-11", 2: "4-5,12-13", 3: "6-7,14-15"}, 8, None, {0: 1, 1: 2, 2: 2, 3: 2}),
    ],
)
def test_shares(
    tmp_path: Path, nodes: dict[int, str], smt: int, num_threads: int | None, expected: dict[int, int]
) -> None:
    machine = Machine(tmp_path, nodes, smt)
    choice = machine.choose(num_threads)
    assert shares(choice) == expected
    cpus_of = {node: parse_list(cpulist) for node, cpulist in nodes.items() if cpulist}
    assert all(cpu in cpus_of[node] for cpu, node in zip(choice.cpus, choice.nodes, strict=True))
    repeated = len(choice.cpus) > len(machine.cpus)
    assert (len(set(choice.cpus)) < len(choice.cpus)) == repeated == bool(choice.warning)


def test_order_within_a_node(tmp_path: Path) -> None:
    """A core's second thread last, and the core that everything else uses last of its node."""
    machine = Machine(tmp_path, TWO, smt=8)
    assert machine.choose(None).cpus == (1, 2, 3, 4, 5, 6, 7)
    assert machine.choose(12).cpus == (1, 2, 3, 0, 9, 10, 4, 5, 6, 7, 12, 13)


def test_hybrid_cores(tmp_path: Path) -> None:
    """A desktop: one node, two cores of two threads and four of one."""
    machine = Machine(tmp_path, {0: "0-7"})
    for core in ("0-1", "2-3"):
        for cpu in parse_list(core):
            topology = tmp_path / "devices" / "system" / "cpu" / f"cpu{cpu}" / "topology"
            (topology / "thread_siblings_list").write_text(core)
    choice = machine.choose(8)
    assert choice.cpus == (2, 4, 5, 6, 7, 0, 3, 1)
    assert choice.nodes == (0,) * 8


@pytest.mark.parametrize(
    ("allowed", "num_threads", "cpus", "nodes"),
    [
        ({4, 5, 6, 7}, None, (5, 6, 7), (1, 1, 1)),  # the mask cuts node 0 out
        ({2, 3, 4, 5, 6, 7}, 3, (3, 4, 5), (0, 1, 1)),
        ({3, 4}, 2, (3, 4), (0, 1)),
        ({0}, 1, (0,), (0,)),
        ({0, 1, 20}, 3, (1, 20, 0), (0, 0, 0)),  # a CPU that no node lists is no node of its own
    ],
)
def test_affinity(
    tmp_path: Path, allowed: set[int], num_threads: int | None, cpus: tuple[int, ...], nodes: tuple[int, ...]
) -> None:
    choice = Machine(tmp_path, TWO, smt=8).choose(num_threads, allowed)
    assert (choice.cpus, choice.nodes) == (cpus, nodes)


def test_offline_cpus(tmp_path: Path) -> None:
    """cpulist and the mask have only what is online; a topology may still name a sibling that is gone."""
    machine = Machine(tmp_path, {0: "0-2,8", 1: "5"}, smt=8)
    assert machine.choose(None).cpus == (1, 2, 5)
    assert machine.choose(5).nodes == (0, 0, 0, 0, 1)


def test_numa_off_is_as_before(tmp_path: Path) -> None:
    machine = Machine(tmp_path, TWO, smt=8)
    choice = machine.choose(9, numa="off")
    assert choice.cpus == (1, 2, 3, 4, 5, 6, 7, 0, 9)
    assert choice.nodes == (-1,) * 9


@pytest.mark.parametrize(
    ("numa", "expected"),
    [("0", {0: 3}), ("7", {7: 3}), ("0,2-3", {0: 3, 2: 4, 3: 4}), ("3,1", {1: 3, 3: 4})],
)
def test_listed_nodes(tmp_path: Path, numa: str, expected: dict[int, int]) -> None:
    assert shares(Machine(tmp_path, EIGHT).choose(None, numa=numa)) == expected


@pytest.mark.parametrize(
    ("numa", "allowed", "sentence"),
    [
        ("8", None, "--kt-numa is '8' and this process may use no CPU of NUMA node 8; give auto, off or some of: 0-7."),
        ("0,9-11", None, "no CPU of NUMA node 9-11; give"),
        ("1", {0, 1, 9, 13}, "no CPU of NUMA node 1; give auto, off or some of: 0,2-3."),
        ("x", None, "--kt-numa is 'x'; give auto, off, or a list of NUMA nodes"),
    ],
)
def test_refused(tmp_path: Path, numa: str, allowed: set[int] | None, sentence: str) -> None:
    with pytest.raises(ConfigError) as refusal:
        Machine(tmp_path, EIGHT).choose(None, allowed, numa)
    assert sentence in str(refusal.value)


def test_a_list_on_a_machine_that_tells_of_no_nodes(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no CPU of NUMA node 0; give auto or off"):
        choose_cpus(1, {0}, str(tmp_path), numa="0")


@pytest.mark.parametrize(
    ("memory", "mems_allowed", "expected"),
    [
        ("0-3", "0-3", {0: 4, 1: 4, 2: 4, 3: 4}),
        ("0-3", "0", {0: 16}),  # a cpuset with CPUs of all and memory of one
        ("0-3", "1-2", {1: 8, 2: 8}),
        ("0,3", "0-3", {0: 8, 3: 8}),  # nodes without memory
        ("0-3", "7", {-1: 16}),
        (None, None, {0: 4, 1: 4, 2: 4, 3: 4}),
        ("0-4", "4", {4: 16}),  # the only memory is on the node without CPUs
    ],
)
def test_memory_that_cannot_be_had(
    tmp_path: Path, memory: str | None, mems_allowed: str | None, expected: dict[int, int]
) -> None:
    nodes = {node: f"{4 * node}-{4 * node + 3}" for node in range(4)} | {4: ""}
    machine = Machine(tmp_path, nodes, memory=memory, mems_allowed=mems_allowed)
    choice = machine.choose(16)
    assert shares(choice) == expected
    assert sorted(choice.cpus) == list(range(16))


def test_missing_files(tmp_path: Path) -> None:
    machine = Machine(tmp_path, {0: "0-3", 1: "4-7", 2: "8-11"}, memory="0-1", mems_allowed="0-1")
    node = tmp_path / "devices" / "system" / "node"
    (node / "node2" / "distance").unlink()
    assert shares(machine.choose(12)) == {0: 8, 1: 4}  # the lowest for want of a nearest
    (node / "node1" / "cpulist").write_text("nonsense\n")
    (node / "has_memory").unlink()
    assert shares(machine.choose(12)) == {0: 12}
    (node / "node0" / "cpulist").unlink()
    (node / "node2" / "cpulist").unlink()
    assert shares(machine.choose(12)) == {-1: 12}


def test_nodes_of_given_cpus(tmp_path: Path) -> None:
    machine = Machine(tmp_path, TWO, smt=8)
    where = {"sysfs_root": str(tmp_path), "status_path": str(machine.status)}
    assert nodes_of((9, 4, 4, 0), **where) == (0, 1, 1, 0)
    assert nodes_of((9, 4), numa="off", **where) == (-1, -1)
    with pytest.raises(ConfigError, match="cpus names CPU 4, which is on none of the nodes of --kt-numa 0"):
        nodes_of((9, 4), numa="0", **where)


def test_allowed_memory(tmp_path: Path) -> None:
    assert allowed_memory(str(tmp_path / "none")) is None
    status = tmp_path / "status"
    for text, expected in (("Mems_allowed_list:\t0-1,3\n", {0, 1, 3}), ("Mems_allowed_list:\t\n", None), ("", None)):
        status.write_text(text)
        assert allowed_memory(str(status)) == expected


def test_this_machine() -> None:
    choice = choose_cpus(None, allowed_cpus())
    nodes = read_nodes()
    for cpu, node in zip(choice.cpus, choice.nodes, strict=True):
        memories = {found.memory for found in nodes.values() if cpu in found.cpus}
        assert memories == ({node} if nodes else set())
    assert nodes_of(choice.cpus) == choice.nodes


@pytest.mark.parametrize("value", ["", "0,", "0-", "0-99999", "-1", "1-0", "0 ,1", "AUTO", None, 0, ["0"]])
def test_no_list(value: object) -> None:
    with pytest.raises(ConfigError, match="give auto, off, or a list"):
        check_numa(value)


@pytest.mark.parametrize("text", ["0", "0-3", "0,2-3,9", "7,9"])
def test_lists_round_trip(text: str) -> None:
    check_numa(text)
    assert format_list(parse_list(text)) == text
