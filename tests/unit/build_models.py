"""Mixture-of-experts layers of five families, built and called by vLLM's own code, without and with our settings.

Run as a program by test_plugin.py: vLLM's distributed state is global to a process. Prints a line for each.
"""

import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import DeepseekV2Config, DeepseekV3Config, MixtralConfig, Qwen2MoeConfig, Qwen3MoeConfig
from vllm.config import ModelConfig, VllmConfig, set_current_vllm_config
from vllm.distributed import init_distributed_environment, initialize_model_parallel
from vllm.forward_context import set_forward_context
from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts
from vllm.model_executor.layers.fused_moe.runner.moe_runner import MoERunner
from vllm.model_executor.model_loader.utils import initialize_model, process_weights_after_loading
from vllm.plugins import load_general_plugins
from vllm.utils.network_utils import get_open_port
from vllm.utils.torch_utils import set_default_torch_dtype

from kt_vllm.checkpoint import ExpertSource, LayerExperts
from kt_vllm.compat import set_router_top_k
from kt_vllm.config import LayerPlacement
from kt_vllm.device_experts import load_device_experts
from kt_vllm.executor import CPUExpertExecutor
from kt_vllm.expert_spans import host_experts
from kt_vllm.layer import KTMoEMethod
from tests.moe_case import MoECase, load
from tests.tolerances import max_layer_error

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


NUM_TOKENS, TOP_K = 37, 2


def build(
    architecture: str, additional_config: dict, load: Callable[[list[MoERunner]], object] = lambda _: None
) -> tuple[VllmConfig, list[MoERunner]]:
    """The MoE layers of a freshly built model, and the configuration they belong to.

    load: called with them where vLLM would have loaded the weights.
    """
    with tempfile.TemporaryDirectory() as folder:
        config = FAMILIES[architecture]
        config.architectures = [architecture]
        config.save_pretrained(folder)
        model_config = ModelConfig(model=folder, dtype="bfloat16", skip_tokenizer_init=True, max_model_len=256)
        vllm_config = VllmConfig(model_config=model_config, additional_config=additional_config)
        with set_current_vllm_config(vllm_config), set_default_torch_dtype(torch.bfloat16):
            model = initialize_model(vllm_config=vllm_config, model_config=model_config)
            for parameter in model.parameters():
                parameter.data.normal_(std=0.05)
            load(moe_layers(model))
            process_weights_after_loading(model, model_config, torch.device("cpu"))
    return vllm_config, moe_layers(model)


def moe_layers(model: torch.nn.Module) -> list[MoERunner]:
    return [module for module in model.modules() if isinstance(module, MoERunner)]


def expert_elements(layer: RoutedExperts) -> int:
    """Elements of the layer's own parameters; the correction bias belongs to the gate."""
    return sum(p.numel() for name, p in layer.named_parameters() if name != "e_score_correction_bias")


def check_output(vllm_config: VllmConfig, runners: list[MoERunner], folder: str) -> None:
    """Gives each layer experts and calls it as vLLM does: routed output against float64, shared output as alone."""
    cases = make_cases(folder, len(runners))
    executor = CPUExpertExecutor(isa="auto", cpus=[0, 0], max_num_tokens=NUM_TOKENS)
    for runner, case in zip(runners, cases, strict=True):
        runner.routed_experts.quant_method.handle = executor.add_layer(sources(case))
    load(executor.native)
    compare(vllm_config, runners, cases, executor.native.isa)
    executor.close()


def check_placed(architecture: str, folder: str) -> None:
    """The last layer with some experts on the device, those before it with all; vLLM's own code for these."""
    on_device = (0, 3, 4, 7)
    layers = [{"layer": 0, "device_experts": None}, {"layer": 1, "device_experts": on_device}]
    executor = CPUExpertExecutor(isa="auto", cpus=[0, 0], max_num_tokens=NUM_TOKENS)
    cases: list[MoECase] = []

    def load_placed(runners: list[MoERunner]) -> None:
        cases[:] = make_cases(folder, len(runners))
        for runner, case in zip(runners, cases, strict=True):
            last = runner is runners[-1]
            ids = on_device if last else None
            names = load_device_experts(runner.routed_experts, sources(case), ids, lambda _: None)
            assert names == {"w13_weight", "w2_weight"}
            assert isinstance(runner.routed_experts.quant_method, KTMoEMethod) == last
            if last:
                rest = host_experts(sources(case), LayerPlacement(1, on_device))
                runner.routed_experts.quant_method.handle = executor.add_layer(rest)
        load(executor.native)

    kt = {"kt": {"gguf": "/unused.gguf", "cpus": [0], "layers": layers}}
    vllm_config, runners = build(architecture, kt, load_placed)
    compare(vllm_config, runners, cases, executor.native.isa)
    executor.close()


def make_cases(folder: str, count: int) -> list[MoECase]:
    types = ("Q4_K", "Q4_K", "Q6_K")
    return [MoECase(Path(folder) / f"{i}.bin", types, num_experts=8, seed=i) for i in range(count)]


def sources(case: MoECase) -> LayerExperts:
    parts = zip(case.types, case.shapes, case.spans, strict=True)
    return LayerExperts(*(ExpertSource(type, shape, tuple(spans)) for type, shape, spans in parts))


def compare(vllm_config: VllmConfig, runners: list[MoERunner], cases: list[MoECase], isa: str) -> None:
    with torch.inference_mode(), set_forward_context({"any": "metadata"}, vllm_config):
        for runner, case in zip(runners, cases, strict=True):
            hidden_states, topk_ids, topk_weights = case.inputs(NUM_TOKENS, TOP_K)
            x = torch.from_numpy(hidden_states).bfloat16()
            shared = runner.shared_experts
            ours = isinstance(runner.routed_experts.quant_method, KTMoEMethod)
            if not ours:  # vLLM's runner calls the shared experts itself then, and its kernels know no id -1
                shared, topk_ids = None, topk_ids.clip(0)
            output = runner.routed_experts.forward_modular(
                x, torch.from_numpy(topk_weights), torch.from_numpy(topk_ids), shared, None if shared is None else x
            )
            expected = torch.from_numpy(case.expected(x.float().numpy(), topk_ids, topk_weights))
            error = (output.double() - expected).norm() / expected.norm()
            assert error < max_layer_error(isa, case.types, "bfloat16"), (runner.layer_name, error)
            if shared is not None:
                assert torch.equal(shared.output, shared._layer(x)), runner.layer_name


def check_fewer_experts(architecture: str) -> None:
    """A router told to choose fewer experts must do as the router of a model that was built with fewer."""
    ours = {"kt": {"gguf": "/unused.gguf", "cpus": [0]}}
    _, told = build(architecture, ours)
    config = FAMILIES[architecture]
    config.num_experts_per_tok, before = 1, config.num_experts_per_tok
    try:
        _, built = build(architecture, ours)
    finally:
        config.num_experts_per_tok = before
    x, logits = torch.randn(NUM_TOKENS, 256, dtype=torch.bfloat16), torch.randn(NUM_TOKENS, 8)
    for one, other in zip(told, built, strict=True):
        if one.routed_experts.e_score_correction_bias is not None:
            one.routed_experts.e_score_correction_bias.data.copy_(other.routed_experts.e_score_correction_bias.data)
        results = [runner.router.select_experts(hidden_states=x, router_logits=logits) for runner in (one, other)]
        assert results[0][1].shape == (NUM_TOKENS, TOP_K)
        set_router_top_k(one, 1)
        results[0] = one.router.select_experts(hidden_states=x, router_logits=logits)
        for mine, expected in zip(*results, strict=True):
            assert torch.equal(mine, expected), architecture
    assert vars(told[0].moe_config)["experts_per_token"] == vars(built[0].moe_config)["experts_per_token"] == 1


def main() -> None:
    load_general_plugins()
    with set_current_vllm_config(VllmConfig()):
        init_distributed_environment(1, 0, f"tcp://127.0.0.1:{get_open_port()}", 0, "gloo")
        initialize_model_parallel(1, 1)
    for architecture in FAMILIES:
        for additional_config, ours in (({}, False), ({"kt": {"gguf": "/unused.gguf", "cpus": [0]}}, True)):
            vllm_config, runners = build(architecture, additional_config)
            assert runners, architecture
            for layer in (runner.routed_experts for runner in runners):
                assert isinstance(layer.quant_method, KTMoEMethod) == ours, (architecture, type(layer.quant_method))
                assert (expert_elements(layer) == 0) == ours, (architecture, expert_elements(layer))
            if ours:
                with tempfile.TemporaryDirectory() as folder:
                    check_output(vllm_config, runners, folder)
            print("OK", architecture, "ours" if ours else "stock", len(runners))
        with tempfile.TemporaryDirectory() as folder:
            check_placed(architecture, folder)
        check_fewer_experts(architecture)


if __name__ == "__main__":
    main()
