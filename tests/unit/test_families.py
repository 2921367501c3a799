"""The tables of names against those of the gguf package, which llama.cpp's converter uses."""

import re

import gguf
import pytest
from gguf.constants import MODEL_ARCH, MODEL_ARCH_NAMES

from kt_vllm.errors import GGUFError
from kt_vllm.families import FAMILIES, ModelFamily, find_family
from kt_vllm.gguf.dense import TRANSFORMS
from kt_vllm.gguf.header import GGUFTensor

# (architecture, parameter): the converter handles these outside its name map.
NOT_IN_THE_MAP = {
    ("deepseek2", "mlp.gate.e_score_correction_bias"),
    ("glm4moe", "mlp.gate.e_score_correction_bias"),
    ("deepseek2", "self_attn.kv_b_proj.weight"),  # there as the fused form; the split halves are made by the converter
}
# In the package's lists, and in no file with experts: DeepSeek has low-rank keys and values, Mixtral no dense layer.
NEVER_WRITTEN = {
    MODEL_ARCH.DEEPSEEK2: {"blk.5.attn_k", "blk.5.attn_v", "blk.5.attn_rot_embd"},
    MODEL_ARCH.LLAMA: {"blk.5.ffn_gate", "blk.5.ffn_up", "blk.5.ffn_down"},
}


def name_map(family: ModelFamily) -> gguf.TensorNameMap:
    arch = next(a for a, name in MODEL_ARCH_NAMES.items() if name == family.gguf_architecture)
    return gguf.get_tensor_name_map(arch, 8)


def entries() -> list[tuple[ModelFamily, str, str, str, tuple[str, ...]]]:
    """(family, prefix of Hugging Face, prefix of GGUF, parameter, GGUF names) of every entry of every table."""
    found = []
    for family in FAMILIES.values():
        for rules, hf, blk in (
            (family.global_names, "", ""),
            (family.layer_names, family.layer_prefix.format(layer=5), "blk.5."),
        ):
            found += [(family, hf, blk, rule.hf, rule.gguf) for rule in rules]
    return found


@pytest.mark.parametrize(("family", "hf_prefix", "blk", "hf", "names"), entries())
def test_names_are_those_of_the_gguf_package(
    family: ModelFamily, hf_prefix: str, blk: str, hf: str, names: tuple[str, ...]
) -> None:
    mapped = name_map(family).get_name(hf_prefix + hf, try_suffixes=(".weight", ".bias"))
    if (family.gguf_architecture, hf) in NOT_IN_THE_MAP and mapped not in [blk + n for n in names]:
        return
    if hf == family.output and names == ("token_embd.weight",):
        return  # a file without an output tensor
    assert [mapped] == [blk + n for n in names]


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
def test_every_gguf_name_exists(family: ModelFamily) -> None:
    arch = next(a for a, name in MODEL_ARCH_NAMES.items() if name == family.gguf_architecture)
    known = {gguf.TENSOR_NAMES[t].format(bid=5) for t in gguf.MODEL_TENSORS[arch]}
    used = {n for rule in family.global_names for n in rule.gguf}
    used |= {f"blk.5.{n}" for rule in family.layer_names for n in rule.gguf}
    used |= {f"blk.5.{n}" for n in (family.experts.gate, family.experts.up, family.experts.down)}
    assert {re.sub(r"\.(weight|bias)$", "", n) for n in used} <= known
    # And the reverse: what the converter may write is loaded or ignored.
    ignored = tuple(n.removesuffix("weight").removesuffix(".") for n, _ in family.ignored)
    rest = known - {re.sub(r"\.(weight|bias)$", "", n) for n in used}
    assert {n for n in rest if not n.removeprefix("blk.5.").startswith(ignored)} == NEVER_WRITTEN.get(arch, set())


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
def test_experts_are_those_of_the_gguf_package(family: ModelFamily) -> None:
    names = name_map(family)
    for gguf_name, hf in (
        (family.experts.gate, "mlp.experts.gate_proj"),
        (family.experts.up, "mlp.experts.up_proj"),
        (family.experts.down, "mlp.experts.down_proj"),
    ):
        assert f"{names.get_name(f'model.layers.5.{hf}')}.weight" == f"blk.5.{gguf_name}"


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
def test_a_family_is_consistent(family: ModelFamily) -> None:
    assert FAMILIES[family.gguf_architecture] is family
    assert hash(family)  # frozen, all the way down: data
    for rule in family.global_names + family.layer_names:
        assert rule.transform in TRANSFORMS
        assert (len(rule.gguf) > 1) == (rule.transform == "mla_kv_b")
        assert bool(rule.arguments) == (rule.transform == "llama_rope_rows")
    made = [rule.hf for rule in family.global_names + family.layer_names]
    assert all(need.hf in made for need in family.needs)
    assert family.output in made
    assert len({check.gguf for check in family.checks}) == len(family.checks)


def test_find_family() -> None:
    assert find_family("deepseek2").gguf_architecture == "deepseek2"
    assert find_family("deepseek2", "deepseek_v2") is find_family("deepseek2", "deepseek_v3")
    supported = "deepseek2, glm4moe, llama, qwen2moe, qwen3moe"
    with pytest.raises(GGUFError, match=rf"architecture 'mamba'.*not supported: use one of {supported}$"):
        find_family("mamba")
    with pytest.raises(GGUFError, match=r"'deepseek2'.*model_type 'llama'.*deepseek_v3, kimi_k2 is expected: give"):
        find_family("deepseek2", "llama")


def test_tensors_are_values() -> None:
    assert GGUFTensor("a", "F32", (1,), "p", 0, 4) == GGUFTensor("a", "F32", (1,), "p", 0, 4)
