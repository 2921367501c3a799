"""kt_vllm.int4_few_tokens where no GPU is: its numbers, and that it compiles for one."""

import importlib.util
import re
import sys
from pathlib import Path

import pytest

from tests.unit.test_plugin import run

triton = pytest.importorskip("triton", reason="Triton is not installed")
pytest.importorskip("torch")
from triton.backends.compiler import GPUTarget  # noqa: E402

from tests import handover_device  # noqa: E402

FILE = Path(__file__).resolve().parents[2] / "kt_vllm" / "int4_few_tokens.py"


@pytest.mark.e2e
def test_numbers() -> None:
    run(
        "import sys, pytest\n"
        "sys.exit(pytest.main(['-q', '-p', 'no:cacheprovider', 'tests/kernels/few_tokens_interpreted.py']))",
        TRITON_INTERPRET="1",
    )


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("parts", [1, 4])
@pytest.mark.parametrize("num_tokens", [1, 4])
def test_compiles_without_exchange_between_threads(
    num_tokens: int, parts: int, capability: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    for name, stub in handover_device.triton_utils().items():
        monkeypatch.setitem(sys.modules, name, stub)
    spec = importlib.util.spec_from_file_location("few_tokens_compiled", FILE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    pointers = {"x": "*i32", "packed": "*i32", "scale": "*i32", "zero": "*i32", "output": "*bf16"}
    pointers |= {"partial": "*fp32", "arrived": "*i32"}
    sizes = {"num_tokens": "i32", "num_inputs": "i32", "num_outputs": "i32"}
    constants = {"TOKENS": num_tokens, "PARTS": parts, "WARPS": module._WARPS}
    signature = pointers | sizes
    source = triton.compiler.ASTSource(
        fn=module._few_tokens,
        signature=signature | dict.fromkeys(constants, "constexpr"),
        constexprs=constants,
        attrs={(i,): [["tt.divisibility", 16]] for i, name in enumerate(signature) if name not in ("x", "num_tokens")},
    )
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": module._WARPS})
    assert compiled.asm["cubin"], "ptxas took it"
    ptx = compiled.asm["ptx"]
    # Words and scales by 16 bytes, and 20 products a group: a thread has what it needs, up to the last sums.
    assert len(re.findall(r"ld\.global\.nc\.L1::no_allocate\.v4\.b32", ptx)) == 5
    assert len(re.findall(r"mma\.sync", ptx)) == 20
    loop = ptx[ptx.index("ld.global") : ptx.rindex("mma.sync")]
    assert "shared" not in loop and "shfl" not in loop and "bar.sync" not in loop
