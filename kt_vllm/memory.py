"""How much host memory there is, and a refusal before loading rather than a kill during it."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath

from kt_vllm import _native
from kt_vllm.checkpoint import LayerExperts
from kt_vllm.errors import ResourceError

GIB = 1 << 30


def available_host_memory(proc_root: str = "/proc", cgroup_root: str = "/sys/fs/cgroup") -> int:
    """Bytes this process can still take without swapping or being killed.

    The least of the kernel's MemAvailable and what each control group (v1 or v2) above the process leaves; page cache
    on the inactive list counts as free, since the kernel drops it first. Raises ResourceError where there is no /proc.
    """
    return min([_mem_available(Path(proc_root)), *_cgroup_available(Path(proc_root), Path(cgroup_root))])


def check_memory(needed: Mapping[str, int], available: int) -> None:
    """Raises ResourceError when the sum of `needed` (what for -> bytes) is more than `available` bytes."""
    total = sum(needed.values())
    if total <= available:
        return
    parts = ", ".join(f"{what} {_gib(count)}" for what, count in needed.items())
    raise ResourceError(
        f"loading needs {_gib(total)} of host memory ({parts}) and {_gib(available)} are available: free memory or "
        "raise the container's limit, use a smaller quantisation, or a machine with more"
    )


def executor_workspace_bytes(
    layers: Iterable[LayerExperts], *, isa: str, cpus: Sequence[int], max_num_tokens: int, top_k: int
) -> int:
    """Host memory that the executor takes for its calls, beside the weights. Reads no weights."""
    executor = _native.Executor(isa=isa, cpus=list(cpus), max_num_tokens=max_num_tokens)
    try:
        distinct = {tuple((t.type, t.shape) for t in (x.gate, x.up, x.down)): x for x in layers}
        tensors = [
            [_native.ExpertTensor(t.type, t.shape, list(t.spans)) for t in (x.gate, x.up, x.down)]
            for x in distinct.values()
        ]
        return max((executor.workspace_bytes(top_k, executor.add_layer(*three)) for three in tensors), default=0)
    finally:
        executor.close()


def _gib(count: int) -> str:
    return f"{count / GIB:.2f} GiB"


def _mem_available(proc_root: Path) -> int:
    path = proc_root / "meminfo"
    try:
        fields = dict(line.split(":", 1) for line in path.read_text().splitlines() if ":" in line)
        return int(fields["MemAvailable"].split()[0]) * 1024  # the kernel's "kB" are KiB
    except (OSError, KeyError, ValueError, IndexError):
        raise ResourceError(
            f"{path} has no MemAvailable, by which free host memory is known: run on Linux with /proc mounted"
        ) from None


def _cgroup_available(proc_root: Path, cgroup_root: Path) -> Iterator[int]:
    """What each control group from the process's own up to the root leaves; none where nothing is limited."""
    try:
        lines = (proc_root / "self" / "cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        number, controllers, path = line.split(":", 2)
        if number == "0" and not controllers:
            names = ("memory.max", "memory.current", "inactive_file")
            mount = cgroup_root
        elif "memory" in controllers.split(","):
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
            mount = cgroup_root / "memory"
        else:
            continue
        # A container may see the host's path, or one above its own root, and then only the mount's root exists.
        parts = [p for p in PurePosixPath(path).parts if p not in ("/", "..")]
        for depth in range(len(parts), -1, -1):
            left = _left_in(mount.joinpath(*parts[:depth]), *names)
            if left is not None:
                yield left


def _left_in(folder: Path, limit_name: str, usage_name: str, reclaimable_name: str) -> int | None:
    limit, usage = _number(folder / limit_name), _number(folder / usage_name)
    if limit is None or usage is None:
        return None
    try:
        stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        reclaimable = int(stat[reclaimable_name])
    except (OSError, ValueError, KeyError):
        reclaimable = 0
    return max(0, limit - max(0, usage - reclaimable))


def _number(path: Path) -> int | None:
    """None: not there, or "max"."""
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return None
