"""The same weights in every layout are the same model: equal parameters, and equal bytes for the executor."""

import itertools
import json
import os
import struct
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

from kt_vllm import _native
from kt_vllm.checkpoint import CheckpointPlan, iter_dense
from kt_vllm.errors import GGUFError
from kt_vllm.gguf import GGUFModel
from kt_vllm.gguf.experts import ExpertSource
from tests import gguf_files as files
from tests import gguf_layouts as layouts
from tests.gguf_files import Shape, gguf_metadata, hf_config, random_tensors
from tests.gguf_layouts import LAYOUTS, Raw, Raws

# gate, up and down of each layer in types of their own, as dynamic quantisations have it.
EXPERT_TYPES = {1: ("Q8_0", "Q8_0", "Q5_0"), 2: ("Q4_1", "Q5_1", "Q4_0")}
DENSE_TYPES = ("F16", "BF16", "Q8_0", "Q4_0", "Q5_1")
METADATA = {"general.architecture": "deepseek2"} | {f"deepseek2.{k}": v for k, v in gguf_metadata().items()}


def type_of(name: str) -> str:
    for kind, i in (("gate_exps", 0), ("up_exps", 1), ("down_exps", 2)):
        if kind in name:
            return EXPERT_TYPES[int(name.split(".")[1])][i]
    small = "norm" in name or "exp_probs" in name or "gate_inp" in name
    return "F32" if small else DENSE_TYPES[sum(map(ord, name)) % len(DENSE_TYPES)]


@pytest.fixture(scope="module")
def raws(tmp_path_factory: pytest.TempPathFactory) -> Raws:
    seed = int(np.random.default_rng().integers(1 << 30))
    path = files.write(tmp_path_factory.mktemp("m") / "m.gguf", random_tensors(seed=seed), type_of=type_of)
    return layouts.read(GGUFModel.open(str(path)))


def data_of(source: ExpertSource) -> bytes:
    return b"".join(np.fromfile(path, np.uint8, n, offset=at).tobytes() for path, at, n in source.spans)


def contents(path: Path | str, **config: Any) -> dict[str, object]:
    """All that loading takes from a model: each parameter's values, each projection's type, shape and bytes."""
    plan = CheckpointPlan.build(GGUFModel.open(str(path)), hf_config(**config))
    found: dict[str, object] = {name: values.numpy().tobytes() for name, values in iter_dense(plan)}
    for layer, experts in plan.experts.items():
        for kind in ("gate", "up", "down"):
            source = getattr(experts, kind)
            assert source.nbytes == len(data_of(source))
            found[f"{layer}.{kind}"] = source.type, source.shape, data_of(source)
    return found


@pytest.fixture(scope="module")
def expected(raws: Raws) -> dict[str, object]:
    found: dict[str, object] = {
        f"{layer}.{kind}": (type_, raw.shape, raw.data.tobytes())
        for layer, types in EXPERT_TYPES.items()
        for kind, type_ in zip(("gate", "up", "down"), types, strict=True)
        for raw in [raws[f"blk.{layer}.ffn_{kind}_exps.weight"]]
    }
    assert len({part[2] for part in found.values() if isinstance(part, tuple)}) == len(found)
    kv_b = layouts.kv_b_fused(raws)["blk.1.attn_kv_b.weight"].values()
    found["model.layers.1.self_attn.kv_b_proj.weight"] = kv_b.tobytes()
    found["model.layers.2.mlp.gate.e_score_correction_bias"] = raws["blk.2.exp_probs_b.bias"].data.tobytes()
    found["lm_head.weight"] = raws["output.weight"].values().tobytes()
    return found


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    "how",
    [
        {},
        {"version": 2},
        {"shards": 4},
        {"shards": 3, "empty_first": True, "version": 2},
        {"alignment": 256, "shards": 2},
    ],
    ids=str,
)
def test_every_layout_in_every_container(
    layout: str, how: dict[str, Any], raws: Raws, expected: dict[str, object], tmp_path: Path
) -> None:
    mtp = {"num_nextn_predict_layers": 1} if layout == "with_mtp_layer" else {}
    metadata = METADATA | ({"deepseek2.block_count": 4, "deepseek2.nextn_predict_layer_count": 1} if mtp else {})
    path = layouts.write(tmp_path / "m.gguf", LAYOUTS[layout](raws), metadata, **how)
    found = contents(path, **mtp)
    assert {name: found[name] for name in expected} == expected
    plain = contents(layouts.write(tmp_path / "plain.gguf", raws, METADATA))
    assert found == plain


def test_all_layouts_at_once(raws: Raws, expected: dict[str, object], tmp_path: Path) -> None:
    old = layouts.bare_correction_bias(layouts.kv_b_fused(layouts.expert_each(raws)))
    path = layouts.write(tmp_path / "m.gguf", layouts.shuffled(old), METADATA, version=2, shards=7)
    found = contents(path)
    assert {name: found[name] for name in expected} == expected
    gate = CheckpointPlan.build(GGUFModel.open(str(path)), hf_config()).experts[1].gate
    assert len(gate.spans) == 4


def test_tied_embeddings(raws: Raws, tmp_path: Path) -> None:
    """A file without output.weight: config.json tells whether vLLM's model has a parameter for it."""
    less = {name: raw for name, raw in raws.items() if name != "output.weight"}
    path = layouts.write(tmp_path / "m.gguf", layouts.expert_each(less), METADATA)
    embedding = raws["token_embd.weight"].values().tobytes()
    untied, tied = contents(path), contents(path, tie_word_embeddings=True)
    assert untied.pop("lm_head.weight") == embedding == tied["model.embed_tokens.weight"]
    assert tied == untied


def test_any_file_of_a_set_and_its_folder(raws: Raws, expected: dict[str, object], tmp_path: Path) -> None:
    """In whichever order a folder lists them, and whichever was written first."""
    folder = tmp_path / "set"
    folder.mkdir()
    layouts.write(folder / "m.gguf", layouts.shuffled(raws), METADATA, shards=5)
    for path in sorted(folder.iterdir(), reverse=True):
        path.write_bytes(path.read_bytes())
        os.utime(path, ns=(1, 1))
    for given in (folder, *folder.iterdir()):
        found = contents(given)
        assert {name: found[name] for name in expected} == expected


def test_shards_of_two_sets(raws: Raws, tmp_path: Path) -> None:
    """A shard of another model under the right name, and one that is there twice under two names."""
    ours = sorted(layouts.write(tmp_path / "m.gguf", raws, METADATA, shards=3).parent.glob("m-*"))
    other = tmp_path / "other"
    other.mkdir()
    layouts.write(other / "m.gguf", layouts.expert_each(raws), METADATA, shards=3)
    kept = ours[1].read_bytes()
    ours[1].write_bytes((other / ours[1].name).read_bytes())
    with pytest.raises(GGUFError, match=r"3 shards of .* tensors together and split.tensors.count .*: they are not of"):
        contents(tmp_path)
    ours[1].write_bytes(ours[2].read_bytes())
    with pytest.raises(GGUFError, match=r"m-00002-of-00003.gguf' says its split.no is 2, and 1 is expected"):
        contents(tmp_path)
    ours[1].write_bytes(kept)
    contents(tmp_path)
    (tmp_path / "m (copy)-00002-of-00003.gguf").write_bytes(kept)
    with pytest.raises(GGUFError, match=r"has 2 models \(m \(copy\)-00002-of-00003.gguf, m-0000"):
        contents(tmp_path)
    contents(ours[2])  # a file of a set says which set is meant


def test_a_folder_with_what_goes_beside_a_model(raws: Raws, expected: dict[str, object], tmp_path: Path) -> None:
    for name in ("mmproj-m-F16.gguf", "m.imatrix.gguf", "imatrix_x.gguf", "mtp-m.gguf"):
        (tmp_path / name).write_bytes(b"GGUF of another kind")
    layouts.write(tmp_path / "m.gguf", raws, METADATA, shards=2)
    found = contents(tmp_path)
    assert {name: found[name] for name in expected} == expected


# gate, up and down of each layer, and all dense matrices in turn: Unsloth's dynamic files, Q2_K_L and IQ mixes.
MIXES = {
    "UD-Q2_K_XL": (["Q2_K Q2_K Q3_K", "IQ2_XXS Q2_K Q6_K", "Q3_K IQ3_XXS Q4_K"], "Q4_K Q6_K Q5_K Q8_0 IQ4_XS"),
    "UD-IQ1_S": (["IQ1_S IQ1_S IQ2_XXS", "IQ1_M IQ1_S IQ3_S", "IQ1_S IQ1_M IQ4_XS"], "IQ2_XS Q4_K IQ4_NL Q6_K IQ1_M"),
    "Q2_K_L": (["Q2_K Q2_K Q3_K"] * 3, "Q8_0 Q2_K Q4_K"),
    "IQ3_M": (["IQ3_S IQ3_S Q4_K", "IQ3_S IQ3_XXS Q4_K", "IQ2_S IQ2_S IQ3_S"], "IQ3_S IQ2_S IQ3_XXS IQ2_XXS Q5_K"),
    "MXFP4_MOE": (["MXFP4 MXFP4 MXFP4"] * 3, "Q8_0 BF16 F16 Q4_1 Q5_0 TQ1_0"),
}


@pytest.mark.parametrize("each", [False, True])
@pytest.mark.parametrize("mix", MIXES)
def test_mixes_of_types(mix: str, each: bool, tmp_path: Path) -> None:
    """Random bytes are as good as weights here: every type's values are those that the gguf package decodes."""
    experts, dense = MIXES[mix]
    shape = files.TINY_SHAPE
    rng = np.random.default_rng()
    raws: Raws = {}
    for i, (name, dims) in enumerate(files.tensor_shapes(shape).items()):
        if name.endswith("_exps.weight"):
            layer, kind = int(name.split(".")[1]), ("gate", "up", "down").index(name.split("_")[1])
            type_ = experts[layer - 1].split()[kind]
        else:
            kept = len(dims) == 1 or "gate_inp" in name or "k_b" in name
            type_ = "F32" if kept else dense.split()[i % len(dense.split())]
        block, block_bytes = GGML_QUANT_SIZES[GGMLQuantizationType[type_]]
        data = rng.integers(0, 256, int(np.prod(dims)) // block * block_bytes, np.uint8)
        raws[name] = Raw.f32(rng.standard_normal(dims, np.float32)) if type_ == "F32" else Raw(type_, dims, data)
    metadata = {"general.architecture": "deepseek2"}
    metadata |= {f"deepseek2.{k}": v for k, v in gguf_metadata(shape).items()}
    path = layouts.write(tmp_path / "m.gguf", layouts.expert_each(raws) if each else raws, metadata, shards=3)
    plan = CheckpointPlan.build(GGUFModel.open(str(path)), hf_config(shape), _native.supported_types("reference"))
    for layer, found in plan.experts.items():
        assert [found.gate.type, found.up.type, found.down.type] == experts[layer - 1].split()
        for kind in ("gate", "up", "down"):
            assert data_of(getattr(found, kind)) == raws[f"blk.{layer}.ffn_{kind}_exps.weight"].data.tobytes()
    types = set()
    with np.errstate(all="ignore"):
        for tensor, (_, values) in zip(plan.dense, iter_dense(plan), strict=True):
            if len(tensor.sources) == 1:
                source = tensor.sources[0]
                types.add(source.type)
                assert np.array_equal(values.numpy(), raws[source.name].values(), equal_nan=True), source.name
    assert types >= set(dense.split())


def test_multi_token_prediction_is_reported(raws: Raws, tmp_path: Path) -> None:
    path = layouts.write(
        tmp_path / "m.gguf", layouts.expert_each(layouts.with_mtp_layer(raws)), METADATA | {"deepseek2.block_count": 4}
    )
    plan = CheckpointPlan.build(GGUFModel.open(str(path)), hf_config(num_nextn_predict_layers=1))
    reasons = dict(plan.ignored)
    assert "multi-token-prediction" in reasons["blk.3.ffn_gate.0.weight"]
    assert set(reasons) == {name for name in GGUFModel.open(str(path)).tensors if name.startswith("blk.3.")}


@pytest.mark.parametrize(
    ("blocks", "nextn", "config", "fits"),
    [(4, 1, 0, True), (4, 1, None, True), (4, 1, 1, True), (4, None, 1, True), (3, None, 1, True), (3, 0, 0, True),
     (4, None, 0, False), (4, 0, None, False), (5, 1, 1, False), (4, 2, 0, False)],
)  # fmt: skip
def test_layers_in_config_and_file(
    blocks: int, nextn: int | None, config: int | None, fits: bool, raws: Raws, tmp_path: Path
) -> None:
    """The file may count its multi-token-prediction layer, and config.json may, each for itself."""
    metadata = METADATA | {"deepseek2.block_count": blocks}
    metadata |= {} if nextn is None else {"deepseek2.nextn_predict_layer_count": nextn}
    weights = layouts.with_mtp_layer(raws) if blocks > 3 else raws
    path = layouts.write(tmp_path / "m.gguf", weights, metadata)
    if fits:
        contents(path, num_nextn_predict_layers=config)
    else:
        with pytest.raises(GGUFError, match=rf"block_count = {blocks} and config.json has 3"):
            contents(path, num_nextn_predict_layers=config)


def refusal(path: Path, raws: Raws, **config: Any) -> str:
    with pytest.raises(GGUFError) as caught:
        contents(layouts.write(path / "m.gguf", raws, METADATA), **config)
    text = str(caught.value)
    assert "\n" not in text and ": " in text and len(text) < 600
    return text


@pytest.mark.parametrize(("kind", "expert"), [*itertools.product(("gate", "up", "down"), (0, 3))])
def test_an_expert_is_missing(kind: str, expert: int, raws: Raws, tmp_path: Path) -> None:
    each = layouts.expert_each(raws)
    del each[f"blk.2.ffn_{kind}.{expert}.weight"]
    assert f"has no tensor 'blk.2.ffn_{kind}.{expert}.weight', and layer 2 has routed experts" in refusal(
        tmp_path, each
    )


def test_experts_that_cannot_be(raws: Raws, tmp_path: Path) -> None:
    each = layouts.expert_each(raws)
    name = "blk.1.ffn_gate.2.weight"
    text = refusal(tmp_path, each | {"blk.1.ffn_gate.4.weight": each[name]})
    assert "has the tensor 'blk.1.ffn_gate.4.weight', and config.json has only 4 experts" in text
    text = refusal(tmp_path, each | {name: Raw.f32(each[name].values())})
    assert f"'blk.1.ffn_gate.0.weight' and '{name}' have types Q8_0 and F32, and the executor needs one type" in text
    text = refusal(tmp_path, each | {name: Raw.f32(np.zeros((64, 32), np.float32))})
    assert f"'{name}' has shape [64, 32] and [32, 64] is expected from config.json's n_routed_experts" in text
    text = refusal(tmp_path, raws | {name: each[name]})
    assert f"has the experts of layer 1 twice, in 'blk.1.ffn_gate_exps.weight' and in '{name}'" in text
    text = refusal(tmp_path, raws | layouts.gate_up(raws))
    assert "layer 1 twice, in 'blk.1.ffn_gate_exps.weight' and in 'blk.1.ffn_gate_up_exps.weight'" in text
    text = refusal(tmp_path, {n: r for n, r in layouts.gate_up(raws).items() if n != "blk.1.ffn_gate_up_exps.weight"})
    assert "no tensor 'blk.1.ffn_gate_exps.weight', and layer 1 has routed experts" in text
    text = refusal(tmp_path, each | {"blk.0.ffn_up.0.weight": each[name]})
    assert "routed experts in 'blk.0.ffn_up.0.weight', a layer that has none" in text
    # Not how llama.cpp writes a number.
    text = refusal(tmp_path, each | {"blk.1.ffn_gate.02.weight": each[name]})
    assert "has the tensor 'blk.1.ffn_gate.02.weight', which no 'deepseek2' model known here has" in text


def test_kernels_are_asked_for_in_every_layout(raws: Raws, tmp_path: Path) -> None:
    path = layouts.write(tmp_path / "m.gguf", layouts.expert_each(raws), METADATA)
    with pytest.raises(GGUFError, match=r"'blk.1.ffn_down.0.weight' has type Q5_0, which the executor has no kernels"):
        CheckpointPlan.build(GGUFModel.open(str(path)), hf_config(), ["Q8_0"])


def test_the_executor_computes_the_same(raws: Raws, tmp_path: Path) -> None:
    """Bit for bit, from a stacked file and from one with a tensor an expert in shards."""
    from kt_vllm.executor import CPUExpertExecutor

    rng = np.random.default_rng()
    hidden_states = torch.from_numpy(rng.standard_normal((5, 64), dtype=np.float32))
    topk_ids = torch.from_numpy(rng.permuted(np.tile(np.arange(4, dtype=np.int32), (5, 1)), axis=1)[:, :2].copy())
    topk_weights = torch.from_numpy(rng.random((5, 2), dtype=np.float32))
    outputs = []
    for change, shards in ((layouts.stacked, 1), (layouts.expert_each, 3), (layouts.gate_up, 1)):
        path = layouts.write(tmp_path / "m.gguf", change(raws), METADATA, shards=shards)
        plan = CheckpointPlan.build(GGUFModel.open(str(path)), hf_config())
        executor = CPUExpertExecutor(isa=_native.choose_isa("auto")[0], cpus=[0], max_num_tokens=8)
        handles = [executor.add_layer(experts) for experts in plan.experts.values()]
        executor.native.start_loading()
        while not executor.native.load_progress()[2]:
            pass
        for handle in handles:
            outputs.append(torch.empty_like(hidden_states))
            handle.submit(hidden_states, topk_weights, topk_ids, outputs[-1])
            handle.wait()
        executor.close()
    assert outputs[0].abs().max() > 0 and not torch.equal(outputs[0], outputs[1])
    for first in (2, 4):
        assert torch.equal(outputs[0], outputs[first]) and torch.equal(outputs[1], outputs[first + 1])


def test_a_giant_with_a_tensor_an_expert(tmp_path: Path) -> None:
    """A DeepSeek-R1 of 45,000 tensors; its header alone."""
    shape = Shape(129280, 7168, 18432, 2048, 61, 3, 256, 8, 128, 1536, 512, 128, 64, 128)
    entries, offset = [], 0
    for name, dims in files.tensor_shapes(shape).items():
        stacked = "_exps" in name
        for expert in range(256 if stacked else 1):
            ne = dims[:0:-1] if stacked else dims[::-1]
            full = name.replace("_exps", f".{expert}") if stacked else name
            entries.append(files.entry(full, ne, 12 if stacked else 0, offset))
            offset += int(np.prod(ne)) // 256 * 144 if stacked else int(np.prod(ne)) * 4
    keys = [files.ARCHITECTURE]
    keys += [files.key(f"deepseek2.{k}", 4, struct.pack("<I", v)) for k, v in gguf_metadata(shape).items()]
    path = tmp_path / "m.gguf"
    path.write_bytes(files.raw(keys, entries))
    start = time.process_time()
    plan = CheckpointPlan.build(GGUFModel.open(str(path), require_data=False), hf_config(shape), ["Q4_K"])
    # An absolute bound, since it is one of patience.
    assert time.process_time() - start < 10
    assert {len(experts.up.spans) for experts in plan.experts.values()} == {256}
    assert plan.expert_bytes == 58 * 3 * 256 * 2048 * 7168 // 256 * 144


def test_the_shipped_model_in_old_clothes(tmp_path: Path) -> None:
    """The layouts of the file that llama.cpp itself made, K-quants and all."""
    config = json.loads((files.TINY / "config.json").read_text())
    model = GGUFModel.open(str(files.TINY))
    raws = layouts.read(model)
    old = layouts.bare_correction_bias(layouts.kv_b_fused(layouts.expert_each(raws)))
    path = layouts.write(tmp_path / "m.gguf", layouts.shuffled(old), model.metadata, version=2, shards=4)
    a, b = (CheckpointPlan.build(m, config) for m in (model, GGUFModel.open(str(path))))
    one, two = dict(iter_dense(a)), dict(iter_dense(b))
    assert one.keys() == two.keys()
    for name in one:
        assert torch.equal(one[name], two[name]), name
    for layer in a.experts:
        for kind in ("gate", "up", "down"):
            assert data_of(getattr(a.experts[layer], kind)) == data_of(getattr(b.experts[layer], kind))
