"""Host memory is what the kernel and every control group above the process leave."""

from pathlib import Path

import pytest

from kt_vllm import _native
from kt_vllm.checkpoint import ExpertSource, LayerExperts
from kt_vllm.errors import ResourceError
from kt_vllm.memory import GIB, available_host_memory, check_memory, executor_workspace_bytes

MAX = 9223372036854771712  # what v1 says for "no limit"


def machine(
    tmp_path: Path, groups: str, tree: dict[str, str | int], mem_available_kib: int = 64 << 20
) -> tuple[str, str]:
    proc, cgroup = tmp_path / "proc", tmp_path / "cgroup"
    (proc / "self").mkdir(parents=True)
    (proc / "meminfo").write_text(
        f"MemTotal: 99 kB\nMemFree: 1 kB\nMemAvailable:  {mem_available_kib} kB\nHugePages_Free: 0\n"
    )
    (proc / "self" / "cgroup").write_text(groups)
    cgroup.mkdir()
    for name, value in tree.items():
        (cgroup / name).parent.mkdir(parents=True, exist_ok=True)
        (cgroup / name).write_text(f"{value}\n")
    return str(proc), str(cgroup)


@pytest.mark.parametrize(
    ("groups", "tree", "expected"),
    [
        ("", {}, 64 * GIB),
        ("0::/\n", {"memory.stat": "inactive_file 5"}, 64 * GIB),
        ("0::/a\n", {"a/memory.max": "max", "a/memory.current": GIB}, 64 * GIB),
        ("0::/a\n", {"a/memory.max": 10 * GIB, "a/memory.current": 4 * GIB}, 6 * GIB),
        (
            "0::/a\n",
            {
                "a/memory.max": 10 * GIB,
                "a/memory.current": 9 * GIB,
                "a/memory.stat": f"anon 1\ninactive_file {7 * GIB}\nactive_file 3",
            },
            8 * GIB,
        ),
        # The parent leaves less than the group itself.
        (
            "0::/a/b\n",
            {
                "a/memory.max": 8 * GIB,
                "a/memory.current": 5 * GIB,
                "a/b/memory.max": 6 * GIB,
                "a/b/memory.current": GIB,
            },
            3 * GIB,
        ),
        # A container without a cgroup namespace sees the host's path under its own mount.
        ("0::/docker/1234\n", {"memory.max": 2 * GIB, "memory.current": GIB}, GIB),
        ("0::/../other\n", {"memory.max": 2 * GIB, "memory.current": GIB}, GIB),
        ("0::/a\n", {"a/memory.max": GIB, "a/memory.current": 2 * GIB}, 0),
        (
            "5:cpu,cpuacct:/x\n4:memory:/a\n0::/\n",
            {
                "memory/memory.limit_in_bytes": MAX,
                "memory/memory.usage_in_bytes": 50 * GIB,
                "memory/a/memory.limit_in_bytes": 4 * GIB,
                "memory/a/memory.usage_in_bytes": 3 * GIB,
                "memory/a/memory.stat": f"inactive_file 0\ntotal_inactive_file {2 * GIB}",
            },
            3 * GIB,
        ),
        ("4:memory:/\n", {"memory/memory.limit_in_bytes": MAX, "memory/memory.usage_in_bytes": 1}, 64 * GIB),
        ("1:name=systemd:/a:b\n", {}, 64 * GIB),
    ],
)
def test_available(tmp_path: Path, groups: str, tree: dict[str, str | int], expected: int) -> None:
    assert available_host_memory(*machine(tmp_path, groups, tree)) == expected


def test_the_kernel_may_have_less_than_the_group(tmp_path: Path) -> None:
    tree: dict[str, str | int] = {"a/memory.max": 10 * GIB, "a/memory.current": 0}
    assert available_host_memory(*machine(tmp_path, "0::/a\n", tree, mem_available_kib=1 << 20)) == GIB


def test_without_proc(tmp_path: Path) -> None:
    with pytest.raises(ResourceError, match=r"meminfo has no MemAvailable.*run on Linux"):
        available_host_memory(str(tmp_path), str(tmp_path))


def test_this_machine() -> None:
    assert 1 << 20 < available_host_memory() < 1 << 46


@pytest.mark.parametrize("isa", _native.available_isas())
def test_executor_workspace(tmp_path: Path, isa: str) -> None:
    """DeepSeek-R1 at 4096 tokens: some 100 MB of inputs (470 in tiles), 130 to 320 of intermediates, 134 of results."""
    path = tmp_path / "sparse"

    def layer(intermediate_size: int) -> LayerExperts:
        shapes = [(256, intermediate_size, 7168)] * 2 + [(256, 7168, intermediate_size)]
        nbytes = 256 * 7168 * intermediate_size // 256 * 144
        return LayerExperts(*(ExpertSource("Q4_K", shape, ((str(path), 0, nbytes),)) for shape in shapes))

    with path.open("wb") as file:
        file.truncate(layer(2048).gate.nbytes)
    options = {"isa": isa, "cpus": [0, 0], "top_k": 8}
    nbytes = executor_workspace_bytes([layer(2048), layer(256), layer(2048)], max_num_tokens=8192, **options)
    assert 300e6 < nbytes < 1.2e9
    assert nbytes == executor_workspace_bytes([layer(2048)], max_num_tokens=4096, **options)  # longer calls are cut
    assert executor_workspace_bytes([layer(256)], max_num_tokens=4096, **options) < nbytes
    assert executor_workspace_bytes([], max_num_tokens=4096, **options) == 0


def test_check_memory() -> None:
    check_memory({"experts": 6 * GIB, "dense": 2 * GIB}, 8 * GIB)
    with pytest.raises(ResourceError) as caught:
        check_memory({"expert weights": 376 * GIB, "dense weights": 2 * GIB}, 8 * GIB - 1)
    assert str(caught.value) == (
        "loading needs 378.00 GiB of host memory (expert weights 376.00 GiB, dense weights 2.00 GiB) and 8.00 GiB are "
        "available: free memory or raise the container's limit, use a smaller quantisation, or a machine with more"
    )
