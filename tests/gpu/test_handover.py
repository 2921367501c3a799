"""The hand-over on a CUDA device, eager and in graphs: bit for bit what the executor computes for the host.

Two executors with the same weights: the coordinator has one, the other computes what is expected.
"""

import dataclasses
import os
import random
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING

import pytest

from kt_vllm import _native
from kt_vllm.checkpoint import ExpertSource, LayerExperts
from tests.moe_case import MoECase, load

if TYPE_CHECKING:
    from kt_vllm.executor import CPUExpertExecutor
    from kt_vllm.handover.device_layer import Handover

torch = pytest.importorskip("torch")

pytestmark = pytest.mark.gpu

ROOT = Path(__file__).resolve().parents[2]
DEVICE = "cuda"
NUM_EXPERTS = 8
TOP_KS = (8, 4)
CHAIN = (0, 1, 0)  # layers of a pass; each takes the output of the one before
MAX_TOKENS = 600
SIZES = {7168: (("Q4_K", "Q4_K", "Q6_K"), 256), 96: (("Q8_0", "Q8_0", "Q8_0"), 64)}  # hidden: types, intermediate


@dataclasses.dataclass(frozen=True)
class Setting:
    way: str
    hidden_size: int
    dtype: torch.dtype
    slot: int  # tokens; longer calls go in pieces

    def __str__(self) -> str:
        return f"{self.way}-{self.hidden_size}-{str(self.dtype).removeprefix('torch.')}-slot{self.slot}"


SETTINGS = [
    Setting(way, hidden_size, dtype, slot)
    for way in ("flags", "hostfunc")
    for hidden_size, dtype, slot in (
        (7168, torch.bfloat16, MAX_TOKENS),
        (7168, torch.float16, MAX_TOKENS),
        (7168, torch.bfloat16, 64),
        (96, torch.bfloat16, MAX_TOKENS),
        (96, torch.float16, 64),
    )
]


@dataclasses.dataclass
class Inputs:
    hidden_states: torch.Tensor
    topk_weights: list[torch.Tensor]  # of each layer of CHAIN
    topk_ids: list[torch.Tensor]
    padding: torch.Tensor | None

    @classmethod
    def random(cls, setting: Setting, num_tokens: int, *, with_padding: bool = True) -> "Inputs":
        def ids(top_k: int) -> torch.Tensor:
            return torch.randint(-1, NUM_EXPERTS, (num_tokens, top_k), dtype=torch.int32)

        padding = torch.rand(num_tokens) < random.choice((0.0, 0.3, 0.3, 1.0)) if with_padding else None
        return cls(
            torch.randn(num_tokens, setting.hidden_size).to(setting.dtype),
            [torch.rand(num_tokens, TOP_KS[layer]) for layer in CHAIN],
            [ids(TOP_KS[layer]) for layer in CHAIN],
            padding,
        )

    def tensors(self) -> list[torch.Tensor]:
        padding = [] if self.padding is None else [self.padding]
        return [self.hidden_states, *self.topk_weights, *self.topk_ids, *padding]

    def to_device(self) -> "Inputs":
        return Inputs(
            self.hidden_states.to(DEVICE, copy=True),
            [tensor.to(DEVICE, copy=True) for tensor in self.topk_weights],
            [tensor.to(DEVICE, copy=True) for tensor in self.topk_ids],
            None if self.padding is None else self.padding.to(DEVICE, copy=True),
        )

    def copy_(self, other: "Inputs") -> None:
        for own, new in zip(self.tensors(), other.tensors(), strict=True):
            own.copy_(new)


def capture(run: Callable[[], list[torch.Tensor]]) -> tuple["torch.cuda.CUDAGraph", list[torch.Tensor]]:
    """A graph of run(), and the tensors that its replays fill."""
    run()  # what is made at the first use must not be made while capturing
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = run()
    return graph, results


def make_executor(cases: list[MoECase], cpus: list[int], spin_ns: int) -> SimpleNamespace:
    from kt_vllm.executor import CPUExpertExecutor

    executor = CPUExpertExecutor(isa="auto", cpus=cpus, max_num_tokens=MAX_TOKENS, spin_ns=spin_ns)
    handles = []
    for case in cases:
        sources = zip(case.types, case.shapes, map(tuple, case.spans), strict=True)
        handles.append(executor.add_layer(LayerExperts(*(ExpertSource(*source) for source in sources))))
    load(executor.native)
    return SimpleNamespace(executor=executor, handles=handles)


def make_handover(executor: "CPUExpertExecutor | None", cpus: list[int], setting: Setting, way: str) -> "Handover":
    """Layers are numbered the other way round than in the executor."""
    from kt_vllm.handover import device_layer

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(device_layer, "MAX_PIECE_TOKENS", setting.slot)
        return device_layer.Handover(
            executor,
            list(reversed(list(enumerate(TOP_KS)))),
            hidden_size=setting.hidden_size,
            max_num_tokens=MAX_TOKENS,
            dtype=setting.dtype,
            device=torch.device(DEVICE),
            worker_cpus=cpus,
            way=way,
            watchdog_seconds=60,
        )


class Rig:
    def __init__(self, cases: list[MoECase], setting: Setting) -> None:
        cpus = sorted(os.sched_getaffinity(0))
        cpus = cpus[: max(1, 3 * len(cpus) // 4)]
        self.setting = setting
        self.host = make_executor(cases, cpus, _native.SPIN_NS)
        self.behind = make_executor(cases, cpus, _native.STEP_SPIN_NS)
        self.handover = make_handover(self.behind.executor, cpus, setting, setting.way)
        self.handles = [self.handover.layer_handle(len(TOP_KS) - 1 - layer, TOP_KS[layer]) for layer in CHAIN]
        self.other = torch.zeros(64, 64, device=DEVICE)

    def inputs(self, num_tokens: int, *, with_padding: bool = True) -> Inputs:
        return Inputs.random(self.setting, num_tokens, with_padding=with_padding)

    def expected(self, inputs: Inputs) -> list[torch.Tensor]:
        """Piece by piece, as tokens of a call decide together on the kernels."""
        outputs, x = [], inputs.hidden_states
        for layer, weights, ids in zip(CHAIN, inputs.topk_weights, inputs.topk_ids, strict=True):
            if inputs.padding is not None:
                ids = ids.masked_fill(inputs.padding[:, None], -1)
            output = torch.empty_like(x)
            for begin in range(0, len(x), self.setting.slot):
                piece = slice(begin, begin + self.setting.slot)
                self.host.handles[layer].submit(x[piece], weights[piece], ids[piece], output[piece])
                self.host.handles[layer].wait()
            outputs.append(output)
            x = output
        return outputs

    def run(self, inputs: Inputs) -> list[torch.Tensor]:
        """inputs: on the device. Queues a pass; the outputs of its layers."""
        outputs, x = [], inputs.hidden_states
        for handle, weights, ids in zip(self.handles, inputs.topk_weights, inputs.topk_ids, strict=True):
            output = torch.full_like(x, float("nan"))
            handle.submit(x, weights, ids, output, inputs.padding)
            self.other.add_(1.0)  # what the device does meanwhile
            handle.wait()
            outputs.append(output)
            x = output
        return outputs

    def check(self, outputs: list[torch.Tensor], inputs: Inputs, what: str) -> None:
        for i, (seen, expected) in enumerate(zip(outputs, self.expected(inputs), strict=True)):
            seen = seen.cpu()
            rows = (seen != expected).any(dim=1).nonzero().flatten().tolist()
            assert not rows, (
                f"{what}, {len(seen)} tokens: layer {i} of the pass differs in rows {rows[:8]} ({len(rows)} in all); "
                f"first: {seen[rows[0]][:4].tolist()}, expected {expected[rows[0]][:4].tolist()}"
            )

    def close(self) -> None:
        torch.cuda.synchronize()
        self.handover.coordinator.close()
        self.behind.executor.close()
        self.host.executor.close()


@pytest.fixture(scope="session")
def cases(tmp_path_factory):
    path = tmp_path_factory.mktemp("experts")
    made: dict[int, list[MoECase]] = {}
    for hidden_size, (types, intermediate_size) in SIZES.items():
        made[hidden_size] = [
            MoECase(path / f"{hidden_size}-{i}", types, NUM_EXPERTS, hidden_size, intermediate_size, seed=i)
            for i in range(len(TOP_KS))
        ]
        for case in made[hidden_size]:
            case.weights.clear()  # of no use here, and large
    return made


@pytest.fixture(scope="module", params=SETTINGS, ids=str)
def rig(request, cases):
    rig = Rig(cases[request.param.hidden_size], request.param)
    yield rig
    rig.close()


def test_the_way_is_the_one_asked_for(rig):
    assert rig.handover.way.name == rig.setting.way
    assert len(rig.handover.slots) == (1 if rig.setting.slot == MAX_TOKENS else 2)
    assert all(tensor.is_pinned() for slot in rig.handover.slots for tensor in (slot.hidden_states, slot.request))


@pytest.mark.parametrize("with_padding", [True, False])
def test_eager(rig, with_padding):
    for num_tokens in (1, 2, 3, 8, 17, 63, 64, 65, 128, 129, 200, 512, 600):
        inputs = rig.inputs(num_tokens, with_padding=with_padding)
        rig.check(rig.run(inputs.to_device()), inputs, "eager")


@pytest.mark.parametrize(
    ("num_tokens", "replays"), [(1, 300), (2, 100), (3, 100), (8, 60), (17, 40), (64, 20), (512, 5)]
)
def test_graphs(rig, num_tokens, replays):
    """Replays queued behind one another, each with inputs and padding of its own."""
    static = rig.inputs(num_tokens).to_device()
    graph, outputs = capture(lambda: rig.run(static))
    while replays > 0:
        batch = [rig.inputs(num_tokens) for _ in range(min(replays, 20))]
        queued = [inputs.to_device() for inputs in batch]
        torch.cuda.synchronize()
        results = []
        for inputs in queued:
            static.copy_(inputs)
            graph.replay()
            results.append([output.clone() for output in outputs])
        for inputs, result in zip(batch, results, strict=True):
            rig.check(result, inputs, "graph")
        replays -= len(batch)


def test_a_graph_without_padding(rig):
    static = rig.inputs(8, with_padding=False).to_device()
    graph, outputs = capture(lambda: rig.run(static))
    for _ in range(20):
        inputs = rig.inputs(8, with_padding=False)
        static.copy_(inputs.to_device())
        graph.replay()
        rig.check(outputs, inputs, "graph without padding")


def test_graphs_and_eager_calls_share_the_slots(rig):
    statics = [rig.inputs(num_tokens).to_device() for num_tokens in (3, 17, 64)]
    graphs = [capture(lambda static=static: rig.run(static)) for static in statics]
    for _ in range(10):
        queued = []
        for which in random.choices(range(4), k=6):
            if which == 3:
                inputs = rig.inputs(random.choice((1, 5, 33, 150)))
                queued.append((inputs, rig.run(inputs.to_device())))
                continue
            inputs = rig.inputs(len(statics[which].hidden_states))
            statics[which].copy_(inputs.to_device())
            graphs[which][0].replay()
            queued.append((inputs, [output.clone() for output in graphs[which][1]]))
        for inputs, result in queued:
            rig.check(result, inputs, "mixed")


def test_after_pauses(rig):
    """The coordinator spins, takes short naps, takes long ones; the workers sleep."""
    static = rig.inputs(2).to_device()
    graph, outputs = capture(lambda: rig.run(static))
    for pause in (0, 0.003, 0.02, 0.15, 0.001, 0.3):
        time.sleep(pause)
        inputs = rig.inputs(2)
        static.copy_(inputs.to_device())
        graph.replay()
        rig.check(outputs, inputs, f"after {pause} s")


def test_after_the_memory_of_the_device_was_discarded(rig):
    torch.cuda.synchronize()
    for slot in rig.handover.slots:
        slot.sent.fill_(-77)
        slot.arrived.fill_(5)
    rig.handover.restore()
    inputs = rig.inputs(70)
    rig.check(rig.run(inputs.to_device()), inputs, "restored")


def test_capturing_is_told(rig):
    assert not rig.handles[0].is_capturing()
    seen = []

    def run() -> list[torch.Tensor]:
        seen.append(rig.handles[0].is_capturing())
        return [rig.other.add_(1.0)]

    capture(run)
    assert seen == [False, True]


def test_flags_are_chosen_where_they_work():
    handover = make_handover(None, [], SETTINGS[0], "auto")
    assert handover.way.name == "flags"
    inputs = Inputs.random(SETTINGS[0], 5).to_device()
    handle = handover.layer_handle(1, TOP_KS[0])
    output = torch.full_like(inputs.hidden_states, float("nan"))
    handle.submit(inputs.hidden_states, inputs.topk_weights[0], inputs.topk_ids[0], output, inputs.padding)
    handle.wait()
    assert not output.any(), "no executor: zeros"
    handover.coordinator.close()


@pytest.mark.parametrize("way", ["flags", "hostfunc"])
def test_a_lost_reply_ends_the_process(way):
    """While a replay waits for it: an exception within the time of the watchdog and 2 s, one sentence on stderr, and
    status 1 once Python and the driver have put everything away.
    """
    watchdog = 1.0
    code = f"""
        import time, torch
        from kt_vllm.handover.device_layer import Handover
        handover = Handover(None, [(0, 8)], hidden_size=7168, max_num_tokens=16, dtype=torch.bfloat16,
                            device=torch.device("cuda"), worker_cpus=[], way="{way}", watchdog_seconds={watchdog})
        handle = handover.layer_handle(0, 8)
        x = torch.randn(2, 7168, device="cuda").bfloat16()
        weights, ids = torch.rand(2, 8, device="cuda"), torch.zeros(2, 8, dtype=torch.int32, device="cuda")
        output = torch.empty_like(x)
        def run():
            for _ in range(3):
                handle.submit(x, weights, ids, output)
                handle.wait()
        run()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run()
        graph.replay()
        torch.cuda.synchronize()
        handover.coordinator.stop_answering()
        print("asked", time.monotonic(), flush=True)
        try:
            graph.replay()
            torch.cuda.synchronize()
            time.sleep(60)
        finally:
            print("told", time.monotonic(), flush=True)
    """
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )
    try:
        stdout, stderr = process.communicate(timeout=180)
        ended = time.monotonic()
    finally:
        process.kill()
    times = {
        line.split()[0]: float(line.split()[1]) for line in stdout.splitlines() if line.startswith(("asked ", "told "))
    }
    assert process.returncode == 1 and set(times) == {"asked", "told"}, f"status {process.returncode}: {stdout}{stderr}"
    assert stderr.count("kt_vllm: error: the executor did not answer MoE layer 0 (2 tokens) within 1 s") == 1, stderr
    assert "HandoverError: the executor did not answer" in stderr
    assert watchdog < times["told"] - times["asked"] < watchdog + 2, (
        f"told after {times['told'] - times['asked']:.2f} s"
    )
    assert ended - times["told"] < 9, f"ended {ended - times['told']:.2f} s after, as if by the coordinator's own hand"
