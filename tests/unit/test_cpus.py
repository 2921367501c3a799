"""One thread a core before two, and the core that everything else uses comes last."""

from pathlib import Path

import pytest

from kt_vllm.cpus import allowed_cpus, choose_cpus
from kt_vllm.errors import ConfigError


def sysfs(tmp_path: Path, *cores: str) -> str:
    """A tree in which each argument is a core's thread_siblings_list, e.g. "0,4" or "0-1"."""
    for core in cores:
        cpus: list[int] = []
        for part in core.split(","):
            first, _, last = part.partition("-")
            cpus += range(int(first), int(last or first) + 1)
        for cpu in cpus:
            topology = tmp_path / "devices" / "system" / "cpu" / f"cpu{cpu}" / "topology"
            topology.mkdir(parents=True)
            (topology / "thread_siblings_list").write_text(core + "\n")
    return str(tmp_path)


SMT4 = ("0,4", "1,5", "2,6", "3,7")  # as servers number them
HYBRID = ("0-1", "2-3", "4", "5", "6", "7")  # two cores of two threads, four of one, as desktops number them


@pytest.mark.parametrize(
    ("cores", "num_threads", "expected"),
    [
        (SMT4, None, [1, 2, 3]),
        (SMT4, 1, [1]),
        (SMT4, 4, [1, 2, 3, 0]),
        (SMT4, 6, [1, 2, 3, 0, 5, 6]),
        (SMT4, 8, [1, 2, 3, 0, 5, 6, 7, 4]),
        (HYBRID, None, [2, 4, 5, 6, 7]),
        (HYBRID, 6, [2, 4, 5, 6, 7, 0]),
        (HYBRID, 8, [2, 4, 5, 6, 7, 0, 3, 1]),
        (("0-3", "4-7"), 8, [4, 0, 5, 1, 6, 2, 7, 3]),  # four threads a core
        (("0",), None, [0]),
        (("0-1",), None, [0]),
        (("0", "1"), None, [1]),
    ],
)
def test_order(tmp_path: Path, cores: tuple[str, ...], num_threads: int | None, expected: list[int]) -> None:
    root = sysfs(tmp_path, *cores)
    allowed = {int(p.name[3:]) for p in (tmp_path / "devices" / "system" / "cpu").iterdir()}
    choice = choose_cpus(num_threads, allowed, root)
    assert choice.cpus == tuple(expected)
    assert choice.nodes == (-1,) * len(expected)  # this tree tells of no nodes
    assert choice.warning is None


@pytest.mark.parametrize(
    ("allowed", "num_threads", "expected"),
    [
        ({2, 3, 6, 7}, None, (3,)),  # a container's share
        ({2, 3, 6, 7}, 4, (3, 2, 7, 6)),
        ({4, 1}, 2, (4, 1)),  # of each core another thread: CPU 1's core is the lower one
        ({5, 6}, None, (6,)),
        ({0, 1, 2, 3, 7}, 5, (1, 2, 3, 0, 7)),  # 4, 5 and 6 offline
    ],
)
def test_only_what_is_allowed(
    tmp_path: Path, allowed: set[int], num_threads: int | None, expected: tuple[int, ...]
) -> None:
    assert choose_cpus(num_threads, allowed, sysfs(tmp_path, *SMT4)).cpus == expected


def test_offline_and_unreadable(tmp_path: Path) -> None:
    """CPU 9 has no topology, as an offline one; CPU 3 has nonsense; 0's list still names a sibling that is gone."""
    root = sysfs(tmp_path, "0,8", "1", "3")
    (tmp_path / "devices/system/cpu/cpu3/topology/thread_siblings_list").write_text("\n")
    assert choose_cpus(None, {0, 1, 3, 9}, root).cpus == (1, 3, 9)
    assert choose_cpus(None, {0, 1, 2}, str(tmp_path / "none")).cpus == (1, 2)


def test_more_threads_than_cpus(tmp_path: Path) -> None:
    choice = choose_cpus(11, set(range(8)), sysfs(tmp_path, *SMT4))
    assert choice.cpus == (1, 2, 3, 0, 5, 6, 7, 4, 1, 2, 3)
    assert choice.warning == (
        "--kt-cpu-infer is 11 and this process may use 8 logical CPUs (4 physical cores), so threads will share CPUs "
        "and be slower: give at most 4"
    )


@pytest.mark.parametrize("num_threads", [0, -1])
def test_too_few(num_threads: int) -> None:
    with pytest.raises(ConfigError, match=rf"--kt-cpu-infer is {num_threads} and at least 1 thread is needed: give 1"):
        choose_cpus(num_threads, {0})


def test_this_machine() -> None:
    allowed = allowed_cpus()
    choice = choose_cpus(len(allowed), allowed)
    assert sorted(choice.cpus) == sorted(allowed)
    assert choice.warning is None
