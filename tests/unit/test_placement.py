"""Where modules go: which rule decides, what the executor keeps, what the workers are told."""

import json
from pathlib import Path

import numpy as np
import pytest

from kt_vllm import _native
from kt_vllm.checkpoint import CheckpointPlan, ExpertSource, LayerExperts
from kt_vllm.config import KTConfig, LayerPlacement
from kt_vllm.cpus import allowed_cpus
from kt_vllm.dense_placement import refusals, report, settle
from kt_vllm.errors import KTError
from kt_vllm.expert_spans import host_experts, read_expert, select_experts
from kt_vllm.families import FAMILIES
from kt_vllm.gguf.reader import GGUFModel
from kt_vllm.placement import Placement, experts_name, list_modules, load_rules
from kt_vllm.rules import EXPERTS_KEYS, read_rules
from tests import gguf_files as files

SHIPPED = Path(__file__).resolve().parents[2] / "rules"


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> CheckpointPlan:
    """Layers 0-2, the first dense; 4 experts, top-2."""
    path = files.write_sparse(tmp_path_factory.mktemp("model") / "m.gguf", files.Shape(), lambda name: "F32")
    return CheckpointPlan.build(GGUFModel.open(str(path)), files.hf_config())


def resolve(plan: CheckpointPlan, tmp_path: Path, rules: str | None, **settings: object) -> Placement:
    if rules is not None:
        (tmp_path / "rules.yaml").write_text(rules)
        settings["rules"] = str(tmp_path / "rules.yaml")
    return Placement.resolve(KTConfig(gguf="/m", **settings), plan, top_k=2)  # type: ignore[arg-type]


def by_name(placement: Placement) -> dict[str, object]:
    return {decision.module.name: decision for decision in placement.decisions}


def test_every_weight_of_the_file_belongs_to_a_module(plan: CheckpointPlan) -> None:
    modules = list_modules(plan)
    assert len({module.name for module in modules}) == len(modules)
    dense = [module for module in modules if not module.num_experts]
    assert sum(module.num_weights for module in dense) == sum(tensor.num_weights for tensor in plan.dense)
    experts = {module.name: module for module in modules if module.num_experts}
    assert list(experts) == ["model.layers.1.mlp.experts", "model.layers.2.mlp.experts"]
    module = experts["model.layers.1.mlp.experts"]
    assert (module.layer, module.num_experts, module.num_weights) == (1, 4, 3 * 4 * 32 * 64)
    assert module.expert_bytes * 4 == plan.experts[1].nbytes
    assert [m.layer for m in modules] == sorted((m.layer for m in modules), key=lambda i: -1 if i is None else i)


def test_the_head_is_a_module_that_rules_may_quantise(plan: CheckpointPlan, tmp_path: Path) -> None:
    shape = files.Shape()
    modules = {module.name: module for module in list_modules(plan)}
    assert [name for name, module in modules.items() if module.is_head] == ["lm_head"]
    assert modules["lm_head"].matrix == (shape.vocab, shape.hidden) and modules["lm_head"].kept is None
    assert modules["model.embed_tokens"].matrix is None and modules["model.norm"].matrix is None
    assert modules["model.layers.0.self_attn.kv_b_proj"].kept is not None
    placement = resolve(plan, tmp_path, "rules:\n  - match: ^lm_head$\n    gpu_quant: int4")
    head = by_name(placement)["lm_head"]
    assert (head.gpu_quant, head.by["gpu_quant"]) == ("int4", f"{tmp_path / 'rules.yaml'}:3")
    head = by_name(resolve(plan, tmp_path, None, gpu_quant="int4"))["lm_head"]
    assert (head.gpu_quant, head.by["gpu_quant"]) == ("int4", "--kt-gpu-quant")


def test_a_tied_head_has_no_weights_of_its_own(tmp_path: Path) -> None:
    path = files.write_sparse(tmp_path / "m.gguf", files.Shape(), lambda name: "F32")
    tied = CheckpointPlan.build(GGUFModel.open(str(path)), {**files.hf_config(), "tie_word_embeddings": True})
    modules = list_modules(tied)
    (head,) = [module for module in modules if module.is_head]
    assert (head.name, head.num_weights) == ("lm_head", 0)
    assert sum(m.num_weights for m in modules if not m.num_experts) == sum(tensor.num_weights for tensor in tied.dense)
    placement = resolve(tied, tmp_path, "rules:\n  - match: ^lm_head$\n    gpu_quant: int4")
    (sentence,) = refusals(placement, "bfloat16")
    assert sentence.endswith(
        "gpu_quant is int4 for lm_head, which stays in the model's type, as it is the embedding as well "
        "(tie_word_embeddings in config.json); match other linear layers, or give auto."
    )
    # A rule for more than the head is none for it alone.
    settled = settle(resolve(tied, tmp_path, "rules:\n  - match: '.'\n    gpu_quant: int4"))
    assert refusals(settled, "bfloat16") == []
    assert "; the head in bf16, as it is the embedding as well (" in report(settled)[0]


def test_the_shipped_rules_put_all_experts_on_the_cpu(plan: CheckpointPlan, tmp_path: Path) -> None:
    placement = resolve(plan, tmp_path, None)
    assert placement.config.layers == ()
    assert placement.rules is not None and placement.rules.name == "rules/deepseek2.yaml"
    assert placement.host_bytes == plan.expert_bytes and placement.device_expert_bytes(2) == 0
    assert refusals(placement, "float16") == []
    assert {decision.by["place"].split(":")[0] for decision in placement.decisions} == {"rules/deepseek2.yaml"}


@pytest.mark.parametrize("file", sorted(SHIPPED.glob("*.yaml")), ids=lambda file: file.stem)
def test_shipped_rules_are_for_the_architecture_they_are_named_after(file: Path) -> None:
    rules = read_rules(file)
    assert rules.architecture == file.stem
    assert load_rules(None, file.stem) is not None
    names = [("model.layers.3.mlp.experts", 3), ("model.layers.3.self_attn.o_proj", 3), ("lm_head", None)]
    assert all(any(rule.select(names)) for rule in rules.rules)


@pytest.mark.parametrize("architecture", FAMILIES)
def test_every_family_has_shipped_rules_that_match_it(architecture: str) -> None:
    rules = load_rules(None, architecture)
    assert rules is not None and rules.name == f"rules/{architecture}.yaml"
    family = FAMILIES[architecture]
    prefix = family.layer_prefix.format(layer=3)
    dense = [(prefix + name.hf, 3) for name in family.layer_names]
    experts = [(prefix + experts_name(family), 3)]
    for rule in rules.rules:
        assert any(rule.select(experts if rule.is_about(EXPERTS_KEYS) else dense)), rule.line


def test_without_rules_for_the_architecture_all_is_by_default(
    plan: CheckpointPlan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kt_vllm.placement._SHIPPED", (tmp_path,))
    placement = resolve(plan, tmp_path, None)
    assert placement.rules is None and placement.host_bytes == plan.expert_bytes
    assert {decision.by["place"] for decision in placement.decisions} == {"default"}


def test_the_first_match_wins(plan: CheckpointPlan, tmp_path: Path) -> None:
    placement = resolve(
        plan,
        tmp_path,
        """rules:
  - layers: 2
    experts: gpu
  - match: 'experts$'
    gpu_experts: [3, 1]
    num_experts_per_tok: 1
    isa: reference
  - match: 'kv_b_proj'
    gpu_quant: fp8
""",
    )
    decisions = by_name(placement)
    second, first = decisions["model.layers.2.mlp.experts"], decisions["model.layers.1.mlp.experts"]
    assert (second.device_experts, second.top_k, second.num_host_experts) == ((0, 1, 2, 3), None, 0)
    assert (first.device_experts, first.top_k, first.num_host_experts) == ((1, 3), 1, 2)
    name = tmp_path / "rules.yaml"
    assert second.by == {"place": f"{name}:3"}
    assert first.by == {"place": f"{name}:5", "num_experts_per_tok": f"{name}:6"}
    assert placement.config.layers == (LayerPlacement(1, (1, 3), 1), LayerPlacement(2, None, None))
    assert (placement.config.isa, placement.executor_by["isa"]) == ("reference", f"{name}:7")
    assert placement.executor_by["threads"] == placement.executor_by["numa"] == "default"
    # Halves of layer 1 on either side, layer 2 on the device; in bf16 there.
    assert placement.host_bytes == plan.experts[1].nbytes // 2
    assert placement.device_expert_bytes(2) == (plan.experts[1].nbytes // 2 + plan.experts[2].nbytes) // 2
    assert refusals(placement, "bfloat16", ("bf16", "int4")) == [
        f"{name}:9: gpu_quant is fp8, for which there are no kernels on this platform; give bf16, int4 or auto."
    ]
    assert any("routed experts of layers 2 are on" in line for line in placement.report())


def test_all_of_a_layers_experts_by_number_is_the_whole_layer(plan: CheckpointPlan, tmp_path: Path) -> None:
    for some in ("4", "[0, 1, 2, 3]"):
        placement = resolve(plan, tmp_path, f"rules:\n  - layers: 1\n    gpu_experts: {some}")
        assert placement.config.layers == (LayerPlacement(1, None),)


def test_the_command_line_wins(plan: CheckpointPlan, tmp_path: Path) -> None:
    rules = "rules:\n  - match: experts$\n    isa: avx2\n    threads: 7\n    numa: off\n    num_experts_per_tok: 2"
    placement = resolve(plan, tmp_path, rules)
    config = placement.config
    assert (config.isa, config.cpu_infer, config.numa, config.layers) == ("avx2", 7, "off", ())
    placement = resolve(plan, tmp_path, rules, isa="reference", cpu_infer=1, numa="auto", num_experts_per_tok=1)
    config = placement.config
    assert (config.isa, config.cpu_infer, config.numa) == ("reference", 1, "off")  # auto is what says nothing
    assert {layer.top_k for layer in config.layers} == {1}
    assert placement.executor_by["isa"] == "--kt-isa" and placement.executor_by["threads"] == "--kt-cpu-infer"
    assert {d.by.get("num_experts_per_tok") for d in placement.decisions if d.top_k} == {"--kt-num-experts-per-tok"}


def test_more_experts_than_the_model_has_for_a_token(plan: CheckpointPlan, tmp_path: Path) -> None:
    with pytest.raises(KTError) as raised:
        resolve(plan, tmp_path, None, num_experts_per_tok=3)
    assert (
        str(raised.value) == "--kt-num-experts-per-tok is 3 and the model was made for 2 experts a token; give 1 to 2."
    )
    assert resolve(plan, tmp_path, None, num_experts_per_tok=2).config.layers == ()


@pytest.mark.parametrize(
    ("setting", "start"),
    [("numa: 4095", ":3: numa is '4095' and this process may use no CPU"), ("isa: amx", ":3: isa is 'amx': kernels")],
)
def test_what_this_machine_lacks_names_the_line(
    setting: str, start: str, plan: CheckpointPlan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(isa: str) -> tuple[str, str]:
        if isa == "amx":
            raise _native.NativeError("kernels 'amx' need amx_tile")
        return isa, ""

    monkeypatch.setattr(_native, "choose_isa", refuse)
    placement = resolve(plan, tmp_path, f"rules:\n  - match: experts$\n    {setting}")
    with pytest.raises(KTError) as raised:
        placement.settle_executor()
    assert str(raised.value).startswith(f"{tmp_path / 'rules.yaml'}{start}")


def test_threads_of_a_rule_are_pinned(plan: CheckpointPlan, tmp_path: Path) -> None:
    warnings: list[str] = []
    count = len(allowed_cpus()) + 1
    placement = resolve(plan, tmp_path, f"rules:\n  - match: experts$\n    threads: {count}")
    assert len(placement.settle_executor(warnings.append).cpus) == count
    assert len(warnings) == 1 and f"rules.yaml:3: threads is {count}" in warnings[0]


def test_the_workers_get_it_as_json() -> None:
    config = KTConfig(gguf="/m", layers=(LayerPlacement(1, (0, 2), 3), LayerPlacement(2, None), LayerPlacement(5)))
    again = KTConfig.from_dict(json.loads(json.dumps(config.to_dict())))
    assert again == config
    assert again.placement(1) == LayerPlacement(1, (0, 2), 3) and again.placement(2).device_experts is None
    assert again.placement(4) == LayerPlacement(4) and again.placement(4).device_experts == ()


def test_the_executor_gets_the_others_of_a_split_layer(tmp_path: Path) -> None:
    """From a stacked tensor and from one tensor an expert, whose spans may be in any files."""
    rng = np.random.default_rng()
    values = rng.standard_normal((5, 3, 32), dtype=np.float32)
    stacked, single = tmp_path / "stacked", tmp_path / "single"
    stacked.write_bytes(b"x" * 7 + values.tobytes())
    single.write_bytes(values[::-1].tobytes())
    size = values[0].nbytes
    spans = tuple((str(single), (4 - i) * size, size) for i in range(5))
    for source in (
        ExpertSource("F32", (5, 3, 32), ((str(stacked), 7, 5 * size),)),
        ExpertSource("F32", (5, 3, 32), spans),
    ):
        layer = LayerExperts(source, source, source)
        assert host_experts(layer, LayerPlacement(0)) is layer
        assert host_experts(layer, LayerPlacement(0, None)) is None
        kept = host_experts(layer, LayerPlacement(0, (0, 3)))
        assert kept is not None and kept.up.shape == (3, 3, 32) and kept.nbytes == 3 * 3 * size
        assert kept.gate.nbytes == 3 * size
        for number, expert in enumerate((1, 2, 4)):
            assert np.array_equal(read_expert(kept.gate, number), values[expert])
        assert np.array_equal(read_expert(select_experts(layer, [3]).down, 0), values[3])
        if source.spans == ((str(stacked), 7, 5 * size),):  # neighbours are one read
            assert kept.gate.spans == ((str(stacked), 7 + size, 2 * size), (str(stacked), 7 + 4 * size, size))
