"""The model folder's config.json, without the quantisation of weights we do not load.

DeepSeek-R1's config announces fp8 weights. Ours come from the GGUF, so vLLM must build plain linear layers, or those
that the user's --quantization asks for. What config.json leaves open is filled in as Hugging Face computes it.
"""

from pathlib import Path
from typing import Any

import torch
from transformers import PretrainedConfig
from vllm.transformers_utils.config import HFConfigParser

from kt_vllm.log import init_logger

logger = init_logger(__name__)

CONFIG_FORMAT = "kt_gguf"


def config_fields(config: PretrainedConfig) -> dict[str, Any]:
    """The fields of config.json under every name they go by.

    transformers writes a field under one name and reads it under others (Qwen3-MoE's num_experts comes back as
    num_local_experts), and which one is which changes with its releases.
    """
    fields = config.to_dict()
    for other, name in config.attribute_map.items():
        if name in fields:
            fields.setdefault(other, fields[name])
    return fields


class KTConfigParser(HFConfigParser):
    """HFConfigParser, then `quantization_config` dropped from both the dict and the config object."""

    def parse(
        self,
        model: str | Path,
        trust_remote_code: bool,
        revision: str | None = None,
        code_revision: str | None = None,
        **kwargs: Any,
    ) -> tuple[dict, PretrainedConfig]:
        config_dict, config = super().parse(model, trust_remote_code, revision, code_revision, **kwargs)
        dropped = config_dict.pop("quantization_config", None)
        if dropped is not None:
            if hasattr(config, "quantization_config"):
                del config.quantization_config
            logger.info(
                "kt_vllm: ignoring the %s quantization of config.json; the weights come from the GGUF.",
                dropped.get("quant_method", "unnamed"),
            )
        if not hasattr(config, "moe_router_dtype"):
            # Of vLLM's DeepSeek: the router's logits in float32, as Hugging Face has them, not in the model's type.
            config.moe_router_dtype = config_dict["moe_router_dtype"] = "float32"
        if getattr(config, "dtype", None) is None and getattr(config.get_text_config(), "dtype", None) is None:
            # vLLM would look into the folder's or the repository's safetensors for it, which are not used here.
            config.dtype = torch.bfloat16
            logger.info("kt_vllm: config.json has no dtype; taking bfloat16, in which these models were trained.")
        return config_dict, config
