"""Loads a GGUF: dense tensors into vLLM's model, routed experts into the executor, both at once, complete both ways."""

import time

import torch
from torch import nn
from tqdm import tqdm
from vllm.config import ModelConfig, VllmConfig, get_current_vllm_config
from vllm.config.load import LoadConfig
from vllm.distributed import get_tensor_model_parallel_rank
from vllm.model_executor.layers.fused_moe.runner.moe_runner import MoERunner
from vllm.model_executor.model_loader.base_loader import BaseModelLoader
from vllm.model_executor.models.utils import extract_layer_index, is_pp_missing_parameter
from vllm.platforms import current_platform

from kt_vllm import _native
from kt_vllm.checkpoint import CheckpointPlan, iter_dense
from kt_vllm.compat import set_router_top_k, use_quantized_qkv_a
from kt_vllm.config import KTConfig
from kt_vllm.dense_methods import DenseQuantConfig
from kt_vllm.device_experts import load_device_experts
from kt_vllm.errors import ConfigError, GGUFError
from kt_vllm.executor import CPUExpertExecutor, LayerHandle, ZeroHandle
from kt_vllm.expert_spans import host_experts
from kt_vllm.gguf.reader import GGUFModel
from kt_vllm.handover.device_layer import DeviceLayerHandle, Handover
from kt_vllm.hf_config import config_fields
from kt_vllm.layer import KTMoEMethod, KTRoutedExperts
from kt_vllm.log import init_logger

logger = init_logger(__name__)

LOAD_FORMAT = "kt_gguf"

# How often the progress of the readers is looked at: fine enough for a bar, and how long a Ctrl-C waits at most.
_POLL_SECONDS = 0.05


class KTModelLoader(BaseModelLoader):
    """vLLM's load_format "kt_gguf"; the model folder gives only config and tokenizer."""

    def __init__(self, load_config: LoadConfig) -> None:
        super().__init__(load_config)

    def download_model(self, model_config: ModelConfig) -> None:
        """Nothing: the weights are the user's GGUF."""

    def load_weights(self, model: nn.Module, model_config: ModelConfig) -> None:
        """Raises GGUFError when a parameter of the model stays unloaded or a tensor of the file stays unexplained."""
        vllm_config = get_current_vllm_config()
        config = KTConfig.from_vllm_config(vllm_config)
        if config is None:
            raise ConfigError(f"--load-format {LOAD_FORMAT} is chosen by --kt-gguf PATH; give that instead.")
        isa, _ = _native.choose_isa(config.isa)
        plan = CheckpointPlan.build(
            GGUFModel.open(config.gguf),
            config_fields(model_config.hf_text_config),
            supported_types=_native.supported_types(isa),
            with_experts=not config.no_experts,
        )
        _set_top_k(model, config)
        # Now: a weight that is quantised on its way in ends as others, of other names.
        expected = {name for name, _ in model.named_parameters()}
        methods = [method for method in _moe_methods(model) if method.computes]
        # Weights may be loaded again into a running model (sleep and wake): its experts are still there.
        _restore(methods)
        methods = [method for method in methods if method.handle is None]
        executor = None if config.no_experts else _make_executor(config, vllm_config, methods, plan)
        try:
            with self._progress_bar(plan, model) as bar:
                if executor is not None:
                    executor.native.start_loading()
                dense = iter_dense(
                    plan,
                    model_config.dtype,
                    wanted=lambda name: not is_pp_missing_parameter(name, model),
                    on_bytes=bar.update,
                )
                loaded = set(model.load_weights(dense))
                loaded |= _load_device_experts(model, config, plan, bar)
                if executor is not None:
                    _finish_experts(executor, bar)
            if executor is not None:
                top_k = max(_top_k(config, method) for method in methods)
                logger.info("kt_vllm: %s", executor.native.choose_prefetch(top_k))
            _connect(config, vllm_config, methods, executor)
        except BaseException:
            if executor is not None:
                executor.close()
            raise
        if executor is not None:
            logger.info("kt_vllm: %s", executor.native.memory_report)
        _check_complete(expected, loaded)
        if vllm_config.quant_config is not None:
            use_quantized_qkv_a(model)
        if isinstance(vllm_config.quant_config, DenseQuantConfig) and get_tensor_model_parallel_rank() == 0:
            for line in vllm_config.quant_config.report():
                logger.info("kt_vllm: %s", line)

    def _progress_bar(self, plan: CheckpointPlan, model: nn.Module) -> tqdm:
        layers = {extract_layer_index(m.layer_name) for m in model.modules() if isinstance(m, KTRoutedExperts)}
        return tqdm(
            total=plan.dense_file_bytes + sum(plan.experts[layer].nbytes for layer in layers if layer in plan.experts),
            desc="Loading GGUF",
            unit="B",
            unit_scale=True,
            unit_divisor=1024,
            mininterval=0.5,
            disable=not self.load_config.use_tqdm_on_load or get_tensor_model_parallel_rank() != 0,
        )


def _moe_methods(model: nn.Module) -> list[KTMoEMethod]:
    """Our methods in this process's part of the model, in layer order."""
    methods = [module.quant_method for module in model.modules() if isinstance(module, KTRoutedExperts)]
    return [method for method in methods if isinstance(method, KTMoEMethod)]


def _set_top_k(model: nn.Module, config: KTConfig) -> None:
    """Fewer experts for each token, where that was asked for: the router chooses and renormalises as ever."""
    for runner in (module for module in model.modules() if isinstance(module, MoERunner)):
        top_k = config.placement(extract_layer_index(runner.layer_name)).top_k
        if top_k is not None:
            set_router_top_k(runner, top_k)


def _top_k(config: KTConfig, method: KTMoEMethod) -> int:
    return config.placement(extract_layer_index(method.layer_name)).top_k or method.moe.experts_per_token


def _load_device_experts(model: nn.Module, config: KTConfig, plan: CheckpointPlan, bar: tqdm) -> set[str]:
    """Loads what the rules put on the device; returns the names of the parameters."""
    loaded = set()
    for name, module in model.named_modules():
        if isinstance(module, KTRoutedExperts):
            layer = extract_layer_index(module.layer_name)
            ids = config.placement(layer).device_experts
            if (ids is None or ids) and not config.no_experts:
                names = load_device_experts(module, plan.experts[layer], ids, bar.update)
                loaded |= {f"{name}.{parameter}" for parameter in names}
    return loaded


def _make_executor(
    config: KTConfig, vllm_config: VllmConfig, methods: list[KTMoEMethod], plan: CheckpointPlan
) -> CPUExpertExecutor | None:
    """The executor of this process with one layer a method, or None when this process computes no experts."""
    if not methods:
        return None
    on_host = current_platform.is_cpu()
    executor = CPUExpertExecutor(
        isa=config.isa,
        cpus=config.cpus,
        nodes=config.nodes or None,
        max_num_tokens=vllm_config.scheduler_config.max_num_batched_tokens,
        spin_ns=_native.SPIN_NS if on_host or _shares_cpus(config, vllm_config) else _native.STEP_SPIN_NS,
        # The coordinator has nothing else to do meanwhile.
        caller_works=not on_host and not _shares_cpus(config, vllm_config),
    )
    for method in methods:
        layer = extract_layer_index(method.layer_name)
        experts = host_experts(plan.experts[layer], config.placement(layer))
        assert experts is not None, "a layer that the device has alone has vLLM's own method"
        method.handle = executor.add_layer(experts)
    logger.info("kt_vllm: experts of %d layers run here. %s", len(methods), executor.native.isa_reason)
    logger.info("kt_vllm: %s", executor.native.placement_report)
    return executor


def _shares_cpus(config: KTConfig, vllm_config: VllmConfig) -> bool:
    """Whether a thread that spins keeps another from its work: on one CPU, or in the next stage of a pipeline."""
    return len(set(config.cpus)) < max(2, len(config.cpus)) or vllm_config.parallel_config.pipeline_parallel_size > 1


def _restore(methods: list[KTMoEMethod]) -> None:
    """The hand-over's words on the device, which a deep sleep discards."""
    for handover in {m.handle.handover for m in methods if isinstance(m.handle, DeviceLayerHandle)}:
        handover.restore()


def _connect(
    config: KTConfig, vllm_config: VllmConfig, methods: list[KTMoEMethod], executor: CPUExpertExecutor | None
) -> None:
    """Gives every method its way to the loaded executor. Raises ConfigError where a device cannot reach it."""
    if not methods or (current_platform.is_cpu() and executor is not None):
        return
    if config.no_experts:
        logger.warning("kt_vllm: --kt-no-experts: the routed experts' output is zero, and all answers are nonsense.")
    if current_platform.is_cpu():
        for method in methods:
            method.handle = ZeroHandle()
        return
    top_ks = [_top_k(config, method) for method in methods]
    numbers = [m.handle.index if isinstance(m.handle, LayerHandle) else 0 for m in methods]
    handover = Handover(
        executor,
        list(zip(numbers, top_ks, strict=True)),
        hidden_size=methods[0].moe.hidden_dim,
        max_num_tokens=vllm_config.scheduler_config.max_num_batched_tokens,
        dtype=vllm_config.model_config.dtype,
        device=torch.device(current_platform.device_type, torch.accelerator.current_device_index()),
        worker_cpus=config.cpus,
        way=config.handover,
        watchdog_seconds=config.watchdog_seconds,
        spin_ns=_native.SPIN_NS if _shares_cpus(config, vllm_config) else 2 * _native.STEP_SPIN_NS,
    )
    for number, (method, top_k) in enumerate(zip(methods, top_ks, strict=True)):
        method.handle = handover.layer_handle(number, top_k)


def _finish_experts(executor: CPUExpertExecutor, bar: tqdm) -> None:
    """Waits for the readers; raises what one of them met."""
    seen = 0
    while True:
        done, _, finished = executor.native.load_progress()
        bar.update(done - seen)
        seen = done
        if finished:
            return
        time.sleep(_POLL_SECONDS)


def _check_complete(expected: set[str], loaded: set[str]) -> None:
    """expected: names of the model's parameters before any was loaded."""
    missing = sorted(expected - loaded)
    if missing:
        shown = ", ".join(missing[:5]) + (f" and {len(missing) - 5} more" if len(missing) > 5 else "")
        raise GGUFError(
            f"the GGUF leaves {len(missing)} parameters of the model without weights: {shown}. "
            f"Use a GGUF made from this model's own checkpoint."
        )
