"""--kt-gpu-quant and gpu_quant of rules: which dense weight is kept how, what that takes, what fits a GPU."""

from pathlib import Path

import pytest

from kt_vllm.config import DensePlacement, KTConfig
from kt_vllm.dense_placement import device_bytes, refusals, report, settle
from kt_vllm.dense_quant import INT4_GROUP, DeviceBudget, choose, fitting, weight_bytes, why_not
from kt_vllm.errors import ConfigError, ResourceError
from kt_vllm.families import find_family
from kt_vllm.gpu_memory import (
    CONTEXT_AND_GRAPHS_BYTES,
    ServingLimits,
    default_batch,
    device_budget,
    kv_bytes_per_token,
)
from kt_vllm.placement import Decision, Module, Placement
from tests.unit.test_plugin import run

# DeepSeek-R1: rows and columns of each linear layer; how many of the 61 layers have it.
R1 = {
    "self_attn.q_a_proj": (1536, 7168, range(61)),
    "self_attn.kv_a_proj_with_mqa": (576, 7168, range(61)),
    "self_attn.q_b_proj": (128 * 192, 1536, range(61)),
    "self_attn.kv_b_proj": (128 * 256, 512, range(61)),
    "self_attn.o_proj": (7168, 128 * 128, range(61)),
    "mlp.gate_proj": (18432, 7168, range(3)),
    "mlp.up_proj": (18432, 7168, range(3)),
    "mlp.down_proj": (7168, 18432, range(3)),
    "mlp.shared_experts.gate_proj": (2048, 7168, range(3, 61)),
    "mlp.shared_experts.up_proj": (2048, 7168, range(3, 61)),
    "mlp.shared_experts.down_proj": (7168, 2048, range(3, 61)),
}
R1_CONFIG = {
    "num_hidden_layers": 61,
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "vocab_size": 129280,
    "num_attention_heads": 128,
    "num_key_value_heads": 128,
    "q_lora_rank": 1536,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
}
FAMILY = find_family("deepseek2")
GIB = 1 << 30


def placed(modules: dict, config: KTConfig | None = None, **gpu_quants: str) -> Placement:
    """gpu_quants: stem with "_" for "." -> gpu_quant of a rule."""
    decisions = [Decision(Module("model.embed_tokens", None, 129280 * 7168), gpu_quant="auto")]
    decisions += [Decision(Module("lm_head", None, 129280 * 7168), gpu_quant="auto")]
    for stem, (rows, cols, layers) in modules.items():
        quant = gpu_quants.get(stem.replace(".", "_"), "auto")
        by = {} if quant == "auto" else {"gpu_quant": f"r.yaml:{len(stem)}"}
        for layer in layers:
            name = f"model.layers.{layer}.{stem}"
            module = Module(name, layer, rows * cols, matrix=(rows, cols), kept=stem in FAMILY.kept)
            decisions.append(Decision(module, gpu_quant=quant, by=by))
    for layer in range(3, 61):  # the router, which vLLM keeps in the model's type
        decisions.append(Decision(Module(f"model.layers.{layer}.mlp.gate", layer, 256 * 7168), gpu_quant="auto"))
    return Placement(config or KTConfig(gguf="g"), None, tuple(decisions), {})


# GB: what it may be for all 61 layers with embedding, head and MLA's matrices.
@pytest.mark.parametrize(("quant", "limit"), [("bf16", 37.0), ("fp8", 21.5), ("int4", 14.5)])
def test_deepseek_r1_in_each(quant: str, limit: float) -> None:
    weights = sum(rows * cols * len(layers) for rows, cols, layers in R1.values())
    assert weights == pytest.approx(15.157e9, rel=1e-3)
    fixed = 2 * (2 * 129280 * 7168 + 61 * 32768 * 512 + 58 * 256 * 7168)  # embedding, head, kv_b_proj, routers
    weights -= 61 * 32768 * 512
    per_weight = {"bf16": 2, "fp8": 1 + 2 / 128, "int4": (4 + 20 / INT4_GROUP) / 8}[quant]
    got = device_bytes(settle(placed(R1), quant), FAMILY, 2)
    assert got == fixed + weights * per_weight
    assert 0.9 * limit < got / 1e9 < limit


def test_shapes_that_do_not_fit_take_the_next_more_exact() -> None:
    assert fitting("int4", 64, 64) == ("int4", None)
    assert fitting("int4", 64, 96) == ("bf16", f"int4 needs columns in groups of {INT4_GROUP} and there are 96")
    assert fitting("int4", 96, 128) == ("bf16", "int4 needs rows in groups of 64 and there are 96")
    assert fitting("fp8", 64, 64) == ("bf16", "fp8 needs columns in groups of 128 and there are 64")
    assert fitting("int4", 64, 96, ("bf16", "int4"))[0] == "bf16"
    assert fitting("fp8", 576, 7168) == ("fp8", None) and fitting("bf16", 1, 1) == ("bf16", None)
    assert why_not("int4", 2112, 7168) is None
    assert weight_bytes("fp8", 576, 256, 2) == 576 * 256 + 2 * 576 * 2
    assert weight_bytes("int4", 64, 64, 2) == 64 * (32 + 2) + 64 // 2
    assert weight_bytes("bf16", 3, 5, 2) == 30


def test_what_the_workers_are_told_and_what_is_logged() -> None:
    modules = {"self_attn.o_proj": (64, 128, range(3)), "mlp.down_proj": (64, 96, range(2))}
    placement = settle(placed(modules, self_attn_o_proj="fp8"), "int4")
    assert placement.config.dense == (DensePlacement("model.layers.{}.self_attn.o_proj", (0, 1, 2), "fp8"),)
    assert KTConfig.from_dict(placement.config.to_dict()) == placement.config
    lines = report(placement)
    assert lines[0].startswith("dense modules on the device: 2 in bf16, 3 in fp8; embedding, head")
    assert lines[1] == (
        "2 dense modules are in bf16, as int4 needs columns in groups of 64 and there are 96: "
        "model.layers.0.mlp.down_proj, model.layers.1.mlp.down_proj."
    )
    plain = settle(placed(modules))
    assert plain.config.dense == () and report(plain) == []


def test_what_attention_computes_with_views_of_is_kept() -> None:
    placement = settle(
        placed({"self_attn.kv_b_proj": (64, 128, range(2)), "self_attn.o_proj": (64, 128, range(2))}), "int4"
    )
    assert [entry.module for entry in placement.config.dense] == ["model.layers.{}.self_attn.o_proj"]
    assert report(placement)[1] == (
        "2 dense modules are in bf16, as attention computes with views of it, and would keep a second copy of one in "
        "fewer bits: model.layers.0.self_attn.kv_b_proj, model.layers.1.self_attn.kv_b_proj."
    )
    asked = placed({"self_attn.kv_b_proj": (64, 128, range(2))}, self_attn_kv_b_proj="int4")
    (sentence,) = refusals(asked, "bfloat16")
    assert sentence.endswith("MLA's kv_b_proj stay in the model's type; match other linear layers, or give auto.")


def test_refusals() -> None:
    with pytest.raises(ConfigError, match=r"--kt-gpu-quant is 'int3'; give one of auto, bf16, fp8, int4\."):
        KTConfig(gguf="g", gpu_quant="int3")
    with pytest.raises(ConfigError, match=r"dense is \(\{'x': 1\},\); it is made from"):
        KTConfig(gguf="g", dense=({"x": 1},))  # type: ignore[arg-type]
    placement = placed({"self_attn.o_proj": (64, 128, range(3))}, self_attn_o_proj="fp8")
    assert refusals(placement, "bfloat16") == refusals(placement, "float16") == []
    (sentence,) = refusals(placement, "bfloat16", ("bf16", "int4"))
    assert sentence == (
        "r.yaml:16: gpu_quant is fp8, for which there are no kernels on this platform; give bf16, int4 or auto."
    )
    (sentence,) = refusals(placement, "float32")
    assert "the model runs in float32, for which there are no kernels; give --dtype bfloat16" in sentence
    placement = placed({"self_attn.o_proj": (64, 128, range(3))}, self_attn_o_proj="bf16")
    (sentence,) = refusals(placement, "float16")
    assert sentence.endswith("gpu_quant is bf16 and the model runs in float16; give auto or --dtype bfloat16.")


def test_kv_cache_of_a_token() -> None:
    limits = ServingLimits(1024)
    assert kv_bytes_per_token(R1_CONFIG, limits) == 61 * 576 * 2
    both = ServingLimits(1024, tensor_parallel=2, pipeline_parallel=2, kv_itemsize=1)
    assert kv_bytes_per_token(R1_CONFIG, both) == 31 * 576
    mixtral = {"num_hidden_layers": 32, "hidden_size": 4096, "num_attention_heads": 32, "num_key_value_heads": 8}
    assert kv_bytes_per_token(mixtral, limits) == 32 * 2 * 8 * 128 * 2
    assert kv_bytes_per_token({**mixtral, "head_dim": 64}, ServingLimits(1, tensor_parallel=16)) == 32 * 2 * 64 * 2


def sizes(**limits: int) -> dict[str, int]:
    return {q: device_bytes(settle(placed(R1), q), FAMILY, 2, **limits) for q in ("bf16", "fp8", "int4")}


@pytest.mark.parametrize(
    ("gib", "max_model_len", "quant"),
    [(80, 32768, "bf16"), (80, 163840, "bf16"), (40, 32768, "fp8"), (32, 8192, "fp8"), (32, 65536, "int4")],
)
def test_auto_takes_the_most_exact_that_leaves_the_kv_cache(gib: int, max_model_len: int, quant: str) -> None:
    limits = ServingLimits(max_model_len)
    taken, reason = choose(sizes(), device_budget(R1_CONFIG, limits, gib * GIB, 0))
    assert taken == quant
    assert reason.startswith(f"--kt-gpu-quant auto takes {quant} for the dense weights: bf16 34.") and "less" in reason


def test_auto_on_24_gib_with_32_k_of_context() -> None:
    limits = ServingLimits(32768)
    budget = device_budget(R1_CONFIG, limits, 24 * GIB, 0)
    assert budget.kv_cache == 32768 * 70272
    assert default_batch(24 * GIB) == (2048, 256) and default_batch(80 * GIB)[0] == 8192
    assert choose(sizes(), budget)[0] == "int4"
    with pytest.raises(ResourceError) as raised:
        choose(sizes(), device_budget(R1_CONFIG, ServingLimits(65536), 24 * GIB, 0))
    assert "the dense weights take bf16 34." in str(raised.value) and "give a smaller --max-model-len" in str(
        raised.value
    )


def test_auto_counts_what_was_asked_for_and_what_else_is_there() -> None:
    budget = DeviceBudget(100, 0.9, 10, {"a": 20, "b": 0})
    assert budget.for_dense == 60
    assert choose({"bf16": 61, "fp8": 60, "int4": 1}, budget)[0] == "fp8"
    asked = device_budget(R1_CONFIG, ServingLimits(32768, kv_cache_memory_bytes=123), GIB, 1001)
    assert asked.kv_cache == 123 and asked.taken["routed experts"] == 1001
    assert asked.taken["context and graphs"] == CONTEXT_AND_GRAPHS_BYTES
    row = 4 * 7168 + 128 * (3 * 192 + 256)
    assert asked.taken["activations"] == 2 * (2048 * row + 65536 * (576 + 128 * 256))
    two = device_budget(R1_CONFIG, ServingLimits(32768, tensor_parallel=2), GIB, 1001)
    assert two.taken["routed experts"] == 501 and two.taken["activations"] < asked.taken["activations"]
    mixtral = {"num_hidden_layers": 32, "hidden_size": 4096, "num_attention_heads": 32, "vocab_size": 32000}
    row = 4 * 4096 + 2 * 3 * 4096
    assert device_budget(mixtral, ServingLimits(1024), GIB, 0).taken["activations"] == 2048 * row * 2
    many = ServingLimits(1024, max_num_seqs=10**4)
    assert device_budget(mixtral, many, GIB, 0).taken["activations"] == 10**4 * 32000 * 12


def test_parallel_devices_share_the_layers() -> None:
    one, two = sizes(), sizes(tensor=2)
    for quant in one:
        assert 0.5 < two[quant] / one[quant] < 0.56  # queries' and keys' down-projections and routers are on both
    # The first stage: the embedding, and 31 layers of which three are dense.
    first = sum(rows * cols * len([i for i in layers if i < 31]) for rows, cols, layers in R1.values())
    assert sizes(pipeline=2)["bf16"] == 2 * (129280 * 7168 + first + 28 * 256 * 7168)


def test_the_rules_readme_names_every_kind() -> None:
    text = (Path(__file__).parents[2] / "rules" / "README.md").read_text()
    assert all(f"`{quant}`" in text for quant in ("auto", "bf16", "fp8", "int4"))


def test_preflight_on_a_gpu() -> None:
    run(
        "import sys, pytest\n"
        "sys.exit(pytest.main(['-q', '-p', 'no:cacheprovider', 'tests/unit/dense_preflight_on_a_gpu.py']))"
    )
