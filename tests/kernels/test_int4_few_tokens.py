"""The product of benchmarks/int4_few_tokens.py where no GPU is: its numbers, and that it compiles for one."""

import importlib.util
import sys
from pathlib import Path

import pytest

from tests.unit.test_plugin import run

triton = pytest.importorskip("triton", reason="Triton is not installed")
pytest.importorskip("torch")
from triton.backends.compiler import GPUTarget  # noqa: E402

FILE = Path(__file__).resolve().parents[2] / "benchmarks" / "int4_few_tokens.py"


@pytest.mark.e2e
def test_numbers() -> None:
    run(
        "import sys, pytest\n"
        "sys.exit(pytest.main(['-q', '-p', 'no:cacheprovider', 'tests/kernels/few_tokens_interpreted.py']))",
        TRITON_INTERPRET="1",
    )


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("num_tokens", [1, 4])
def test_compiles_without_spilling(
    num_tokens: int, capability: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    spec = importlib.util.spec_from_file_location("few_tokens_compiled", FILE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    signature = {"x": "*i32", "packed": "*i64", "scale": "*i64", "zero": "*i32", "output": "*bf16"}
    aligned = {**signature, "num_inputs": "i32", "num_outputs": "i32"}
    sizes = {"TOKENS": num_tokens, "LANES": 8, "GROUPS": 16, "dtype": triton.language.bfloat16}
    source = triton.compiler.ASTSource(
        fn=module._few_tokens,
        signature=aligned | {"one": "i32"} | dict.fromkeys(sizes, "constexpr"),
        constexprs=sizes,
        attrs={(i,): [["tt.divisibility", 16]] for i in range(len(aligned))},
    )
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": 4})
    assert compiled.asm["cubin"], "ptxas took it"
    # Each thread reads its own words: no exchange but that of the sums at the end.
    ptx = compiled.asm["ptx"]
    loop = ptx[ptx.index("ld.global") : ptx.rindex("ld.global")]
    assert "shared" not in loop and "shfl" not in loop and "bar.sync" not in loop
    assert ptx.count("ld.global") >= 8 + 2 + 1 + 8 * num_tokens
