"""The hand-over with a CPU in the device's place: real slots, a real coordinator, Triton's interpreter."""

import logging
import subprocess
import sys
import textwrap
import threading
import time
from types import SimpleNamespace

import pytest

from kt_vllm import _native
from kt_vllm.checkpoint import ExpertSource, LayerExperts
from kt_vllm.errors import ConfigError, ResourceError
from tests.moe_case import MoECase, load, worker_cpus

torch = pytest.importorskip("torch")
pytest.importorskip("triton", reason="Triton is not installed")
from tests import handover_device  # noqa: E402

SLOT = 8  # tokens
HIDDEN = 96
TOP_KS = (2, 5)
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def handover():
    with handover_device.modules() as modules:
        yield modules


@pytest.fixture(scope="module")
def cases(tmp_path_factory):
    path = tmp_path_factory.mktemp("experts")
    return [MoECase(path / str(i), hidden_size=HIDDEN, intermediate_size=64, seed=i) for i in range(len(TOP_KS))]


@pytest.fixture
def handles(cases):
    from kt_vllm.executor import CPUExpertExecutor

    executor = CPUExpertExecutor(isa="reference", cpus=worker_cpus(2), max_num_tokens=64)
    handles = []
    for case in cases:
        sources = zip(case.types, case.shapes, map(tuple, case.spans), strict=True)
        handles.append(executor.add_layer(LayerExperts(*(ExpertSource(*source) for source in sources))))
    load(executor.native)
    yield SimpleNamespace(executor=executor, layers=handles)
    executor.close()


def make_handover(handover, executor, *, max_num_tokens=100, dtype=torch.float32, way="auto"):
    """The layers are numbered the other way round than the executor does it."""
    return handover.device_layer.Handover(
        executor,
        list(reversed(list(enumerate(TOP_KS)))),
        hidden_size=HIDDEN,
        max_num_tokens=max_num_tokens,
        dtype=dtype,
        device=CPU,
        worker_cpus=worker_cpus(1),
        way=way,
        watchdog_seconds=60,
    )


def random_call(layer: int, num_tokens: int, dtype: torch.dtype, *, with_padding: bool):
    ids = torch.randint(-1, 6, (num_tokens, TOP_KS[layer]), dtype=torch.int32)
    return {
        "hidden_states": torch.randn(num_tokens, HIDDEN).to(dtype),
        "topk_weights": torch.rand(num_tokens, TOP_KS[layer]),
        "topk_ids": ids,
        "output": torch.full((num_tokens, HIDDEN), float("nan"), dtype=dtype),
        "padding": torch.rand(num_tokens) < 0.3 if with_padding else None,
    }


def expected(handle, call):
    """As the executor computes it for the host."""
    call = {name: None if x is None else x.clone() for name, x in call.items()}
    if call["padding"] is not None:
        call["topk_ids"][call["padding"]] = -1
    handle.submit(**call)
    handle.wait()
    return call["output"]


@pytest.fixture
def small_slots(handover, monkeypatch):
    monkeypatch.setattr(handover.device_layer, "MAX_PIECE_TOKENS", SLOT)
    # Rows of up to 5 tokens go by kernel, more by copies: pieces of either kind.
    monkeypatch.setattr(handover.ways, "_MAX_KERNEL_BYTES", 5 * HIDDEN * 4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("way", ["copy", "flags", "hostfunc"])
def test_results_are_those_of_the_host(handover, handles, small_slots, monkeypatch, way, dtype):
    """Around the sizes of a slot, of several pieces, and of what goes by kernel: bit for bit."""
    if way == "copy":
        monkeypatch.setattr(handover.device_layer, "Flags", lambda: handover_device.CopyWay(handover))
    sizes = [0, 1, 2, 3, 5, 6, 7, 8, 9, 15, 16, 17, 24, 25, 33, 50]
    calls = [
        (layer, random_call(layer, num_tokens, dtype, with_padding=with_padding))
        for num_tokens in sizes
        for layer, with_padding in ((0, False), (1, True))
    ]
    wanted = [expected(handles.layers[layer], call) for layer, call in calls]
    of_device = make_handover(handover, handles.executor, dtype=dtype, way="auto" if way == "copy" else way)
    assert of_device.way.name == way and of_device.max_tokens == SLOT and len(of_device.slots) == 2
    for (layer, call), output in zip(calls, wanted, strict=True):
        given = {name: None if x is None else x.clone() for name, x in call.items()}
        handle = of_device.layer_handle(len(TOP_KS) - 1 - layer, TOP_KS[layer])
        handle.submit(**given)
        handle.wait()
        assert torch.equal(given["output"], output), f"layer {layer}, {len(output)} tokens"
        for name in ("hidden_states", "topk_weights", "topk_ids"):
            assert torch.equal(given[name], call[name]), f"{name} was changed"
    of_device.coordinator.close()
    stats = of_device.coordinator.stats
    assert stats["num_tokens"] == 2 * sum(sizes) and stats["num_calls"] == 2 * sum(-(-n // SLOT) for n in sizes)


def test_pieces_overlap(handover, small_slots, monkeypatch):
    """Both slots are filled before the first result is waited for; a slot is refilled as soon as it was emptied."""
    way = handover_device.CopyWay(handover)
    monkeypatch.setattr(handover.device_layer, "Flags", lambda: way)
    of_device = make_handover(handover, None)
    a, b = of_device.slots
    handle = of_device.layer_handle(1, TOP_KS[0])
    way.calls.clear()
    call = random_call(0, 4 * SLOT + 3, torch.float32, with_padding=True)
    call["hidden_states"] = call["hidden_states"].T.contiguous().T  # strided
    handle.submit(**call)
    assert way.calls == [("send", a, SLOT), ("send", b, SLOT)]
    handle.wait()
    turns = [(a, "receive"), (a, "send"), (b, "receive"), (b, "send"), (a, "receive"), (a, "send")]
    assert [(slot, what) for what, slot, _ in way.calls[2:]] == [*turns, (b, "receive"), (a, "receive")]
    assert way.calls[-1][2] == way.calls[-3][2] == 3
    assert torch.equal(call["output"], torch.zeros_like(call["output"])), "no executor, no experts"


def test_experts_that_do_not_exist_are_told_once_and_before_a_step(handover, handles, caplog):
    """Not before: the coordinator's thread waits for nothing of Python."""
    without_executor = make_handover(handover, None, max_num_tokens=SLOT)
    of_device = make_handover(handover, handles.executor, max_num_tokens=SLOT)

    def told_after(layer: int, id: int) -> list[str]:
        call = random_call(layer, 3, torch.float32, with_padding=False)
        call["topk_ids"][1, 1] = id
        handle = of_device.layer_handle(len(TOP_KS) - 1 - layer, TOP_KS[layer])
        handle.submit(**call)
        handle.wait()
        logged = len(caplog.records)
        handover.device_layer.begin_step()
        assert not any("do not exist" in record.message for record in caplog.records[:logged])
        return [record.message for record in caplog.records[logged:]]

    assert told_after(0, -1) == told_after(1, -1) == []
    (sentence,) = told_after(1, 6)
    assert "the router named experts that do not exist (first seen in layer 1 of this process)" in sentence
    caplog.clear()
    assert told_after(0, -7) == told_after(1, 6) == []
    for each in (of_device, without_executor):
        each.coordinator.close()


@pytest.mark.parametrize("max_num_tokens", [1, SLOT, SLOT + 1])
def test_pinned_bytes_are_what_slots_take(handover, small_slots, max_num_tokens):
    of_device = make_handover(handover, None, max_num_tokens=max_num_tokens)
    tensors = [(s.hidden_states, s.output, s.topk_ids, s.topk_weights) for s in of_device.slots]
    taken = sum(tensor.nbytes for slot in tensors for tensor in slot)
    assert taken == handover.device_layer.pinned_bytes(max_num_tokens, HIDDEN, max(TOP_KS), 4)


def test_what_cannot_be_asked(handover, small_slots):
    of_device = make_handover(handover, None, max_num_tokens=SLOT)
    assert len(of_device.slots) == 1
    handle = of_device.layer_handle(0, TOP_KS[1])
    with pytest.raises(AssertionError, match=f"{SLOT + 1} tokens and a slot of {SLOT}"):
        handle.submit(**random_call(1, SLOT + 1, torch.float32, with_padding=False))
    with pytest.raises(AssertionError, match="2 experts a token in a layer of 5"):
        handle.submit(**random_call(0, 1, torch.float32, with_padding=False))


def test_the_slot_is_as_the_coordinator_reads_it(handover):
    slot = handover.staging.Slot.allocate(SLOT, HIDDEN, 5, torch.bfloat16, CPU)
    request, hidden_states, ids, weights, output = slot.addresses()
    assert request % 64 == 0 and slot.reply.data_ptr() == request + 64
    assert (slot.request.dtype, slot.reply.dtype) == (torch.int64, torch.int32)
    assert (hidden_states, output) == (slot.hidden_states.data_ptr(), slot.output.data_ptr())
    assert (ids, weights) == (slot.topk_ids.data_ptr(), slot.topk_weights.data_ptr())
    assert slot.topk_ids.numel() == slot.topk_weights.numel() == SLOT * 5
    assert handover.staging.message(3, 17) == 3 << 16 | 17
    assert 0 < handover.staging.message(_native.ECHO_LAYER, 0xFFFF) < 1 << 31  # kernels take it as int32
    slot.request.fill_(5 << 32 | handover.staging.message(3, 17))
    assert slot.last_request() == 5
    slot.request.fill_(-2 << 32 | handover.staging.message(3, 17))
    slot.reply.fill_(-2)  # as uint32: 2^32 - 2
    assert slot.last_request() == -2 == slot.reply.item()
    slot.arrived.fill_(3)
    slot.restore_device_words()
    assert (slot.sent.item(), slot.arrived.item()) == (-2, 0)


def test_padding_is_staged_as_no_expert(handover):
    slot = handover.staging.Slot.allocate(4, HIDDEN, 3, torch.float32, CPU)
    slot.topk_ids.fill_(77)
    ids = torch.arange(9, dtype=torch.int32).view(3, 3)
    rows, weights = torch.randn(3, HIDDEN), torch.rand(3, 3)
    handover.ways._copy_to(slot, rows, weights, ids, torch.tensor([False, True, False]))
    assert slot.topk_ids.tolist() == [0, 1, 2, -1, -1, -1, 6, 7, 8, 77, 77, 77]
    assert torch.equal(slot.hidden_states[:3], rows) and torch.equal(slot.topk_weights[:9], weights.flatten())
    assert ids.tolist() == [[0, 1, 2], [3, 4, 5], [6, 7, 8]]
    handover.ways._copy_to(slot, rows, weights, ids, None)
    assert slot.topk_ids[:9].tolist() == list(range(9))


def test_sequence_numbers_of_the_kernels_wrap(handover):
    """The device counts in int32: past the largest, and past -1."""
    of_device = make_handover(handover, None, max_num_tokens=SLOT, way="flags")
    of_device.coordinator.close()
    slot = of_device.slots[0]
    for start in (2**31 - 2, -2):
        slot.request.fill_(start << 32)
        slot.reply.fill_(start)
        slot.restore_device_words()
        coordinator = _native.Coordinator(
            executor=None, slots=[slot.addresses()], layers=[(0, 2)], float_type="float32", hidden_size=HIDDEN,
            max_tokens=SLOT, worker_cpus=[], watchdog_seconds=60,
        )  # fmt: skip
        for _ in range(5):
            rows, output = torch.randn(2, HIDDEN), torch.empty(2, HIDDEN)
            ids, weights = torch.zeros(2, 2, dtype=torch.int32), torch.zeros(2, 2)
            of_device.way.send(slot, _native.ECHO_LAYER, rows, weights, ids, None)
            of_device.way.receive(slot, output)
            assert torch.equal(output, rows)
        coordinator.close()


class PendingEvent(handover_device.Event):
    """Of a device that may wait for the reply to a request it lost, or for what it never sees."""

    waits_for = None  # (slot, sequence number)

    def query(self) -> bool:
        if PendingEvent.waits_for is not None:
            slot, sequence = PendingEvent.waits_for
            if slot.reply.item() == sequence:
                PendingEvent.waits_for = None
        return PendingEvent.waits_for is None


class Broken(handover_device.CopyWay):
    """A way that does not work, in some way."""

    name = "flags"

    def __init__(self, handover, how: str) -> None:
        super().__init__(handover)
        self.how = how

    def send(self, slot, *args) -> None:
        if self.how == "raises":
            raise RuntimeError("no such instruction")
        if self.how == "does not compile":
            raise subprocess.CalledProcessError(1, ["gcc"])
        self.slot = slot
        if self.how in ("loses requests", "sees nothing"):
            slot.sent.add_(1)
            PendingEvent.waits_for = (slot, slot.sent.item() if self.how == "loses requests" else None)
            return
        super().send(slot, *args)
        slot.sent.fill_(slot.last_request())
        if self.how == "changes ids":
            slot.topk_ids[0] += 1

    def receive(self, slot, output) -> None:
        if self.how in ("loses requests", "sees nothing"):
            return
        super().receive(slot, output)
        if self.how == "changes rows":
            output[0, 0] += 1


PROBLEMS = {
    "raises": "no such instruction",
    "does not compile": "returned non-zero exit status 1",
    "changes ids": "ids of 1 tokens came back changed",
    "changes rows": "hidden states of 1 tokens came back changed",
    "loses requests": "the request of the device did not arrive",
}


def break_flags(handover, monkeypatch, how: str) -> Broken:
    way = Broken(handover, how)
    monkeypatch.setattr(handover.device_layer, "Flags", lambda: way)
    monkeypatch.setattr(handover.device_layer, "_TEST_SECONDS", 0.2)
    monkeypatch.setattr(torch.cuda, "Event", PendingEvent)
    monkeypatch.setattr(PendingEvent, "waits_for", None)
    return way


@pytest.mark.parametrize("how", PROBLEMS)
def test_what_does_not_work_falls_back_or_is_refused(handover, handles, monkeypatch, caplog, how):
    break_flags(handover, monkeypatch, how)
    call = random_call(0, 3, torch.float32, with_padding=True)
    wanted = expected(handles.layers[0], call)
    with caplog.at_level(logging.INFO):
        of_device = make_handover(handover, handles.executor, max_num_tokens=SLOT)
    assert of_device.way.name == "hostfunc"
    assert f"hand over by hostfunc (flags: {PROBLEMS[how]}" in caplog.text or how == "does not compile"
    assert PROBLEMS[how] in caplog.text
    handle = of_device.layer_handle(1, TOP_KS[0])
    handle.submit(**call)
    handle.wait()
    assert torch.equal(call["output"], wanted)
    of_device.coordinator.close()

    with pytest.raises(
        ConfigError, match=r"by flags does not work here: .*give --kt-handover hostfunc, or update"
    ) as e:
        make_handover(handover, None, max_num_tokens=SLOT, way="flags")
    assert PROBLEMS[how] in str(e.value) and "\n" not in str(e.value)


def test_both_sides_agree_after_a_lost_request(handover, monkeypatch):
    """The device was freed by hand: to the next way, or the watchdog, no reply may seem to be there, or missing."""
    way = break_flags(handover, monkeypatch, "loses requests")
    with pytest.raises(ConfigError):
        make_handover(handover, None, max_num_tokens=SLOT, way="flags")
    slot = way.slot
    assert (slot.last_request(), slot.reply.item(), slot.sent.item(), slot.arrived.item()) == (0, 0, 0, 0)


def test_a_device_that_sees_nothing_of_the_host_is_an_error_of_its_own(handover, monkeypatch):
    break_flags(handover, monkeypatch, "sees nothing")
    with pytest.raises(ResourceError, match="sees nothing that the host writes"):
        make_handover(handover, None, max_num_tokens=SLOT)


def test_flags_that_work_are_taken(handover, caplog):
    with caplog.at_level(logging.INFO):
        of_device = make_handover(handover, None, max_num_tokens=SLOT)
    assert of_device.way.name == "flags"
    assert "hand over by flags (the test call came back right)" in caplog.text


def test_host_functions_as_asked_for(handover, caplog, monkeypatch):
    with caplog.at_level(logging.INFO):
        of_device = make_handover(handover, None, max_num_tokens=SLOT, way="hostfunc")
    assert of_device.way.name == "hostfunc"
    assert "hand over by hostfunc (asked for)" in caplog.text
    of_device.way._launch.driver.status = 999
    with pytest.raises(RuntimeError, match="cuLaunchHostFunc failed with CUresult 999"):
        of_device.way.receive(of_device.slots[0], torch.empty(1, HIDDEN))

    def broken(name):
        driver = handover_device.Driver(name)
        driver.status = 801
        return driver

    monkeypatch.setattr(handover.ways.ctypes, "CDLL", broken)
    with pytest.raises(ConfigError, match=r"hostfunc does not work here: .* CUresult 801; give --kt-handover auto"):
        make_handover(handover, None, max_num_tokens=SLOT, way="hostfunc")


def coordinator_on(handover, **options):
    slot = handover.staging.Slot.allocate(SLOT, HIDDEN, 2, torch.float32, CPU)
    given = {"executor": None, "slots": [slot.addresses()], "layers": [(0, 2)], "float_type": "float32"}
    given |= {"hidden_size": HIDDEN, "max_tokens": SLOT, "worker_cpus": [], "watchdog_seconds": 0.1}
    return slot, _native.Coordinator(**given | options)


@pytest.mark.parametrize("end", ["close", "del"])
def test_a_failure_is_told_to_python(handover, end):
    """While this thread may be waiting for the coordinator to end."""
    told, sentences = threading.Event(), []

    def on_failure(sentence):
        time.sleep(0.1)  # gives up the GIL
        sentences.append(sentence)
        told.set()

    slot, coordinator = coordinator_on(handover, on_failure=on_failure)
    coordinator.stop_answering()
    slot.request.fill_(1 << 32 | handover.staging.message(0, 3))
    time.sleep(0.2)
    if end == "close":
        coordinator.close()
    del coordinator
    assert told.wait(10) and len(sentences) == 1
    assert "did not answer MoE layer 0 (3 tokens) within 0.1 s" in sentences[0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"float_type": "int8"}, 'float_type is "int8"'),
        ({"max_tokens": 1 << 16}, "max_tokens is 65536, expected 1 to 65535"),
        ({"watchdog_seconds": 0.0}, "watchdog_ns is 0"),
        ({"slots": []}, "slots is empty"),
        ({"slots": [(64, 0, 0, 0, 0)]}, "an address of a slot is null"),
    ],
)
def test_bad_options(handover, options, message):
    with pytest.raises(_native.NativeError, match=message):
        coordinator_on(handover, **options)


def test_a_lost_call_ends_the_process():
    """As an engine meets it: in a process of its own, with the sentence on stderr."""
    code = """
        import time, torch
        from kt_vllm import _native
        words, rows = torch.zeros(16, dtype=torch.int64), torch.zeros(4, 8)
        keep = torch.zeros(24, dtype=torch.int64)
        mailbox = keep[(-keep.data_ptr() // 8) % 8 :]
        address = rows.data_ptr()
        coordinator = _native.Coordinator(
            executor=None, slots=[(mailbox.data_ptr(), address, address, address, address)], layers=[(0, 2)],
            float_type="float32", hidden_size=8, max_tokens=4, worker_cpus=[], watchdog_seconds=0.2)
        coordinator.stop_answering()
        mailbox[0] = 1 << 32 | 2
        time.sleep(60)
    """
    begin = time.monotonic()
    ended = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=60, check=False
    )
    assert ended.returncode == 1 and time.monotonic() - begin < 30
    assert ended.stderr.startswith("kt_vllm: error: the executor did not answer MoE layer 0 (2 tokens) within 0.2 s")
    assert ended.stderr.count("\n") == 1
