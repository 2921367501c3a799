"""Which logical CPUs the executor's threads are pinned to."""

import os
from collections.abc import Set
from dataclasses import dataclass
from pathlib import Path

from kt_vllm.errors import ConfigError


@dataclass(frozen=True)
class CpuChoice:
    """cpus: one logical CPU a thread, in thread order; warning: what a user should know about the choice, or None."""

    cpus: tuple[int, ...]
    warning: str | None


def allowed_cpus() -> set[int]:
    """The logical CPUs this process may run on.

    Call it before vLLM starts its workers: these confine their own main thread to fewer.
    """
    return os.sched_getaffinity(0)


def choose_cpus(num_threads: int | None, allowed: Set[int], sysfs_root: str = "/sys") -> CpuChoice:
    """Where to pin `num_threads` threads (None: one a physical core, but one core left to everything else).

    One logical CPU of each core first, then the cores' further ones; the lowest core last each time, since the system
    and vLLM's main thread are mostly there. Raises ConfigError for less than one thread.
    """
    if not allowed:
        raise ConfigError("this process may run on no CPU at all: check its CPU affinity")
    if num_threads is not None and num_threads < 1:
        raise ConfigError(f"--kt-cpu-infer is {num_threads} and at least 1 thread is needed: give 1 or more")
    cores = _cores(allowed, Path(sysfs_root))
    cores.append(cores.pop(0))
    order = [core[i] for i in range(max(map(len, cores))) for core in cores if i < len(core)]
    if num_threads is None:
        num_threads = max(1, len(cores) - 1)
    warning = None
    if num_threads > len(order):
        warning = (
            f"--kt-cpu-infer is {num_threads} and this process may use {len(order)} logical CPUs ({len(cores)} "
            f"physical cores), so threads will share CPUs and be slower: give at most {len(cores)}"
        )
    return CpuChoice(tuple(order[i % len(order)] for i in range(num_threads)), warning)


def _cores(allowed: Set[int], sysfs_root: Path) -> list[list[int]]:
    """The allowed logical CPUs of each physical core, in ascending order. A CPU that sysfs lacks is its own core."""
    cores: list[list[int]] = []
    placed: set[int] = set()
    for cpu in sorted(allowed):
        if cpu in placed:
            continue
        path = sysfs_root / "devices" / "system" / "cpu" / f"cpu{cpu}" / "topology" / "thread_siblings_list"
        try:
            siblings = _parse_cpu_list(path.read_text())
        except (OSError, ValueError):
            siblings = set()
        core = sorted((siblings & allowed | {cpu}) - placed)
        placed.update(core)
        cores.append(core)
    return cores


def _parse_cpu_list(text: str) -> set[int]:
    """'0-1,8' -> {0, 1, 8}"""
    cpus: set[int] = set()
    for part in text.split(","):
        first, _, last = part.partition("-")
        cpus.update(range(int(first), int(last or first) + 1))
    return cpus
