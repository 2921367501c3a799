"""Loading, errors, threads: how the executor behaves around its calls."""

import ast
import ctypes
import os
import signal
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from kt_vllm import _native
from tests.moe_case import MoECase, load, make_executor, run, worker_cpus
from tests.tolerances import MAX_IDLE_CPU

SET_MEMPOLICY, MPOL_BIND = 238, 2  # x86-64 system call; linux/mempolicy.h


def new_executor(**options):
    return _native.Executor(**{"isa": "reference", "cpus": worker_cpus(2), "max_num_tokens": 64} | options)


def workers() -> list[Path]:
    tasks = Path("/proc/self/task").iterdir()
    return [task for task in tasks if (task / "comm").read_text().startswith("kt-worker-")]


def declared_names(body: list[ast.stmt]) -> set[str]:
    """Of classes and functions, and of what has a type."""
    named = {node.name for node in body if isinstance(node, ast.ClassDef | ast.FunctionDef)}
    return named | {node.target.id for node in body if isinstance(node, ast.AnnAssign)}


def test_stub_and_module_have_the_same_names():
    stub = Path(_native.__file__).parent / "_native.pyi"
    for node in ast.parse(stub.read_text()).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            assert hasattr(_native, node.name)
        if isinstance(node, ast.ClassDef) and node.name != "NativeError":
            declared = declared_names(node.body)
            public = {name for name in dir(getattr(_native, node.name)) if not name.startswith("_")}
            assert public == declared - {"__init__"}
    public = {name for name in dir(_native) if not name.startswith("_")}
    assert public == declared_names(ast.parse(stub.read_text()).body)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cpus": []}, "cpus is empty"),
        ({"cpus": [-1]}, "cpus has -1"),
        ({"max_num_tokens": 0}, "max_num_tokens is 0"),
        ({"nodes": [0]}, "nodes has 1 entries, expected 2"),
        ({"isa": "avx9"}, "avx9.*expected one of"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(_native.NativeError, match=message):
        new_executor(**options)


def test_isa_choice():
    isa, reason = _native.choose_isa("auto")
    assert isa == _native.available_isas()[0] and isa in reason
    assert _native.isas()[-1] == "reference"
    executor = new_executor(isa="auto")
    assert (executor.isa, executor.isa_reason) == (isa, reason)


def tensor(case, index, **changes):
    values = {"type": case.types[index], "shape": case.shapes[index], "spans": case.spans[index]} | changes
    return _native.ExpertTensor(**values)


def test_layer_errors(tmp_path):
    case = MoECase(tmp_path / "experts", ("Q4_K",) * 3)
    executor = new_executor()
    gate, up, down = case.tensors()

    def refused(message, **tensors):
        with pytest.raises(_native.NativeError, match=message):
            executor.add_layer(**({"gate": gate, "up": up, "down": down} | tensors))

    path, offset, size = case.spans[0][0]
    refused("tensor gate: cannot open .*/missing .No such file", gate=tensor(case, 0, spans=[("/missing", 0, size)]))
    refused("not a regular file", gate=tensor(case, 0, spans=[(str(tmp_path), 0, size)]))
    refused(f"hold {size - 144} bytes, expected {size}", gate=tensor(case, 0, spans=[(path, offset, size - 144)]))
    refused("hold more than", up=tensor(case, 1, spans=[(path, offset, size)] * 2))
    refused("hold more than", up=tensor(case, 1, spans=[(path, 0, 2**64 - 1)]))
    refused(f"is {case.path.stat().st_size} bytes long, expected", up=tensor(case, 1, spans=[(path, 2**64 - 1, size)]))
    refused("tensor up: shape is .6, 256, 512., expected .6, 256, 256.", up=tensor(case, 1, shape=(6, 256, 512)))
    refused("tensor down: shape is .5,", down=tensor(case, 2, shape=(5, 256, 256)))
    refused("tensor gate: shape is .0, 256, 256.", gate=tensor(case, 0, shape=(0, 256, 256)))
    odd = {"shape": (6, 256, 128)}
    refused("multiple of 256 for type Q4_K", gate=tensor(case, 0, **odd), up=tensor(case, 1, **odd),
            down=tensor(case, 2, shape=(6, 128, 256)))  # fmt: skip
    with pytest.raises(_native.NativeError, match="Q4_9"):
        tensor(case, 0, type="Q4_9")

    assert executor.add_layer(gate, up, down) == 0  # what was refused left nothing behind
    load(executor)
    run(executor, *case.inputs(3))


def test_truncated_file_is_refused(tmp_path):
    case = MoECase(tmp_path / "experts")
    os.truncate(case.path, case.path.stat().st_size - 1)
    with pytest.raises(_native.NativeError, match=r"tensor down: .* bytes long, expected at least .* truncated"):
        new_executor().add_layer(*case.tensors())


def test_file_that_shrinks_while_loading(tmp_path):
    case = MoECase(tmp_path / "experts")
    executor = new_executor()
    executor.add_layer(*case.tensors())
    whole = case.path.read_bytes()
    os.truncate(case.path, len(whole) // 2)
    with pytest.raises(_native.NativeError, match="met the end of the file"):
        load(executor)
    with pytest.raises(_native.NativeError, match="layer 0 is not loaded"):
        run(executor, *case.inputs(1))
    case.path.write_bytes(whole)
    load(executor)  # begins again
    run(executor, *case.inputs(1))


def test_file_that_vanishes_before_loading(tmp_path):
    case = MoECase(tmp_path / "experts")
    executor = new_executor()
    executor.add_layer(*case.tensors())
    case.path.unlink()
    with pytest.raises(_native.NativeError, match="cannot open"):
        executor.start_loading()


def test_progress(tmp_path):
    case = MoECase(tmp_path / "experts")
    executor = new_executor()
    assert executor.load_progress() == (0, 0, True)
    executor.add_layer(*case.tensors())
    assert executor.load_progress() == (0, 0, False)
    load(executor)
    assert executor.load_progress() == (case.num_bytes, case.num_bytes, True)
    executor.cancel_loading()  # nothing to cancel
    executor.add_layer(*case.tensors())
    with pytest.raises(_native.NativeError, match="layer 1 is not loaded"):
        run(executor, *case.inputs(1), layer=1)
    load(executor)
    assert executor.load_progress() == (case.num_bytes, case.num_bytes, True)  # the first layer is not read again
    assert (run(executor, *case.inputs(5)) == run(executor, *case.inputs(5), layer=1)).all()


def big_layer(path: Path) -> list[_native.ExpertTensor]:
    """3 GiB that take no disk: one sparse file for all tensors."""
    size = 1 << 30
    with path.open("wb") as file:
        file.truncate(size)
    return [_native.ExpertTensor("F32", (4, 8192, 8192), [(str(path), 0, size)]) for _ in range(3)]


@pytest.mark.parametrize("how", ["cancel_loading", "close"])
def test_cancel_while_loading(tmp_path, how):
    executor = new_executor()
    executor.add_layer(*big_layer(tmp_path / "sparse"))
    executor.start_loading()
    with pytest.raises(_native.NativeError, match="while loading is running"):
        executor.start_loading()
    while executor.load_progress()[0] == 0:
        pass
    begin = time.monotonic()
    getattr(executor, how)()
    assert time.monotonic() - begin < 1
    with pytest.raises(_native.NativeError, match="cancelled after" if how == "cancel_loading" else "is closed"):
        executor.load_progress()


def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")


@pytest.mark.parametrize("isa", _native.available_isas())
def test_loading_takes_the_weights_bytes_and_little_more(tmp_path, isa):
    case = MoECase(tmp_path / "experts", num_experts=16, hidden_size=512, intermediate_size=512)
    executor = new_executor(isa=isa)
    executor.add_layer(*case.tensors())
    before = resident()
    load(executor)
    assert case.num_bytes <= resident() - before < 1.05 * case.num_bytes


@pytest.mark.parametrize("nodes", [[0, 0], [0, 1], [1, 0, 0, 2, 1]])
def test_nodes(tmp_path, nodes):
    """Weights are cut into a slice a node; that changes no bit. The nodes may be made up: binding is best effort."""
    case = MoECase(tmp_path / "experts", ("Q4_K", "Q8_0", "Q6_K"), intermediate_size=512)
    expected = run(make_executor(case, isa="auto"), *case.inputs(50))
    executor = new_executor(isa="auto", cpus=worker_cpus(len(nodes)), nodes=nodes)
    executor.add_layer(*case.tensors())
    load(executor)
    assert executor.load_progress() == (case.num_bytes, case.num_bytes, True)
    assert (run(executor, *case.inputs(50)) == expected).all()
    report = executor.memory_report
    assert "GB of experts in host memory" in report and "% of it in huge pages" in report
    for node in set(nodes):
        assert f"node {node}: " in report


def test_workspace_bytes(tmp_path):
    """The workspace's own pages, when a call of the largest size has touched them, are no more than was said."""
    case = MoECase(tmp_path / "experts", ("Q8_0",) * 3, hidden_size=1024, intermediate_size=512)
    executor = make_executor(case, isa="auto", max_num_tokens=2048)
    inputs = case.inputs(2048, top_k=4)
    run(executor, *(values[:1] for values in inputs))  # what Python and the first call take beside
    limit = executor.workspace_bytes(4, 0)
    before = resident()
    run(executor, *inputs)
    assert resident() - before < 1.05 * limit + 5 * inputs[0].nbytes
    assert executor.workspace_bytes(8, 0) > limit
    with pytest.raises(_native.NativeError, match="layer is 1, expected 0 to 0"):
        executor.workspace_bytes(4, 1)
    with pytest.raises(_native.NativeError, match="top_k is 0"):
        executor.workspace_bytes(0, 0)


def test_misuse(tmp_path):
    case = MoECase(tmp_path / "experts")
    executor = make_executor(case)
    x, ids, weights = case.inputs(2)
    output = np.empty_like(x)
    addresses = [array.ctypes.data for array in (x, ids, weights, output)]
    for changes, message in [
        ({"layer": 1}, "layer is 1, expected 0 to 0"),
        ({"layer": -1}, "layer is -1"),
        ({"num_tokens": -1}, "num_tokens is -1"),
        ({"top_k": 0}, "top_k is 0"),
        ({"float_type": "int8"}, "float_type is .int8."),
        ({"output": 0}, "an address is null"),
    ]:
        names = ("hidden_states", "topk_ids", "topk_weights", "output")
        call = dict(zip(names, addresses, strict=True), layer=0, float_type="float32", num_tokens=2, top_k=2)
        with pytest.raises(_native.NativeError, match=message):
            executor.submit(**call | changes)
    with pytest.raises(_native.NativeError, match="without a submit"):
        executor.wait()
    executor.submit(0, *addresses, "float32", 2, 2)
    with pytest.raises(_native.NativeError, match=r"submit\(\) is called twice"):
        executor.submit(0, *addresses, "float32", 2, 2)
    with pytest.raises(_native.NativeError, match="between submit"):
        executor.start_loading()
    executor.wait()


def test_close(tmp_path):
    case = MoECase(tmp_path / "experts")
    before = len(workers())
    executor = make_executor(case)
    assert len(workers()) == before + 2
    x, ids, weights = case.inputs(64)
    output = np.empty_like(x)
    executor.submit(0, *(array.ctypes.data for array in (x, ids, weights, output)), "float32", *ids.shape)
    executor.close()  # waits for the call
    executor.close()
    assert len(workers()) == before
    for use in (executor.wait, executor.start_loading, executor.cancel_loading, lambda: executor.placement_report):
        with pytest.raises(_native.NativeError, match="is closed"):
            use()


def test_idle_workers_sleep(tmp_path):
    case = MoECase(tmp_path / "experts")
    executor = make_executor(case, num_workers=4)
    run(executor, *case.inputs(3))
    time.sleep(0.05)

    def cpu_seconds():
        return sum(int((task / "schedstat").read_text().split()[0]) for task in workers()) / 1e9

    before = cpu_seconds()
    time.sleep(1)
    assert cpu_seconds() - before < MAX_IDLE_CPU


@pytest.mark.parametrize(("num_workers", "num_calls"), [(1, 20_000), (2, 20_000), (5, 5_000)])
def test_storm_of_calls(tmp_path, num_workers, num_calls):
    """Calls of next to nothing, some after the workers fell asleep."""
    case = MoECase(tmp_path / "experts", num_experts=2, hidden_size=16, intermediate_size=16)
    executor = make_executor(case, num_workers=num_workers)
    x, ids, weights = case.inputs(2)
    output = np.empty_like(x)
    addresses = [array.ctypes.data for array in (x, ids, weights, output)]
    expected = run(executor, x, ids, weights)
    for i in range(num_calls):
        executor.submit(0, *addresses, "float32", 2, 2)
        executor.wait()
        assert output[1, 0] == expected[1, 0]
        if i % 500 == 0:
            time.sleep(0.002)
    assert (output == expected).all()


def test_nothing_leaks_into_workers():
    """The creating thread is bound to one CPU and strictly to one memory node; the workers are where they were told."""
    cpus = sorted(os.sched_getaffinity(0))
    found = {}

    def create():
        os.sched_setaffinity(0, {cpus[0]})
        node = ctypes.c_ulong(1)
        refused = ctypes.CDLL(None).syscall(SET_MEMPOLICY, MPOL_BIND, ctypes.byref(node), 8 * ctypes.sizeof(node))
        own_policy = Path(f"/proc/self/task/{threading.get_native_id()}/numa_maps").read_text().split()[1]
        assert refused or own_policy.startswith("bind")
        executor = new_executor(cpus=cpus)
        for task in workers():
            status = dict(line.split(":\t", 1) for line in (task / "status").read_text().splitlines())
            found[status["Name"]] = (
                {int(status["Cpus_allowed_list"])},
                (task / "numa_maps").read_text().split()[1],
                int(status["SigBlk"], 16),
            )
        found["report"] = executor.placement_report
        executor.close()

    thread = threading.Thread(target=create)
    thread.start()
    thread.join()
    all_signals = sum(1 << (s - 1) for s in signal.valid_signals())
    all_signals &= ~sum(1 << (s - 1) for s in (signal.SIGKILL, signal.SIGSTOP))  # these cannot be blocked
    faults = (signal.SIGSEGV, signal.SIGBUS, signal.SIGFPE, signal.SIGILL, signal.SIGTRAP)
    all_signals &= ~sum(1 << (s - 1) for s in faults)  # a crash still reaches the handlers that report it
    report = found.pop("report")
    assert report.startswith(f"pinned {len(cpus)} thread")
    for i, cpu in enumerate(cpus):
        affinity, policy, blocked = found[f"kt-worker-{i}"]
        assert affinity == {cpu}
        assert policy == "default" or "memory policy not reset" in report
        assert blocked & all_signals == all_signals


def test_cpu_that_is_not_there():
    executor = new_executor(cpus=[*worker_cpus(1), 4000])
    assert "1 not pinned to CPUs 4000 (Invalid argument)" in executor.placement_report
    allowed = {
        line for task in workers() for line in (task / "status").read_text().splitlines() if "allowed_list" in line
    }
    assert len(allowed) >= 2
