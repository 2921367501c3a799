"""kt_vllm.handover without a device: its modules with Triton's interpreter, CPU tensors in place of the device's."""

import contextlib
import ctypes
import importlib
import importlib.machinery
import sys
import time
import types
from collections.abc import Iterator

import pytest
import torch
import triton
import triton.language as tl

PACKAGE = "kt_vllm.handover"


def triton_utils() -> dict[str, types.ModuleType]:
    """vLLM's triton_utils as it is on a machine with a GPU; importing vLLM itself takes seconds, and here no Triton."""
    modules = {name: types.ModuleType(name) for name in ("vllm", "vllm.triton_utils")}
    for name, module in modules.items():
        module.__spec__ = importlib.machinery.ModuleSpec(name, None)
    modules["vllm.triton_utils"].tl, modules["vllm.triton_utils"].triton = tl, triton
    return modules


class Event:
    """What was queued on a CPU is done."""

    def record(self) -> None:
        pass

    def query(self) -> bool:
        return True


class Driver:
    """libcuda.so.1 of a device whose stream is this thread."""

    def __init__(self, _: str) -> None:
        self.status = 0
        self.cuLaunchHostFunc = self.launch = Function(self)


class Function:
    def __init__(self, driver: Driver) -> None:
        self.driver = driver

    def __call__(self, stream: int, function: int, argument: int) -> int:
        if self.driver.status == 0:
            ctypes.CFUNCTYPE(None, ctypes.c_void_p)(function)(argument)
        return self.driver.status


@contextlib.contextmanager
def modules() -> Iterator[types.SimpleNamespace]:
    """device_layer, ways, kernels and staging; afterwards what was imported before is so again, and nothing else."""
    with pytest.MonkeyPatch.context() as patch:
        for name in own_modules():
            patch.delitem(sys.modules, name)
        for name, module in triton_utils().items():
            patch.setitem(sys.modules, name, module)
        patch.setenv("TRITON_INTERPRET", "1")
        names = ("device_layer", "kernels", "staging", "ways")
        loaded = types.SimpleNamespace(**{name: importlib.import_module(f"{PACKAGE}.{name}") for name in names})
        # The interpreter has no inline assembly. The loads and stores of one thread on x86 are in order.
        patch.setattr(loaded.kernels, "_store_release", triton.jit(plain_store))
        patch.setattr(loaded.kernels, "_poll", triton.jit(plain_poll))
        patch.setattr(loaded.ways.ctypes, "CDLL", Driver)
        patch.setattr(torch.cuda, "Event", Event)
        patch.setattr(torch.cuda, "current_stream", lambda: types.SimpleNamespace(cuda_stream=0))
        try:
            yield loaded
        finally:
            for name in own_modules():
                del sys.modules[name]


def own_modules() -> list[str]:
    return [name for name in sys.modules if name.split(".")[:2] == PACKAGE.split(".")]


def plain_store(pointer, word):
    tl.store(pointer, word)


def plain_poll(pointer, value):
    while tl.load(pointer) != value:
        pass


def await_reply(slot, seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while slot.reply.item() != slot.last_request():
        assert time.monotonic() < deadline, "no reply"


class CopyWay:
    """A way on CPU tensors that keeps to the protocol, and notes what is asked of it."""

    name = "copy"

    def __init__(self, handover: types.SimpleNamespace) -> None:
        self.handover, self.calls = handover, []

    def send(self, slot, layer, hidden_states, topk_weights, topk_ids, padding) -> None:
        assert all(x.is_contiguous() for x in (hidden_states, topk_weights, topk_ids))
        self.calls.append(("send", slot, len(hidden_states)))
        self.handover.ways._copy_to(slot, hidden_states, topk_weights, topk_ids, padding)
        word = (slot.last_request() + 1) << 32 | self.handover.staging.message(layer, len(hidden_states))
        slot.request.fill_(word)

    def receive(self, slot, output) -> None:
        self.calls.append(("receive", slot, len(output)))
        await_reply(slot)
        output.copy_(slot.output[: len(output)])
