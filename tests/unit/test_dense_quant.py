"""--kt-gpu-quant and gpu_quant of rules: which dense weight is kept how, what that takes, what fits a GPU."""

from pathlib import Path

import pytest

from kt_vllm.config import DensePlacement, KTConfig
from kt_vllm.dense_placement import device_bytes, keep_head, refusals, report, settle
from kt_vllm.dense_quant import (
    INT4_GROUP,
    QUANTS,
    DeviceBudget,
    choose,
    fitting,
    for_head,
    head_rows,
    weight_bytes,
    why_not,
)
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


def placed(modules: dict, config: KTConfig | None = None, vocabulary: int = 129280, **gpu_quants: str) -> Placement:
    """gpu_quants: stem with "_" for "." -> gpu_quant of a rule; lm_head: also "--kt-gpu-quant int4"."""
    size = vocabulary * 7168
    flag, _, quant = gpu_quants.get("lm_head", "auto").rpartition(" ")
    by = {} if quant == "auto" else {"gpu_quant": flag or "r.yaml:1"}
    head = Module("lm_head", None, size, matrix=(vocabulary, 7168), is_head=True)
    decisions = [Decision(Module("model.embed_tokens", None, size), gpu_quant="auto")]
    decisions += [Decision(head, gpu_quant=quant, by=by)]
    for stem, (rows, cols, layers) in modules.items():
        quant = gpu_quants.get(stem.replace(".", "_"), "auto")
        by = {} if quant == "auto" else {"gpu_quant": f"r.yaml:{len(stem)}"}
        for layer in layers:
            name = f"model.layers.{layer}.{stem}"
            kept = "of views" if stem in FAMILY.kept else None
            module = Module(name, layer, rows * cols, matrix=(rows, cols), kept=kept)
            decisions.append(Decision(module, gpu_quant=quant, by=by))
    for layer in range(3, 61):  # the router, which vLLM keeps in the model's type
        decisions.append(Decision(Module(f"model.layers.{layer}.mlp.gate", layer, 256 * 7168), gpu_quant="auto"))
    return Placement(config or KTConfig(gguf="g"), None, tuple(decisions), {})


# GB: what it may be for all 61 layers with embedding, head and MLA's matrices.
@pytest.mark.parametrize(("quant", "limit"), [("bf16", 37.0), ("fp8", 21.5), ("int4", 13.5)])
def test_deepseek_r1_in_each(quant: str, limit: float) -> None:
    weights = sum(rows * cols * len(layers) for rows, cols, layers in R1.values())
    assert weights == pytest.approx(15.157e9, rel=1e-3)
    fixed = 2 * (129280 * 7168 + 61 * 32768 * 512 + 58 * 256 * 7168)  # embedding, kv_b_proj, routers
    fixed += 129280 * (7168 + 7168 // 128 * 2 if quant == "int4" else 2 * 7168)  # the head, one step more exact
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
    assert fitting("fp8", 64, 128, ("bf16", "int4")) == ("bf16", "there are no kernels for fp8 on this platform")
    assert fitting("fp8", 576, 7168) == ("fp8", None) and fitting("bf16", 1, 1) == ("bf16", None)
    assert why_not("int4", 2112, 7168) is None
    assert weight_bytes("fp8", 576, 256, 2) == 576 * 256 + 2 * 576 * 2
    assert weight_bytes("int4", 64, 64, 2) == 64 * (32 + 2) + 64 // 2
    assert weight_bytes("bf16", 3, 5, 2) == 30


def test_what_the_workers_are_told_and_what_is_logged() -> None:
    modules = {"self_attn.o_proj": (64, 128, range(3)), "mlp.down_proj": (64, 96, range(2))}
    placement = settle(placed(modules, self_attn_o_proj="fp8"), "int4")
    assert placement.config.dense == (
        DensePlacement("lm_head", (), "fp8"),
        DensePlacement("model.layers.{}.self_attn.o_proj", (0, 1, 2), "fp8"),
    )
    assert [name for entry in placement.config.dense for name in entry.names] == [
        "lm_head",
        *(f"model.layers.{i}.self_attn.o_proj" for i in range(3)),
    ]
    assert KTConfig.from_dict(placement.config.to_dict()) == placement.config
    lines = report(placement)
    assert lines[0] == (
        "dense modules on the device: 2 in bf16, 3 in fp8; the head in fp8, as it is kept one step more exact; "
        "embedding, norms and routers in the model's type."
    )
    assert lines[1] == (
        "2 dense modules are in bf16, as int4 needs columns in groups of 64 and there are 96: "
        "model.layers.0.mlp.down_proj, model.layers.1.mlp.down_proj."
    )
    plain = settle(placed(modules))
    assert plain.config.dense == () and report(plain) == []


def settled_head(*arguments: object, lm_head: str = "auto", **limits: int) -> tuple[str, str | None]:
    placement = settle(placed({}, lm_head=lm_head), *arguments, **limits)  # type: ignore[arg-type]
    head = placement.decisions[1]
    told = {name: entry.quant for entry in placement.config.dense for name in entry.names}
    assert told == ({} if head.quant == "bf16" else {"lm_head": head.quant})
    return head.quant, head.why_quant


def test_the_head_is_one_step_more_exact() -> None:
    assert [for_head(quant) for quant in QUANTS] == ["bf16", "bf16", "fp8"]
    step = "it is kept one step more exact"
    assert [settled_head(quant) for quant in QUANTS] == [("bf16", None), ("bf16", step), ("fp8", step)]
    # By the flag, whatever auto would be.
    assert settled_head("bf16", lm_head="--kt-gpu-quant int4") == ("fp8", step)
    assert settled_head("bf16", lm_head="--kt-gpu-quant fp8") == ("bf16", step)
    # A rule gets what it says.
    assert [settled_head("bf16", lm_head=quant) for quant in QUANTS] == [(quant, None) for quant in QUANTS]
    assert settled_head("int4", lm_head="bf16") == ("bf16", None)
    no_fp8 = "there are no kernels for fp8 on this platform"
    assert settled_head("int4", ("bf16", "int4")) == ("bf16", no_fp8)
    assert settled_head("int4", ("bf16", "int4"), lm_head="int4") == ("int4", None)
    (line,) = report(settle(placed({"self_attn.o_proj": (64, 128, range(3))}), "int4", ("bf16", "int4")))
    assert line == (
        f"dense modules on the device: 3 in int4; the head in bf16, as {no_fp8}; embedding, norms and routers in the "
        "model's type."
    )
    (line,) = report(settle(placed({"self_attn.o_proj": (64, 128, range(3))}, lm_head="int4")))
    assert line.startswith("dense modules on the device: 3 in bf16; the head in int4; embedding, norms")


def test_the_head_of_several_devices_and_of_an_odd_vocabulary() -> None:
    """vLLM fills the vocabulary up to 64 and gives each device as many rows."""
    assert head_rows(129280, 1) == 129280 and head_rows(1000, 2) == 512
    assert settled_head("int4", tensor=4)[0] == "fp8"
    why = "fp8 needs rows in groups of 64 and there are 16160"
    assert settled_head("int4", tensor=8) == ("bf16", why)
    odd = settle(placed({}, vocabulary=129001), "int4")
    assert odd.decisions[1].quant == "fp8"
    eight, not_told = settle(placed(R1), "int4", tensor=8), settle(placed(R1), "int4")
    more = device_bytes(eight, FAMILY, 2, 8) - device_bytes(not_told, FAMILY, 2, 8)
    assert more == 129280 // 8 * (2 * 7168 - 7168 - 7168 // 128 * 2)
    assert f"; the head in bf16, as {why};" in report(eight)[0]


def test_a_head_that_stays_in_the_models_type() -> None:
    placement = keep_head(placed({}, lm_head="int4"), "head_dtype has vLLM compute it in float32")
    assert settle(placement, "int4").config.dense == ()
    (sentence,) = refusals(placement, "bfloat16")
    assert sentence == (
        "r.yaml:1: gpu_quant is int4 for lm_head, which stays in the model's type, as head_dtype has vLLM compute it "
        "in float32; match other linear layers, or give auto."
    )
    # Not asked for by name, it is said in the log.
    some = keep_head(placed({"self_attn.o_proj": (64, 128, range(3))}), "of this")
    assert refusals(some, "bfloat16") == []
    assert "; the head in bf16, as of this; embedding" in report(settle(some, "int4"))[0]
    assert keep_head(some, "of that").decisions[1].module.kept == "of this"


def test_what_attention_computes_with_views_of_is_kept() -> None:
    placement = settle(
        placed({"self_attn.kv_b_proj": (64, 128, range(2)), "self_attn.o_proj": (64, 128, range(2))}), "int4"
    )
    assert [entry.module for entry in placement.config.dense] == ["lm_head", "model.layers.{}.self_attn.o_proj"]
    assert report(placement)[1] == (
        "2 dense modules are in bf16, as of views: model.layers.0.self_attn.kv_b_proj, "
        "model.layers.1.self_attn.kv_b_proj."
    )
    asked = placed({"self_attn.kv_b_proj": (64, 128, range(2))}, self_attn_kv_b_proj="int4")
    (sentence,) = refusals(asked, "bfloat16")
    assert sentence == (
        "r.yaml:19: gpu_quant is int4 for model.layers.0.self_attn.kv_b_proj, which stays in the model's type, as of "
        "views; match other linear layers, or give auto."
    )


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
    tensor = limits.get("tensor", 1)
    return {q: device_bytes(settle(placed(R1), q, tensor=tensor), FAMILY, 2, **limits) for q in QUANTS}


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


@pytest.mark.e2e
@pytest.mark.parametrize("file", ["dense_preflight_on_a_gpu.py", "head_in_vllm.py"])
def test_with_vllm(file: str) -> None:
    run(f"import sys, pytest\nsys.exit(pytest.main(['-q', '-p', 'no:cacheprovider', 'tests/unit/{file}']))")
