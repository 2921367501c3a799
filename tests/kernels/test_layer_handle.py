"""The executor as the layer sees it: torch tensors, checked before only their addresses are left."""

import pytest

from kt_vllm.checkpoint import ExpertSource, LayerExperts
from tests.compare import assert_close_to_reference
from tests.moe_case import MoECase, load, worker_cpus

torch = pytest.importorskip("torch")


@pytest.fixture
def case(tmp_path):
    return MoECase(tmp_path / "experts", hidden_size=32, intermediate_size=64)


@pytest.fixture
def handle(case):
    from kt_vllm.executor import CPUExpertExecutor

    executor = CPUExpertExecutor(isa="reference", cpus=worker_cpus(2), max_num_tokens=16)
    sources = zip(case.types, case.shapes, map(tuple, case.spans), strict=True)
    handle = executor.add_layer(LayerExperts(*(ExpertSource(*source) for source in sources)))
    load(executor.native)
    yield handle
    executor.close()


def arguments(case):
    x, ids, weights = map(torch.from_numpy, case.inputs(5))
    return {"hidden_states": x, "topk_weights": weights, "topk_ids": ids, "output": torch.empty_like(x)}


def test_a_call(case, handle):
    given = arguments(case)
    handle.submit(**given)
    handle.wait()
    expected = case.expected(*(given[name].numpy() for name in ("hidden_states", "topk_ids", "topk_weights")))
    assert_close_to_reference(given["output"].numpy(), expected, tolerance=1e-5, isa="reference", type="F32")


def test_experts_that_do_not_exist_are_told_once(case, handle, caplog):
    given = arguments(case)
    for bad_id, num_told in ((-1, 0), (99, 1), (99, 1)):
        given["topk_ids"][2, 0] = bad_id
        handle.submit(**given)
        handle.wait()
        assert len(caplog.messages) == num_told
    assert "the router named experts that do not exist (first seen in layer 0 of this process)" in caplog.messages[0]


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("hidden_states", lambda t: t.double()),
        ("hidden_states", lambda t: t[:, :16].contiguous()),
        ("hidden_states", lambda t: t[:4]),
        ("hidden_states", lambda t: t.T.contiguous().T),
        ("topk_weights", lambda t: t.half()),
        ("topk_weights", lambda t: t[:, :1].contiguous()),
        ("topk_ids", lambda t: t.long()),
        ("topk_ids", lambda t: t[::2]),
        ("output", lambda t: t.bfloat16()),
        ("output", lambda t: t[:4]),
        ("output", lambda t: t.T.contiguous().T),
        ("output", lambda t: t.to("meta")),
    ],
)
def test_what_does_not_fit_is_refused(case, handle, name, change):
    given = arguments(case)
    with pytest.raises(ValueError, match=r"layer 0: .* expected contiguous host tensors"):
        handle.submit(**given | {name: change(given[name])})
    handle.submit(**given)  # nothing is in flight
    handle.wait()
