"""Builds mixture-of-experts layers of five families with vLLM's own model code, without and with our settings.

Run as a program by test_plugin.py: vLLM's distributed state is global to a process. Prints a line for each.
"""

import tempfile

import torch
from transformers import DeepseekV2Config, DeepseekV3Config, MixtralConfig, Qwen2MoeConfig, Qwen3MoeConfig
from vllm.config import ModelConfig, VllmConfig, set_current_vllm_config
from vllm.distributed import init_distributed_environment, initialize_model_parallel
from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts
from vllm.model_executor.model_loader.utils import initialize_model
from vllm.plugins import load_general_plugins
from vllm.utils.network_utils import get_open_port
from vllm.utils.torch_utils import set_default_torch_dtype

COMMON = {
    "hidden_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 512,
    "max_position_embeddings": 512,
    "moe_intermediate_size": 256,
    "num_experts_per_tok": 2,
}
MLA = {
    "kv_lora_rank": 512,
    "q_lora_rank": 128,
    "qk_rope_head_dim": 64,
    "qk_nope_head_dim": 64,
    "v_head_dim": 64,
    "num_key_value_heads": 4,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "intermediate_size": 256,
}
FAMILIES = {
    "DeepseekV2ForCausalLM": DeepseekV2Config(**COMMON, **MLA, topk_method="greedy", n_group=1, topk_group=1),
    "DeepseekV3ForCausalLM": DeepseekV3Config(**COMMON, **MLA, n_group=1, topk_group=1),
    "Qwen2MoeForCausalLM": Qwen2MoeConfig(
        **COMMON, num_experts=8, num_key_value_heads=4, shared_expert_intermediate_size=256
    ),
    "Qwen3MoeForCausalLM": Qwen3MoeConfig(**COMMON, num_experts=8, num_key_value_heads=4, head_dim=64),
    "MixtralForCausalLM": MixtralConfig(
        **{k: v for k, v in COMMON.items() if k != "moe_intermediate_size"},
        intermediate_size=256,
        num_local_experts=8,
        num_key_value_heads=4,
    ),
}


def build(architecture: str, additional_config: dict) -> list[RoutedExperts]:
    """The RoutedExperts modules of a freshly built model."""
    with tempfile.TemporaryDirectory() as folder:
        config = FAMILIES[architecture]
        config.architectures = [architecture]
        config.save_pretrained(folder)
        model_config = ModelConfig(model=folder, dtype="bfloat16", skip_tokenizer_init=True, max_model_len=256)
        vllm_config = VllmConfig(model_config=model_config, additional_config=additional_config)
        with set_current_vllm_config(vllm_config), set_default_torch_dtype(torch.bfloat16):
            model = initialize_model(vllm_config=vllm_config, model_config=model_config)
    return [module for module in model.modules() if isinstance(module, RoutedExperts)]


def expert_elements(layer: RoutedExperts) -> int:
    """Elements of the layer's own parameters; the correction bias belongs to the gate."""
    return sum(p.numel() for name, p in layer.named_parameters() if name != "e_score_correction_bias")


def main() -> None:
    load_general_plugins()
    with set_current_vllm_config(VllmConfig()):
        init_distributed_environment(1, 0, f"tcp://127.0.0.1:{get_open_port()}", 0, "gloo")
        initialize_model_parallel(1, 1)
    from kt_vllm.layer import KTMoEMethod

    for architecture in FAMILIES:
        for additional_config, ours in (({}, False), ({"kt": {"gguf": "/unused.gguf", "cpus": [0]}}, True)):
            layers = build(architecture, additional_config)
            assert layers, architecture
            for layer in layers:
                assert isinstance(layer.quant_method, KTMoEMethod) == ours, (architecture, type(layer.quant_method))
                assert (expert_elements(layer) == 0) == ours, (architecture, expert_elements(layer))
            print("OK", architecture, "ours" if ours else "stock", len(layers))


if __name__ == "__main__":
    main()
