"""Every tensor of a file has its place, and what does not fit is refused with both sides named."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from kt_vllm.checkpoint import CheckpointPlan, iter_dense
from kt_vllm.errors import GGUFError
from kt_vllm.gguf import GGUFModel
from tests import gguf_files as files
from tests.gguf_files import Shape, gguf_metadata, hf_config, random_tensors

SHAPE = Shape()


def plan_of(
    tmp_path: Path,
    tensors: dict[str, files.Array] | None = None,
    metadata: dict[str, object] | None = None,
    config: dict[str, object] | None = None,
    supported: list[str] | None = None,
    **how: Any,
) -> CheckpointPlan:
    path = files.write(tmp_path / "m.gguf", random_tensors() if tensors is None else tensors, metadata, **how)
    return CheckpointPlan.build(GGUFModel.open(str(path)), hf_config() if config is None else config, supported)


def parameters(plan: CheckpointPlan, dtype: torch.dtype | None = None) -> dict[str, torch.Tensor]:
    found = list(iter_dense(plan, dtype))
    assert len(dict(found)) == len(found)
    return dict(found)


def without(tensors: dict[str, files.Array], *names: str) -> dict[str, files.Array]:
    assert set(names) <= set(tensors)
    return {n: t for n, t in tensors.items() if n not in names}


def test_the_shipped_model() -> None:
    config = json.loads((files.TINY / "config.json").read_text())
    model = GGUFModel.open(str(files.TINY))
    plan = CheckpointPlan.build(model, config, ["Q4_K", "Q6_K"])
    assert plan.ignored == ()
    assert sorted(plan.experts) == [1, 2, 3]
    assert plan.experts[1].gate.shape == (16, 256, 512)
    assert plan.experts[1].down.shape == (16, 512, 256)
    used = [s.name for d in plan.dense for s in d.sources] + [n for n in model.tensors if "_exps" in n]
    assert sorted(used) == sorted(model.tensors)
    expert_bytes = sum(t.nbytes for n, t in model.tensors.items() if "_exps" in n)
    assert plan.expert_bytes == expert_bytes
    assert plan.dense_file_bytes == sum(t.nbytes for t in model.tensors.values()) - expert_bytes
    values = parameters(plan, torch.bfloat16)
    kept = [n for n, v in values.items() if v.dtype == torch.float32]
    assert {re.sub(r"\d+", "N", n) for n in kept} == {
        "model.layers.N.mlp.gate.weight",
        "model.layers.N.mlp.gate.e_score_correction_bias",
    }
    assert plan.dense_bytes_at(2) == sum(v.nbytes for v in values.values())
    assert values["model.layers.3.self_attn.kv_b_proj.weight"].shape == (4 * 256, 512)
    for layer in plan.experts.values():
        for source in (layer.gate, layer.up, layer.down):
            assert source.nbytes == sum(nbytes for _, _, nbytes in source.spans)
            assert len(source.spans) == 1


def test_both_layouts_give_the_same_parameters(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    fused = random_tensors(fused_kv_b=True)
    split = random_tensors(fused_kv_b=False)
    a = parameters(plan_of(tmp_path / "a", fused))
    b = parameters(plan_of(tmp_path / "b", split))
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name
    kv_b = a["model.layers.2.self_attn.kv_b_proj.weight"]
    assert np.array_equal(kv_b.numpy(), fused["blk.2.attn_kv_b.weight"])


def test_the_values_go_under_the_right_names(tmp_path: Path) -> None:
    tensors = random_tensors()
    values = parameters(plan_of(tmp_path, tensors))
    for ours, theirs in {
        "token_embd.weight": "model.embed_tokens.weight",
        "output.weight": "lm_head.weight",
        "output_norm.weight": "model.norm.weight",
        "blk.0.ffn_gate.weight": "model.layers.0.mlp.gate_proj.weight",
        "blk.0.ffn_up.weight": "model.layers.0.mlp.up_proj.weight",
        "blk.1.ffn_gate_inp.weight": "model.layers.1.mlp.gate.weight",
        "blk.1.ffn_down_shexp.weight": "model.layers.1.mlp.shared_experts.down_proj.weight",
        "blk.2.exp_probs_b.bias": "model.layers.2.mlp.gate.e_score_correction_bias",
        "blk.2.attn_q_b.weight": "model.layers.2.self_attn.q_b_proj.weight",
        "blk.2.attn_norm.weight": "model.layers.2.input_layernorm.weight",
        "blk.2.ffn_norm.weight": "model.layers.2.post_attention_layernorm.weight",
    }.items():
        assert np.array_equal(values[theirs].numpy(), tensors[ours]), ours
    assert not [n for n in values if "experts." in n and "shared" not in n]


def test_expert_bytes_are_found_in_shards(tmp_path: Path) -> None:
    tensors = random_tensors()
    plan = plan_of(tmp_path, tensors, split=9)
    assert len({s[0] for e in plan.experts.values() for s in e.gate.spans + e.down.spans}) > 1
    for layer, experts in plan.experts.items():
        for kind, source in (("gate", experts.gate), ("up", experts.up), ("down", experts.down)):
            (path, offset, nbytes) = source.spans[0]
            data = np.fromfile(path, np.uint8, nbytes, offset=offset).view(np.float32).reshape(source.shape)
            assert np.array_equal(data, tensors[f"blk.{layer}.ffn_{kind}_exps.weight"])


def test_file_order_progress_and_choice(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, split=9)
    places = [(d.sources[0].path, d.sources[0].offset) for d in plan.dense]
    assert places == sorted(places)
    seen: list[int] = []
    got = dict(iter_dense(plan, wanted=lambda n: ".1." in n, on_bytes=seen.append))
    assert got
    assert all(".1." in n for n in got)
    assert sum(seen) == plan.dense_file_bytes


def test_quantised_dense_tensors(tmp_path: Path) -> None:
    tensors = random_tensors()
    plan = plan_of(
        tmp_path, tensors, supported=["Q8_0"], type_of=lambda n: "F32" if "norm" in n or "probs" in n else "Q8_0"
    )
    assert plan.experts[1].up.type == "Q8_0"
    for name, values in parameters(plan, torch.bfloat16).items():
        if name.endswith("mlp.gate.weight"):
            assert values.dtype == torch.float32  # though its type in the file is a small one
            expected = torch.from_numpy(tensors[f"blk.{name.split('.')[2]}.ffn_gate_inp.weight"])
            assert (values - expected).abs().max() < 0.03


def test_v2_lite_has_no_low_rank_queries(tmp_path: Path) -> None:
    shape = Shape(q_lora=None)
    tensors = {n: t for n, t in random_tensors(shape).items() if "exp_probs" not in n}
    config = hf_config(shape, model_type="deepseek_v2", topk_method="greedy")
    values = parameters(plan_of(tmp_path, tensors, gguf_metadata(shape), config))
    assert values["model.layers.0.self_attn.q_proj.weight"].shape == (128, 64)
    assert not [n for n in values if "q_a" in n or "q_b" in n]


def test_layer_frequency(tmp_path: Path) -> None:
    """moe_layer_freq 2: of layers 1 to 3, only 2 is a mixture."""
    shape = Shape(layers=4, first_dense=2)
    tensors = random_tensors(shape)
    dense = random_tensors(Shape(layers=4, first_dense=4))
    tensors = {n: t for n, t in tensors.items() if not n.startswith("blk.3.")}
    tensors |= {n: t for n, t in dense.items() if n.startswith("blk.3.")}
    metadata = gguf_metadata(shape, leading_dense_block_count=1)
    plan = plan_of(tmp_path, tensors, metadata, hf_config(shape, first_k_dense_replace=1, moe_layer_freq=2))
    assert sorted(plan.experts) == [2]


def test_old_files_have_both_forms_of_kv_b(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, random_tensors(fused_kv_b=True) | random_tensors())
    assert len(plan.ignored) == 2 * SHAPE.layers
    assert plan.ignored[0][1] == "blk.0.attn_kv_b.weight already gives model.layers.0.self_attn.kv_b_proj.weight"
    assert all(len(d.sources) == 1 for d in plan.dense)


def test_correction_bias_without_suffix(tmp_path: Path) -> None:
    tensors = {n.replace("_b.bias", "_b"): t for n, t in random_tensors().items()}
    values = parameters(plan_of(tmp_path, tensors))
    bias = values["model.layers.1.mlp.gate.e_score_correction_bias"]
    assert np.array_equal(bias.numpy(), tensors["blk.1.exp_probs_b"])


def test_tied_embeddings(tmp_path: Path) -> None:
    tensors = random_tensors()
    tied = hf_config(tie_word_embeddings=True)
    plan = plan_of(tmp_path, tensors, config=tied)
    assert plan.ignored == (("output.weight", "config.json has tie_word_embeddings, so the embedding is used"),)
    less = without(tensors, "output.weight")
    plan = plan_of(tmp_path, less, config=tied)
    assert plan.ignored == ()
    assert "lm_head.weight" not in parameters(plan)
    values = parameters(plan_of(tmp_path, less))
    assert torch.equal(values["lm_head.weight"], values["model.embed_tokens.weight"])
    assert np.array_equal(values["lm_head.weight"].numpy(), tensors["token_embd.weight"])


def test_multi_token_prediction_layers_are_left_out_with_a_reason(tmp_path: Path) -> None:
    tensors = random_tensors(Shape(layers=4)) | {
        "rope_freqs.weight": np.ones(16, np.float32),
        "blk.3.nextn.eh_proj.weight": np.ones((64, 128), np.float32),
    }
    plan = plan_of(tmp_path, tensors, gguf_metadata(block_count=4), hf_config(num_nextn_predict_layers=1))
    reasons = dict(plan.ignored)
    assert {n for n in tensors if n.startswith("blk.3.")} | {"rope_freqs.weight"} == reasons.keys()
    assert "multi-token-prediction" in reasons["blk.3.attn_norm.weight"]
    assert sorted(plan.experts) == [1, 2]


def changed(**changes: Any) -> dict[str, object]:
    return hf_config(SHAPE, **changes)


def refusal(tmp_path: Path, **what: Any) -> str:
    with pytest.raises(GGUFError) as caught:
        plan_of(tmp_path, **what)
    text = str(caught.value)
    assert "\n" not in text
    assert ": " in text
    return text


@pytest.mark.parametrize(
    ("field", "value", "key", "seen"),
    [
        ("hidden_size", 128, "embedding_length", 64),
        ("num_hidden_layers", 5, "block_count", 3),
        ("n_routed_experts", 8, "expert_count", 4),
        ("num_experts_per_tok", 4, "expert_used_count", 2),
        ("moe_intermediate_size", 64, "expert_feed_forward_length", 32),
        ("intermediate_size", 64, "feed_forward_length", 96),
        ("first_k_dense_replace", 2, "leading_dense_block_count", 1),
        ("vocab_size", 128, "vocab_size", 64),
        ("num_attention_heads", 4, "attention.head_count", 2),
        ("q_lora_rank", 64, "attention.q_lora_rank", 32),
        ("q_lora_rank", None, "attention.q_lora_rank", 32),
        ("kv_lora_rank", 64, "attention.kv_lora_rank", 32),
        ("qk_nope_head_dim", 64, "attention.key_length_mla", 64),
        ("v_head_dim", 32, "attention.value_length_mla", 64),
        ("n_shared_experts", 2, "expert_shared_count", 1),
    ],
)
def test_config_of_another_model(tmp_path: Path, field: str, value: int | None, key: str, seen: int) -> None:
    text = refusal(tmp_path, config=changed(**{field: value}))
    total = {"qk_nope_head_dim": 96, "q_lora_rank": value or "none"}.get(field, value)
    assert f"deepseek2.{key} = {seen} and config.json has {total}" in text
    assert field in text
    assert "m.gguf" in text


@pytest.mark.parametrize(
    ("field", "value"), [("hidden_size", 128), ("n_routed_experts", 8), ("moe_intermediate_size", 64)]
)
def test_shapes_are_checked_where_metadata_is_silent(tmp_path: Path, field: str, value: int) -> None:
    silent = gguf_metadata(embedding_length=None, expert_count=None, expert_feed_forward_length=None)
    text = refusal(tmp_path, metadata=silent, config=changed(**{field: value}))
    assert re.search(r"tensor 'blk.1.ffn_gate_exps.weight' has shape \[4, 32, 64\] and \[[\d, ]+\] is expected", text)
    assert str(value) in text


@pytest.mark.parametrize("field", ["hidden_size", "n_routed_experts", "num_hidden_layers"])
def test_config_without_a_field(tmp_path: Path, field: str) -> None:
    text = refusal(tmp_path, config=changed(**{field: None}))
    assert field in text
    assert "none" in text
    text = refusal(
        tmp_path,
        metadata=gguf_metadata(embedding_length=None, expert_count=None, block_count=None),
        config=changed(**{field: None}),
    )
    assert f"config.json has None for {field}" in text


@pytest.mark.parametrize("name", [n for n in files.tensor_shapes() if n not in ("output.weight",)])
def test_a_missing_tensor_is_named(tmp_path: Path, name: str) -> None:
    """Layer 0 is the only dense one: what it alone has is found to be missing when the model is loaded."""
    tensors = without(random_tensors(), name)
    if name.startswith("blk.0.ffn_") and "norm" not in name:
        plan_of(tmp_path, tensors)
        return
    text = refusal(tmp_path, tensors=tensors)
    assert repr(name) in text
    assert "download or convert it again" in text


def test_a_layer_without_experts(tmp_path: Path) -> None:
    tensors = {n: t for n, t in random_tensors().items() if not re.match(r"blk\.2\.ffn_(gate|up|down)_exps", n)}
    assert "no tensor 'blk.2.ffn_gate_exps.weight', and layer 2 has routed experts" in refusal(
        tmp_path, tensors=tensors
    )
    text = refusal(
        tmp_path, config=hf_config(first_k_dense_replace=2), metadata=gguf_metadata(leading_dense_block_count=None)
    )
    assert "routed experts in 'blk.1.ffn_gate_exps.weight', a layer that has none by config.json" in text


def test_a_dense_model(tmp_path: Path) -> None:
    tensors = {n: t for n, t in random_tensors().items() if "exp" not in n and "inp" not in n}
    metadata = {"block_count": 3, "embedding_length": 64}
    for architecture in ("llama", "deepseek2"):
        text = refusal(tmp_path, tensors=tensors, metadata=metadata, architecture=architecture)
        assert f"is a dense model ('{architecture}' with no expert_count" in text
        assert "without --kt-gguf" in text


def test_other_architectures_and_model_types(tmp_path: Path) -> None:
    text = refusal(tmp_path, architecture="dbrx")
    assert "'dbrx', which is not supported: use one of deepseek2" in text
    assert "model_type 'qwen3_moe', where one of deepseek_v2" in refusal(
        tmp_path, config=hf_config(model_type="qwen3_moe")
    )


def test_types_without_kernels_or_decoder(tmp_path: Path) -> None:
    text = refusal(tmp_path, supported=["Q4_K", "Q8_0"])
    assert "'blk.1.ffn_gate_exps.weight' has type F32" in text
    assert "use a file with experts in Q4_K, Q8_0" in text
    tensors = random_tensors()
    path = tmp_path / "i.gguf"
    entries, offset = [], 0
    for name, values in tensors.items():
        type_ = 26 if name == "blk.0.attn_output.weight" else 0  # I32
        entries.append(files.entry(name, reversed(values.shape), type_, offset))
        offset += -(-values.nbytes // 32) * 32
    path.write_bytes(files.raw(entries=entries, data=bytes(offset)))
    with pytest.raises(GGUFError, match=r"'blk.0.attn_output.weight' has type I32, which .* cannot decode: use .*Q4_K"):
        CheckpointPlan.build(GGUFModel.open(str(path)), hf_config())


@pytest.mark.parametrize(
    "name", ["strange.weight", "blk.1.strange.weight", "blk.1.attn_q.bias", "blk.x.attn_norm.weight"]
)
def test_an_unexplained_tensor_is_named(tmp_path: Path, name: str) -> None:
    tensors = random_tensors() | {name: np.ones(64, np.float32)}
    text = refusal(tmp_path, tensors=tensors)
    assert f"has the tensor {name!r}, which no 'deepseek2' model known here has" in text


def test_a_layer_too_many(tmp_path: Path) -> None:
    tensors = random_tensors() | {"blk.7.attn_norm.weight": np.ones(64, np.float32)}
    assert "'blk.7.attn_norm.weight' and config.json has only 3 layers" in refusal(tmp_path, tensors=tensors)


@pytest.mark.parametrize("method", [None, "greedy"])
def test_correction_bias_that_vllm_would_not_use(tmp_path: Path, method: str | None) -> None:
    text = refusal(tmp_path, config=hf_config(topk_method=method))
    assert "'blk.1.exp_probs_b.bias', which vLLM uses only if config.json has topk_method 'noaux_tc'" in text
    assert f"it has {method!r}: set it in config.json" in text


def test_planning_needs_no_torch() -> None:
    code = "import sys, kt_vllm.checkpoint; sys.exit('torch' in sys.modules or 'vllm' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])
