"""The kernels of the hand-over, compiled for NVIDIA GPUs without one: what the order of both sides rests on."""

import importlib.util
import re
import sys
from pathlib import Path

import pytest

triton = pytest.importorskip("triton", reason="Triton is not installed")
pytest.importorskip("torch")
from triton.backends.compiler import GPUTarget  # noqa: E402

from tests import handover_device  # noqa: E402

KERNELS = Path(__file__).resolve().parents[2] / "kt_vllm" / "handover" / "kernels.py"
ROW_POINTERS = ("hidden_states", "staged_hidden_states", "staged_output", "output")
THREADS = 256  # kernels._NUM_WARPS


@pytest.fixture(scope="module")
def kernels(tmp_path_factory):
    """A copy of its own, which the interpreter of other tests does not know."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("TRITON_INTERPRET", raising=False)
        patch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("triton")))
        for name, module in handover_device.triton_utils().items():
            patch.setitem(sys.modules, name, module)
        spec = importlib.util.spec_from_file_location("handover_kernels", KERNELS)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        assert module._NUM_WARPS * 32 == THREADS
        yield module


def send_rows(kernels, dtype="bf16", hidden_size=7168, top_k=8, has_padding=True, one_row=False):
    signature = {
        "hidden_states": f"*{dtype}", "weights": "*fp32", "ids": "*i32", "padding": "*i1" if has_padding else "*i32",
        "staged_hidden_states": f"*{dtype}", "staged_weights": "*fp32", "staged_ids": "*i32",
        "request": "*i64", "sent": "*i32", "arrived": "*i32", "message": "i32",
    }  # fmt: skip
    sizes = {
        "hidden_size": hidden_size,
        "top_k": top_k,
        "HIDDEN_BLOCK": triton.next_power_of_2(hidden_size),
        "TOP_K_BLOCK": triton.next_power_of_2(top_k),
        "HAS_PADDING": has_padding,
        "ONE_ROW": one_row,
    }
    return kernels._send_rows, signature, sizes, kernels._NUM_WARPS


def receive_rows(kernels, dtype="bf16", hidden_size=7168, wait=True):
    signature = {"staged_output": f"*{dtype}", "output": f"*{dtype}", "reply": "*i32", "sent": "*i32"}
    sizes = {"hidden_size": hidden_size, "HIDDEN_BLOCK": triton.next_power_of_2(hidden_size), "WAIT": wait}
    return kernels._receive_rows, signature, sizes, kernels._NUM_WARPS


def request(kernels):
    return kernels._request, {"request": "*i64", "sent": "*i32", "message": "i32"}, {}, 1


def await_reply(kernels):
    return kernels._await_reply, {"reply": "*i32", "sent": "*i32"}, {}, 1


def instructions(kernel, capability: int) -> list[str]:
    """Of the PTX, labels among them; without declarations, comments and line numbers."""
    function, signature, sizes, num_warps = kernel
    source = triton.compiler.ASTSource(
        fn=function,
        signature=signature | dict.fromkeys(sizes, "constexpr"),
        constexprs=sizes,
        # What a launch finds out about addresses from the caching allocator and of pinned memory.
        attrs={(i,): [["tt.divisibility", 16]] for i, name in enumerate(signature) if name in ROW_POINTERS},
    )
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": num_warps})
    assert compiled.asm["cubin"], "ptxas took it"
    ptx = re.sub(r"//.*", "", compiled.asm["ptx"])
    body = ptx[ptx.index("{", ptx.index(".entry")) : ptx.index("$L__func_end")]
    lines = [part.strip() for line in body.splitlines() for part in line.split(";")]
    return [
        re.sub(r"^@!?%(p\d+|other)\s+(?!bra \$L_end)", "", line)
        for line in lines
        if line and not line.startswith((".loc", ".reg"))
    ]


def at(lines: list[str], pattern: str) -> list[int]:
    return [i for i, line in enumerate(lines) if re.match(pattern, line)]


ANY_STORE = r"(st|red)\.(?!shared)"
ANY_LOAD = r"ld\.(?!param|shared)"
BARRIER = r"bar(rier)?\."
REQUEST = r"st\.release\.sys\.global\.u64"
POLL = r"ld\.acquire\.sys\.global\.u32"

CAPABILITIES = pytest.mark.parametrize("capability", [80, 89, 90])


@CAPABILITIES
@pytest.mark.parametrize("one_row", [False, True])
@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize(("hidden_size", "top_k", "has_padding"), [(7168, 8, True), (7168, 8, False), (2880, 6, True)])
def test_a_request_comes_after_all_rows(kernels, capability, dtype, hidden_size, top_k, has_padding, one_row):
    lines = instructions(send_rows(kernels, dtype, hidden_size, top_k, has_padding, one_row), capability)
    (request,), stores = at(lines, REQUEST), at(lines, ANY_STORE)
    atomics, barriers = at(lines, r"atom\."), at(lines, BARRIER)
    assert len(atomics) == (0 if one_row else 1)
    assert barriers and barriers[0] < request
    for atomic in atomics:
        assert re.match(r"atom\.global\.gpu\.acq_rel\.add\.[su]32", lines[atomic])
        assert barriers[0] < atomic < request
    # Between the barrier that all rows are before and the release: the device's own words.
    assert stores[-1] == request
    own = [i for i in stores if barriers[0] < i < request]
    assert len(own) == (1 if one_row else 2) and all("v" not in lines[i].split("[")[0] for i in own)
    check_one_thread(lines, request)
    rows = at(lines[: barriers[0]], r"st\.global\.v4\.b32")
    wide = triton.next_power_of_2(hidden_size) * 2 // 16 // THREADS
    assert len(rows) == len(at(lines[: barriers[0]], r"ld\.global\.v4\.b32")) == wide
    assert len([i for i in stores if i < barriers[0]]) == wide + 2, "rows, ids and weights"


@CAPABILITIES
@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize("hidden_size", [7168, 2880])
def test_rows_are_read_after_the_reply(kernels, capability, dtype, hidden_size):
    lines = instructions(receive_rows(kernels, dtype, hidden_size), capability)
    poll, barrier = check_wait(lines)
    wide = triton.next_power_of_2(hidden_size) * 2 // 16 // THREADS
    loads, stores = at(lines, r"ld\.global\.v4\.b32"), at(lines, r"st\.global\.v4\.b32")
    assert len(loads) == len(stores) == wide and all(barrier < i for i in loads + stores)
    others = [i for i in at(lines, ANY_LOAD) if i not in (poll, *loads)]
    assert len(others) == 1 and others[0] < poll, "sent is read once, before the loop"
    assert at(lines, ANY_STORE) == stores


def test_rows_are_read_alone_behind_a_program_that_waits(kernels):
    lines = instructions(receive_rows(kernels, wait=False), 90)
    assert not at(lines, POLL) and not at(lines, BARRIER)
    assert at(lines, ANY_STORE) == at(lines, r"st\.global\.v4\.b32") != []


def check_wait(lines: list[str]) -> tuple[int, int]:
    """The place of the load that polls, which is in a loop and one thread's, and of the barrier behind it."""
    (poll,), (barrier,) = at(lines, POLL), at(lines, BARRIER)
    labels = {line.rstrip(":"): i for i, line in enumerate(lines) if line.endswith(":")}
    back = [i for i in at(lines, r"bra") if labels[lines[i].split()[-1]] < poll < i]
    assert len(back) == 1 and back[0] < barrier
    check_one_thread(lines, poll)
    return poll, barrier


def check_one_thread(lines: list[str], place: int) -> None:
    """All threads but the first jump over it."""
    ahead = [line for line in lines[max(0, place - 6) : place] if not line.endswith(":")]
    assert [re.split(r"[ ,\t]+", line) for line in ahead[-3:]] == [
        ["mov.u32", "%thread", "%tid.x"],
        ["setp.ne.u32", "%other", "%thread", "0"],
        ["@%other", "bra", "$L_end"],
    ], ahead


@CAPABILITIES
def test_kernels_beside_copies(kernels, capability):
    lines = instructions(request(kernels), capability)
    (store,) = at(lines, REQUEST)
    assert at(lines, ANY_STORE)[-1] == store and len(at(lines, ANY_STORE)) == 2
    lines = instructions(await_reply(kernels), capability)
    check_wait(lines)
    assert at(lines, ANY_STORE) == []
