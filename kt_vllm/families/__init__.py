"""Every model family as data: how its GGUF tensors are called in Hugging Face's model, and which numbers must agree.

To add a family, add a file with its ModelFamily and name it in FAMILIES. Nothing else in the package knows a model or a
tensor by name.
"""

from collections.abc import Mapping

from kt_vllm.errors import GGUFError
from kt_vllm.families import deepseek2, glm4moe, llama, qwen2moe, qwen3moe
from kt_vllm.families.schema import (
    DenseName,
    ExpertNames,
    FieldCheck,
    HFFields,
    ModelFamily,
    MoELayers,
    NeedsSetting,
)

__all__ = [
    "FAMILIES",
    "DenseName",
    "ExpertNames",
    "FieldCheck",
    "HFFields",
    "MoELayers",
    "ModelFamily",
    "NeedsSetting",
    "find_family",
]

FAMILIES: Mapping[str, ModelFamily] = {
    module.FAMILY.gguf_architecture: module.FAMILY for module in (deepseek2, glm4moe, llama, qwen2moe, qwen3moe)
}


def find_family(gguf_architecture: str, hf_model_type: str | None = None) -> ModelFamily:
    """The family of a GGUF's general.architecture; with hf_model_type, that of config.json is checked to belong to it.

    Raises GGUFError naming what is supported.
    """
    family = FAMILIES.get(gguf_architecture)
    if family is None:
        raise GGUFError(
            f"the GGUF file has architecture {gguf_architecture!r}, which is not supported: use one of "
            f"{', '.join(sorted(FAMILIES))}"
        )
    if hf_model_type is not None and hf_model_type not in family.hf_model_types:
        raise GGUFError(
            f"the GGUF file has architecture {gguf_architecture!r} and config.json has model_type {hf_model_type!r}, "
            f"where one of {', '.join(family.hf_model_types)} is expected: give the model folder that belongs to the "
            "GGUF file"
        )
    return family
