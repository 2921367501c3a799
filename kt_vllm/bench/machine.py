"""What the machine is, and what it can do at best."""

import platform
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from kt_vllm import _native
from kt_vllm.errors import ResourceError

_MIB = 1 << 20


def cpu_model(proc_root: str = "/proc") -> str:
    """The model name, with family and model number, since virtual machines often hide the name."""
    fields: dict[str, str] = {}
    try:
        for line in (Path(proc_root) / "cpuinfo").read_text().split("\n\n")[0].splitlines():
            key, _, value = line.partition(":")
            fields[key.strip()] = value.strip()
    except OSError:
        return platform.processor() or platform.machine()
    name = " ".join(fields.get("model name", platform.machine()).split())
    return f"{name} (family {fields.get('cpu family', '?')}, model {fields.get('model', '?')})"


def cache_bytes(sysfs_root: str = "/sys") -> int:
    """All last-level caches together; 0 where the system does not say."""
    seen: dict[str, int] = {}
    for folder in Path(sysfs_root, "devices/system/cpu").glob("cpu[0-9]*/cache/index3"):
        try:
            size = (folder / "size").read_text().strip()
            seen[(folder / "shared_cpu_list").read_text()] = int(size.rstrip("K")) << (10 if size.endswith("K") else 0)
        except (OSError, ValueError):
            continue
    return sum(seen.values())


def available_bytes(proc_root: str = "/proc") -> int:
    for line in (Path(proc_root) / "meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) << 10
    raise ResourceError(f"{proc_root}/meminfo has no MemAvailable: this kernel is older than Linux 3.14")


def huge_page_bytes(proc_root: str = "/proc") -> int:
    """Memory of this process that stands in huge pages."""
    try:
        for line in (Path(proc_root) / "self/smaps_rollup").read_text().splitlines():
            if line.startswith("AnonHugePages:"):
                return int(line.split()[1]) << 10
    except OSError:
        pass
    return 0


@dataclass
class Limits:
    """dram: GB/s; peaks: operations a second by kind, see _native.peak_kinds(); dram_bytes: memory read for dram."""

    dram: float
    dram_bytes: int
    peaks: dict[str, float]

    @property
    def int8_kind(self) -> str | None:
        """The fastest kind of integer arithmetic; None where no kind could be measured."""
        kinds = [kind for kind in self.peaks if kind.endswith("_int8")]
        return max(kinds, key=self.peaks.__getitem__) if kinds else None

    def better(self, other: "Limits") -> "Limits":
        """The higher of each: virtual machines have good and bad moments, and what they reached once they can do."""
        peaks = {kind: max(peak, other.peaks[kind]) for kind, peak in self.peaks.items()}
        return Limits(max(self.dram, other.dram), self.dram_bytes, peaks)

    def roof_seconds(self, nbytes: float, operations: float) -> float:
        """The least time for reading nbytes and computing so many operations in int8."""
        arithmetic = operations / self.peaks[self.int8_kind] if self.int8_kind else 0.0
        return max(nbytes / (self.dram * 1e9), arithmetic)

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "int8_kind": self.int8_kind}


def dram_buffer_bytes(asked: int, num_threads: int) -> int:
    """Several times the last-level cache, as far as a quarter of the free memory goes."""
    wanted = asked or max(1 << 30, 4 * cache_bytes())
    return max(min(wanted, available_bytes() // 4), num_threads * _MIB)


def measure_limits(cpus: list[int], nbytes: int, seconds: float) -> Limits:
    """With a thread on each of cpus."""
    peaks = {kind: _native.measure_peak(kind, cpus, seconds) for kind in _native.peak_kinds()}
    return Limits(_native.measure_dram_read(cpus, nbytes, seconds), nbytes, peaks)
