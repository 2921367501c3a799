"""Holds one MoE layer of kt-kernel for compare_kt_kernel.py: JSON lines in, JSON lines out. Needs numpy and kt-kernel.

Requests are {"op": NAME, ...}, NAME a method of _Layer.
"""

import ctypes
import importlib.util
import json
import mmap
import os
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

# The wheel has one extension for each of these, and picks by the same flags of the CPU.
_VARIANTS = (
    ("amx", {"amx_tile", "amx_int8", "amx_bf16"}),
    ("avx512_vbmi", {"avx512_vnni", "avx512_bf16", "avx512_vbmi"}),
    ("avx512_bf16", {"avx512_vnni", "avx512_bf16"}),
    ("avx512_vnni", {"avx512_vnni"}),
    ("avx512_base", {"avx512f", "avx512bw", "avx512dq", "avx512vl"}),
    ("avx2", {"avx2", "fma"}),
)
_CLASSES = {"AMXINT4": "AMXInt4_MOE", "AMXINT8": "AMXInt8_MOE", "AMXBF16": "AMXBF16_MOE", "LLAMAFILE": "MOE"}


def _extension(variant: str) -> ModuleType:
    """The compiled module alone: the package around it imports torch."""
    package = importlib.util.find_spec("kt_kernel")
    if package is None or not package.submodule_search_locations:
        raise SystemExit(f"{sys.executable} has no kt-kernel: pip install kt-kernel there")
    if variant == "auto":
        flags = set(Path("/proc/cpuinfo").read_text().partition("flags")[2].partition("\n")[0].split())
        variant = next(name for name, needed in _VARIANTS if needed <= flags)
    files = list(Path(package.submodule_search_locations[0]).glob(f"_kt_kernel_ext_{variant}.*.so"))
    if not files:
        raise SystemExit(f"this kt-kernel has no extension for {variant}")
    spec = importlib.util.spec_from_file_location("kt_kernel_ext", files[0])
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class _Repeated:
    """A file of some experts, over and over until there are num_experts of them, at `address`.

    copies: kt-kernel makes its own copy of each, so that they need not have memory of their own here.
    """

    def __init__(self, path: str, expert_bytes: int, num_experts: int, copies: bool) -> None:
        size = os.path.getsize(path)
        distinct = size // expert_bytes
        total = expert_bytes * num_experts
        if not copies or size % mmap.PAGESIZE:
            self._memory = np.tile(np.fromfile(path, np.uint8), -(-num_experts // distinct))
            self.address = self._memory.ctypes.data
            return
        libc = ctypes.CDLL(None, use_errno=True)
        libc.mmap.restype = ctypes.c_void_p
        libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
        no_reserve, fixed = 0x4000, 0x10
        repeats = -(-total // size)
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | no_reserve
        self.address = libc.mmap(None, repeats * size, 0, flags, -1, 0)
        with open(path, "rb") as file:
            for i in range(repeats):
                at = self.address + i * size
                if libc.mmap(at, size, mmap.PROT_READ, mmap.MAP_SHARED | fixed, file.fileno(), 0) != at:
                    raise SystemExit(f"mapping {path} failed: {os.strerror(ctypes.get_errno())}")


def _anonymous_bytes() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) << 10
    return 0


class _Layer:
    def load(self, request: dict[str, Any]) -> dict[str, Any]:
        """request: method, type, variant, threads, subpools, the layer's shape, max_tokens, paths, expert_bytes."""
        kt = _extension(request["variant"])
        experts, hidden, intermediate = request["experts"], request["hidden"], request["intermediate"]
        method = request["method"]
        # On one memory node it computes from the very memory it is given.
        copies = method != "LLAMAFILE" or request["subpools"] > 1
        pool = kt.WorkerPoolConfig()
        pool.subpool_count = request["subpools"]
        pool.subpool_numa_map = list(range(request["subpools"]))
        share, rest = divmod(request["threads"], request["subpools"])
        pool.subpool_thread_count = [share + (i < rest) for i in range(request["subpools"])]
        self._infer = kt.CPUInfer(pool)
        config = kt.moe.MOEConfig(experts, request["top_k"], hidden, intermediate, 0)
        config.pool = self._infer.backend_
        config.layer_idx = 0
        config.max_len = request["max_tokens"]
        self._map = np.arange(experts, dtype=np.int64)
        config.physical_to_logical_map = self._map.ctypes.data
        before = _anonymous_bytes()
        files = zip(request["paths"], request["expert_bytes"], strict=True)
        weights = [_Repeated(path, size, experts, copies) for path, size in files]
        config.gate_proj, config.up_proj, config.down_proj = [weight.address for weight in weights]
        if method == "LLAMAFILE":
            types = kt.kvcache.ggml_type
            type = getattr(types, request["type"])
            config.gate_type = config.up_type = config.down_type = type
            config.hidden_type = types.BF16
            config.m_block, config.group_min_len, config.group_max_len = 32, 10, request["max_tokens"]
        elif method == "AMXBF16":
            config.gate_scale = config.up_scale = config.down_scale = 0
        start = time.perf_counter()
        self._moe = getattr(kt.moe, _CLASSES[method])(config)
        self._infer.submit(self._moe.load_weights_task(self._map.ctypes.data))
        self._infer.sync()
        self._keep = weights
        return {
            "variant": getattr(kt, "__cpu_variant__", "?"),
            "load_seconds": time.perf_counter() - start,
            "anonymous_bytes": _anonymous_bytes() - before,
        }

    def inputs(self, request: dict[str, Any]) -> dict[str, Any]:
        """hidden [num_tokens, hidden] bfloat16 bits; ids [routings, num_tokens, top_k]; weights alike."""
        with np.load(request["path"]) as file:
            self._x = np.ascontiguousarray(file["hidden"])
            self._ids = [np.ascontiguousarray(ids, np.int64) for ids in file["ids"]]
            self._weights = [np.ascontiguousarray(weights, np.float32) for weights in file["weights"]]
        self._y = np.zeros_like(self._x)
        self._count = np.array([len(self._x)], np.int32)
        return {}

    def call(self, request: dict[str, Any]) -> dict[str, Any]:
        ids, weights = self._ids[request["routing"]], self._weights[request["routing"]]
        addresses = [a.ctypes.data for a in (ids, weights, self._x, self._y)]
        count, top_k = self._count.ctypes.data, ids.shape[1]
        start = time.perf_counter()
        self._infer.submit(self._moe.forward_task(count, top_k, *addresses, False))
        self._infer.sync()
        return {"seconds": time.perf_counter() - start}

    def output(self, request: dict[str, Any]) -> dict[str, Any]:
        np.save(request["path"], self._y)
        return {}


def main() -> None:
    # kt-kernel writes to standard output: the answers get a descriptor of their own.
    with os.fdopen(os.dup(1), "w", buffering=1) as answers:
        os.dup2(2, 1)
        layer = _Layer()
        for line in sys.stdin:
            request = json.loads(line)
            answers.write(json.dumps(getattr(layer, request["op"])(request)) + "\n")
        answers.flush()
        os._exit(0)  # its threads need not be joined


if __name__ == "__main__":
    main()
