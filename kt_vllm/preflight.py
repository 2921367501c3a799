"""Everything that can be refused is refused here, in the process the user started, before any engine process or port.

check_model_folder() runs when the command line has become engine arguments, prepare() before vLLM makes its model
configuration, check() after.
"""

import dataclasses
import os
from typing import TYPE_CHECKING

from vllm.config import AttentionConfig
from vllm.platforms import current_platform
from vllm.utils.import_utils import resolve_obj_by_qualname
from vllm.v1.attention.selector import AttentionSelectorConfig

from kt_vllm import _native, compat, dense_placement, hub
from kt_vllm.checkpoint import CheckpointPlan
from kt_vllm.config import CONFIG_KEY, DEFAULT_GPU_QUANT, KTConfig
from kt_vllm.dense_methods import DENSE_QUANTIZATION, served_quants
from kt_vllm.dense_quant import QUANTS, choose
from kt_vllm.errors import ConfigError, GGUFError, ResourceError
from kt_vllm.expert_spans import host_experts
from kt_vllm.families import FAMILIES
from kt_vllm.gguf.reader import GGUFModel
from kt_vllm.gpu_memory import ServingLimits, default_batch, device_budget
from kt_vllm.handover.device_layer import pinned_bytes
from kt_vllm.hf_config import CONFIG_FORMAT, config_fields
from kt_vllm.loader import LOAD_FORMAT
from kt_vllm.log import init_logger
from kt_vllm.memory import available_host_memory, check_memory, executor_workspace_bytes
from kt_vllm.placement import Placement

if TYPE_CHECKING:
    from vllm.config import ModelConfig
    from vllm.engine.arg_utils import EngineArgs
    from vllm.v1.attention.backend import AttentionBackend

logger = init_logger(__name__)

# Not imported here: that would load vLLM's worker in the process that the user started.
_WORKER_CLASS = "kt_vllm.worker.KTWorker"

# Speculators that load no second set of weights.
_SPECULATORS_WITHOUT_WEIGHTS = ("ngram", "ngram_gpu", "suffix")
# vLLM's latent attention for every CPU and type; slower than the one for AMX.
_ANY_DTYPE_MLA = "CPU_MLA"
# Tokens that the executor computes at once (kMaxPieceTokens in csrc/executor).
_LONGEST_PIECE = 4096


def check_model_folder(engine_args: "EngineArgs") -> None:
    """Raises KTError when the model argument is no folder with a config.json, and no repository with one.

    Not part of prepare(): vLLM looks into the folder before that, and ends in a traceback of its download library.
    """
    if CONFIG_KEY not in (engine_args.additional_config or {}):
        return
    model = str(engine_args.hf_config_path or engine_args.model)
    if os.path.isdir(model):
        seen = None if os.path.exists(os.path.join(model, "config.json")) else "has no config.json"
    elif os.path.exists(model):
        seen = "is a file"
    else:
        hub.fetch_config(model, engine_args.revision, engine_args.hf_token)
        seen = "does not exist" if model.startswith(("/", "./", "../", "~")) else None
    if seen:
        raise ConfigError(
            f"the model {model!r} {seen}, and a folder with config.json and the tokenizer is expected beside "
            f"--kt-gguf; give the folder (or the Hugging Face name) of the model that the GGUF was made from."
        )


def prepare(engine_args: "EngineArgs") -> KTConfig | None:
    """Validates our settings and points vLLM at our loader and config parser. None when the user asked for nothing."""
    values = (engine_args.additional_config or {}).get(CONFIG_KEY)
    if values is None:
        return None
    config = KTConfig.from_dict(values)
    _refuse_unsupported(engine_args)
    if hub.is_hub_name(config.gguf):
        hub.find(config.gguf, engine_args.download_dir, engine_args.hf_token)
    else:
        GGUFModel.open(config.gguf)
    engine_args.load_format = LOAD_FORMAT
    engine_args.config_format = CONFIG_FORMAT
    if current_platform.is_cuda() and engine_args.worker_cls == "auto":
        engine_args.worker_cls = _WORKER_CLASS
    if current_platform.is_cpu() and compat.disable_cpu_rotary_op(engine_args.compilation_config):
        logger.info(
            "kt_vllm: using vLLM's torch rotary embedding; its CPU op is wrong for interleaved RoPE in eager mode."
        )
    return config


def _refuse_unsupported(engine_args: "EngineArgs") -> None:
    """Raises ConfigError for a combination that would compute something else than asked."""
    if not (current_platform.is_cpu() or current_platform.is_cuda()):
        raise ConfigError(
            f"--kt-gguf works on vLLM's CUDA and CPU platforms; found {current_platform.device_type}. "
            f"Install one of these builds of vLLM, or run without --kt-gguf."
        )
    refused = {
        "--data-parallel-size": engine_args.data_parallel_size > 1,
        "--enable-eplb": engine_args.enable_eplb,
        "--enable-lora": engine_args.enable_lora,
        "--enable-dbo": engine_args.enable_dbo,
        "--enable-elastic-ep": engine_args.enable_elastic_ep,
        "--prefill-context-parallel-size": engine_args.prefill_context_parallel_size > 1,
    }
    for flag, is_set in refused.items():
        if is_set:
            raise ConfigError(f"{flag} does not work with --kt-gguf, whose experts exist once per host; leave it out.")
    if engine_args.load_format not in ("auto", LOAD_FORMAT):
        raise ConfigError(
            f"--load-format {engine_args.load_format} contradicts --kt-gguf, which loads all weights from the GGUF; "
            f"leave --load-format out."
        )
    speculator = (engine_args.speculative_config or {}).get("method")
    if engine_args.speculative_config and speculator not in _SPECULATORS_WITHOUT_WEIGHTS:
        raise ConfigError(
            f"speculative decoding with {speculator or 'a draft model'!r} needs draft weights that --kt-gguf does not "
            f"load; use one of {', '.join(_SPECULATORS_WITHOUT_WEIGHTS)}, or leave it out."
        )


def check(engine_args: "EngineArgs", config: KTConfig, model_config: "ModelConfig") -> None:
    """Downloads the GGUF if it is on the hub, settles what runs where, and hands both to engine_args for the workers.

    Raises KTError when the GGUF cannot be had or does not fit config.json, the rules, the executor, or the memory of
    the host.
    """
    hf_config = model_config.hf_text_config
    _refuse_dtype(engine_args, model_config)
    # Only now: what is wrong with the model argument shows before hundreds of gigabytes are downloaded.
    gguf = hub.resolve(config.gguf, engine_args.download_dir, engine_args.hf_token)
    config = dataclasses.replace(config, gguf=gguf)
    model, fields, with_experts = GGUFModel.open(config.gguf), config_fields(hf_config), not config.no_experts
    plan = CheckpointPlan.build(model, fields, with_experts=with_experts)
    placement = Placement.resolve(config, plan, hf_config.num_experts_per_tok)
    if model_config.head_dtype != model_config.dtype:
        name = str(model_config.head_dtype).removeprefix("torch.")
        placement = dense_placement.keep_head(placement, f"head_dtype has vLLM compute it in {name}")
    _refuse_placement(engine_args, placement, str(model_config.dtype).removeprefix("torch."))
    placement = _settle_dense(engine_args, placement, plan, model_config)
    config = placement.settle_executor(warn=lambda warning: logger.warning("kt_vllm: %s", warning))
    engine_args.additional_config = {**engine_args.additional_config, CONFIG_KEY: config.to_dict()}
    isa, _ = _native.choose_isa(config.isa)
    # Only now: the rules may choose the isa.
    plan = CheckpointPlan.build(model, fields, supported_types=_native.supported_types(isa), with_experts=with_experts)
    _log_ignored(plan)
    for line in placement.report():
        logger.info("kt_vllm: %s", line)
    activation = getattr(hf_config, "hidden_act", "silu")
    if activation != "silu":
        raise ConfigError(
            f"config.json asks for the activation {activation!r}; the executor computes silu. "
            f"Serve this model without --kt-gguf."
        )
    needed = {
        "routed experts": placement.host_bytes,
        "executor workspace": _workspace_bytes(engine_args, config, plan, hf_config.num_experts_per_tok),
    }
    itemsize = model_config.dtype.itemsize
    if current_platform.is_cpu():  # whose device is the host's memory
        needed["routed experts on the device"] = placement.device_expert_bytes(itemsize)
        needed["dense weights"] = dense_placement.device_bytes(placement, plan.family, itemsize)
    else:
        max_num_tokens = engine_args.max_num_batched_tokens or 2 * _LONGEST_PIECE  # vLLM settles its own default later
        one = pinned_bytes(max_num_tokens, model_config.get_hidden_size(), hf_config.num_experts_per_tok, itemsize)
        needed["hand-over"] = one * engine_args.pipeline_parallel_size
    check_memory(needed, available_host_memory())


def _refuse_dtype(engine_args: "EngineArgs", model_config: "ModelConfig") -> None:
    """Raises ConfigError for a type that vLLM itself computes wrongly in, or not at all, for this model."""
    hf_config = model_config.hf_text_config
    dtype = str(model_config.dtype).removeprefix("torch.")
    seen = f"--dtype is {dtype}{' (from config.json)' if engine_args.dtype == 'auto' else ''}"
    for family in FAMILIES.values():
        scale = getattr(hf_config, family.float16_scale or "", 1)
        if dtype == "float16" and hf_config.model_type in family.hf_model_types and scale != 1:
            raise ConfigError(
                f"{seen} and config.json has {family.float16_scale} {scale}, which vLLM's {hf_config.model_type} "
                f"applies wrongly in float16; give --dtype bfloat16."
            )
    # vLLM does not ask its backend: with AMX's, float16 answers nonsense and float32 ends in a traceback.
    if model_config.use_mla and current_platform.is_cpu():
        backend = _latent_attention(engine_args, model_config)
        if not backend.supports_dtype(model_config.dtype):
            known = [str(d).removeprefix("torch.") for d in backend.supported_dtypes]
            raise ConfigError(
                f"{seen} and vLLM's attention backend {backend.get_name()}, which it takes for this model on this CPU, "
                f"computes in {' or '.join(known)}; give --dtype {known[0]}, or --attention-backend {_ANY_DTYPE_MLA}."
            )


def _latent_attention(engine_args: "EngineArgs", model_config: "ModelConfig") -> "type[AttentionBackend]":
    """What vLLM's workers will choose."""
    wish = engine_args.attention_backend or engine_args.attention_config.backend
    selector = AttentionSelectorConfig(
        head_size=model_config.get_head_size(),
        dtype=model_config.dtype,
        kv_cache_dtype=None,
        block_size=None,
        use_mla=True,
    )
    return resolve_obj_by_qualname(
        current_platform.get_attn_backend_cls(AttentionConfig.validate_backend_before(wish), selector)
    )


def _settle_dense(
    engine_args: "EngineArgs", placement: Placement, plan: CheckpointPlan, model_config: "ModelConfig"
) -> Placement:
    """The placement with the way each dense weight is kept on the device, which vLLM is told.

    Raises ConfigError for what contradicts it, ResourceError where the device is too small.
    """
    asked = {
        d.gpu_quant: d.by["gpu_quant"] for d in placement.decisions if d.gpu_quant not in (None, DEFAULT_GPU_QUANT)
    }
    if engine_args.quantization:
        for quant, where in asked.items():
            raise ConfigError(
                f"{where}: {quant} for dense weights and --quantization {engine_args.quantization} are two ways to say "
                f"the same; leave one of the two out."
            )
        return placement  # vLLM's, which then decides on its own what fits
    served = served_quants()
    if current_platform.is_cpu():
        placement = dense_placement.settle(placement, QUANTS[0], served, engine_args.tensor_parallel_size)
    else:
        placement = _settle_on_gpu(engine_args, placement, plan, model_config, served)
    for line in dense_placement.report(placement):
        logger.info("kt_vllm: %s", line)
    if placement.config.dense:
        # Not before: which one is known only now, and vLLM reads it when it makes the rest of its configuration.
        model_config.quantization = DENSE_QUANTIZATION
    return placement


def _settle_on_gpu(
    engine_args: "EngineArgs",
    placement: Placement,
    plan: CheckpointPlan,
    model_config: "ModelConfig",
    served: tuple[str, ...],
) -> Placement:
    itemsize = model_config.dtype.itemsize
    tensor, pipeline = engine_args.tensor_parallel_size, engine_args.pipeline_parallel_size
    settled = {quant: dense_placement.settle(placement, quant, served, tensor) for quant in served}
    sizes = {
        quant: dense_placement.device_bytes(choice, plan.family, itemsize, tensor, pipeline)
        for quant, choice in settled.items()
    }
    # By NVML: the process the user started makes no CUDA context.
    total = current_platform.get_device_total_memory()
    max_num_batched_tokens, max_num_seqs = default_batch(total)
    limits = ServingLimits(
        max_model_len=model_config.max_model_len,
        max_num_batched_tokens=engine_args.max_num_batched_tokens or max_num_batched_tokens,
        max_num_seqs=engine_args.max_num_seqs or max_num_seqs,
        tensor_parallel=tensor,
        pipeline_parallel=pipeline,
        itemsize=itemsize,
        kv_itemsize=1 if str(engine_args.kv_cache_dtype).startswith(("fp8", "int8")) else itemsize,
        gpu_memory_utilization=engine_args.gpu_memory_utilization,
        kv_cache_memory_bytes=engine_args.kv_cache_memory_bytes,
    )
    fields = config_fields(model_config.hf_text_config)
    budget = device_budget(fields, limits, total, placement.device_expert_bytes(itemsize))
    if placement.config.gpu_quant == DEFAULT_GPU_QUANT:
        quant, reason = choose(sizes, budget)
        logger.info("kt_vllm: %s", reason)
    else:
        quant = placement.config.gpu_quant
        # What vLLM does beside the weights is an estimate; that they alone do not fit is certain.
        if sizes[quant] > total:
            raise ResourceError(
                f"the dense weights take {sizes[quant] / 1e9:.1f} GB in {quant} and the GPU has {total / 1e9:.1f} GB; "
                f"give --kt-gpu-quant auto, or a larger GPU."
            )
        logger.info("kt_vllm: --kt-gpu-quant %s: %.1f GB of dense weights; %s.", quant, sizes[quant] / 1e9, budget)
    return settled[quant]


def _refuse_placement(engine_args: "EngineArgs", placement: Placement, dtype: str) -> None:
    """Raises ConfigError for what flags and rules ask for and this release does not serve."""
    for sentence in dense_placement.refusals(placement, dtype, served_quants()):
        raise ConfigError(sentence)
    on_device = [d for d in placement.decisions if d.device_experts]
    if on_device and engine_args.enable_expert_parallel:
        raise ConfigError(
            f"{on_device[0].by['place']}: experts on the gpu do not work with --enable-expert-parallel, which spreads "
            "them over the ranks by itself; leave one of the two out."
        )
    split = [d for d in on_device if d.num_host_experts]
    if split and engine_args.quantization:
        raise ConfigError(
            f"{split[0].by['place']}: single experts on the gpu do not work with --quantization "
            f"{engine_args.quantization}; put all or none of a layer's experts there, or leave --quantization out."
        )


def _workspace_bytes(engine_args: "EngineArgs", config: KTConfig, plan: CheckpointPlan, top_k: int) -> int:
    """What the executors take for their calls, one a pipeline stage. Raises GGUFError for layers they refuse."""
    try:
        nbytes = executor_workspace_bytes(
            [x for i, layer in plan.experts.items() if (x := host_experts(layer, config.placement(i))) is not None],
            isa=config.isa,
            cpus=config.cpus,
            # vLLM settles its own default later; the executor cuts what is longer than this.
            max_num_tokens=engine_args.max_num_batched_tokens or _LONGEST_PIECE,
            top_k=top_k,
        )
    except _native.NativeError as error:
        raise GGUFError(f"the experts of {config.gguf!r} cannot be computed: {error}") from None
    return nbytes * engine_args.pipeline_parallel_size


def _log_ignored(plan: CheckpointPlan) -> None:
    """One line for each reason to leave tensors out."""
    reasons: dict[str, list[str]] = {}
    for name, reason in plan.ignored:
        reasons.setdefault(reason, []).append(name)
    for reason, names in reasons.items():
        logger.info("kt_vllm: %d tensors of the GGUF are not used: %s (e.g. %s)", len(names), reason, names[0])
