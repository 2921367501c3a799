"""The zoo's models through our reading of their GGUFs, bit for bit, and whether a wrong tensor would be seen at all."""

from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf.constants import GGMLQuantizationType
from torch import nn
from transformers import AutoConfig

from kt_vllm.checkpoint import CheckpointPlan, ExpertSource, iter_dense
from kt_vllm.gguf import GGUFModel
from kt_vllm.placement import list_modules, router_name
from tests.tolerances import MAX_MEAN_KL
from tests.zoo.layout import tensors
from tests.zoo.make import EXPECTED, GGUF_NAME, MIXES, TOKENS, draw, log_probabilities, make
from tests.zoo.models import MODELS, VOCABULARY, Config


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """The models are small: threads would wait for one another, and long where other work runs beside."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def config_of(folder: Path) -> Config:
    """config.json as vLLM's model sees it."""
    from kt_vllm.hf_config import config_fields

    return config_fields(AutoConfig.for_model(**MODELS[folder.name].config | {"model_type": _model_type(folder.name)}))


def _model_type(name: str) -> str:
    """vLLM reads Kimi-K2's config.json as DeepSeek-V3's."""
    return "deepseek_v3" if name == "kimi-k2" else MODELS[name].config["model_type"]


def published(model: nn.Module) -> dict[str, torch.Tensor]:
    """The model's parameters under the names of its checkpoints, which vLLM takes, without the experts."""
    mixtral = model.config.model_type == "mixtral"
    values = {n: v for n, v in model.state_dict().items() if ".experts." not in n}
    return {n.replace(".mlp.", ".block_sparse_moe.") if mixtral else n: v for n, v in values.items()}


def decoded(source: ExpertSource) -> np.ndarray:
    data = b"".join(Path(path).read_bytes()[offset : offset + nbytes] for path, offset, nbytes in source.spans)
    rows = np.frombuffer(data, np.uint8).reshape(source.shape[0] * source.shape[1], -1)
    return gguf.quants.dequantize(rows, GGMLQuantizationType[source.type]).reshape(source.shape)


@pytest.mark.parametrize("name", MODELS)
def test_every_weight_is_the_models(tmp_path: Path, name: str) -> None:
    model = make(tmp_path / name, name, "Q4_K_M", seed=11)
    plan = CheckpointPlan.build(GGUFModel.open(str(tmp_path / name / GGUF_NAME)), config_of(tmp_path / name))
    routers = [m for m in list_modules(plan) if m.name.endswith(router_name(plan.family))]
    assert len(routers) == len(plan.experts) and all(router.matrix is None for router in routers)
    expected = published(model)
    got = dict(iter_dense(plan))
    assert got.keys() == expected.keys()
    for parameter, values in got.items():
        assert torch.equal(values, expected[parameter]), parameter
    layers = {int(n.split(".")[2]) for n in model.state_dict() if ".experts." in n}
    assert plan.experts.keys() == layers
    for i, layer in plan.experts.items():
        experts = model.model.layers[i].mlp.experts
        gate_up = np.concatenate([decoded(layer.gate), decoded(layer.up)], axis=1)
        assert np.array_equal(gate_up, experts.gate_up_proj.detach().numpy())
        assert np.array_equal(decoded(layer.down), experts.down_proj.detach().numpy())
    assert all("multi-token-prediction" in reason for _, reason in plan.ignored)
    assert bool(plan.ignored) == bool(MODELS[name].mtp_layers)
    exact = np.load(tmp_path / name / EXPECTED)
    assert -(np.exp(exact) * exact).sum(-1).mean() < 0.92 * np.log(VOCABULARY), "probabilities that any model has"


@pytest.mark.slow
@pytest.mark.full
@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_a_tensor_with_its_rows_turned_would_be_seen(tmp_path: Path, name: str) -> None:
    """Each kind of tensor, in all layers, moved by one row (or element): the end-to-end test must fail by it."""
    spec = MODELS[name]
    model = make(tmp_path, name, "Q4_K_M", seed=12)
    tokens = np.load(tmp_path / TOKENS)[::2]
    exact = log_probabilities(model, tokens)
    views = defaultdict(list)
    for tensor, view in tensors(model, spec.architecture, spec.config):
        views[tensor.split(".", 2)[-1] if tensor.startswith("blk.") else tensor].append(view)
    for kind, of_layers in views.items():
        before = [view.clone() for view in of_layers]
        for view in of_layers:
            view.copy_(view.roll(1, 0 if view.shape[0] > 1 else 1))
        kl = (np.exp(exact) * (exact - log_probabilities(model, tokens))).sum(-1).mean()
        assert kl > MAX_MEAN_KL, (kind, kl)
        for view, values in zip(of_layers, before, strict=True):
            view.copy_(values)
    assert np.array_equal(log_probabilities(model, tokens), exact), "the weights are not as they were"


@pytest.mark.parametrize("type", sorted({type for mix in MIXES.values() for type in mix.values()}))
def test_drawn_weights_have_their_size(type: str) -> None:
    data = draw(type, 1 << 16, np.random.default_rng(14), 0.5)
    values = gguf.quants.dequantize(data.reshape(256, -1), GGMLQuantizationType[type])
    assert values.std() == pytest.approx(0.5, rel=0.15)
    assert abs(values.mean()) < 0.05
