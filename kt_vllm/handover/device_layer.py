"""The executor as a layer on the device sees it: the same submit() and wait() as LayerHandle, queued on the stream."""

import ctypes
import itertools
import threading
import time
import weakref
from collections.abc import Sequence

import torch

from kt_vllm import _native
from kt_vllm.errors import ConfigError, ResourceError
from kt_vllm.executor import CPUExpertExecutor
from kt_vllm.handover.staging import Slot
from kt_vllm.handover.ways import Flags, HostFunctions, Way
from kt_vllm.log import init_logger

logger = init_logger(__name__)

# Tokens of a slot. As many as the executor computes at once (kMaxPieceTokens in csrc/executor): fewer would read the
# weights of every expert more often.
MAX_PIECE_TOKENS = 4096
_TEST_SECONDS = 10.0


def pinned_bytes(max_num_tokens: int, hidden_size: int, top_k: int, itemsize: int) -> int:
    """Host memory of a Handover."""
    num_slots, max_tokens = _slots_for(max_num_tokens)
    return num_slots * max_tokens * (2 * hidden_size * itemsize + top_k * (4 + 4))


def _slots_for(max_num_tokens: int) -> tuple[int, int]:
    """(slots, tokens of each) for calls of so many tokens."""
    return (1, max_num_tokens) if max_num_tokens <= MAX_PIECE_TOKENS else (2, MAX_PIECE_TOKENS)


# Of this process.
handovers: "weakref.WeakSet[Handover]" = weakref.WeakSet()


def begin_step() -> None:
    """A step is about to begin: the coordinators stop sleeping; what earlier steps had wrong is logged.

    A coordinator itself does not log: the device would wait for Python.
    """
    for handover in handovers:
        handover.coordinator.wake()
        if handover.executor is not None:
            handover.executor.warn_of_invalid_ids()


class Handover:
    """Slots, coordinator and way of one process. The executor is the coordinator's from here on."""

    def __init__(
        self,
        executor: CPUExpertExecutor | None,
        layers: Sequence[tuple[int, int]],
        *,
        hidden_size: int,
        max_num_tokens: int,
        dtype: torch.dtype,
        device: torch.device,
        worker_cpus: Sequence[int],
        way: str,
        watchdog_seconds: float,
        spin_ns: int = 2 * _native.STEP_SPIN_NS,
    ) -> None:
        """layers: the executor's number and top_k of each; executor None: all are answered with zeros.

        max_num_tokens: of a call; what is longer than a slot goes in pieces, one computed while the next is copied.
        way: auto, flags or hostfunc. spin_ns: for how long the coordinator spins after a call. Raises ConfigError where
        the device cannot do what was asked for.
        """
        self.executor = executor  # which closes when nobody refers to it
        num_slots, max_tokens = _slots_for(max_num_tokens)
        self._top_ks = sorted({top_k for _, top_k in layers})
        self.slots = [Slot.allocate(max_tokens, hidden_size, self._top_ks[-1], dtype, device) for _ in range(num_slots)]
        self.max_tokens = max_tokens
        self.coordinator = _native.Coordinator(
            executor=None if executor is None else executor.native,
            slots=[slot.addresses() for slot in self.slots],
            layers=list(layers),
            float_type=str(dtype).removeprefix("torch."),
            hidden_size=hidden_size,
            max_tokens=max_tokens,
            worker_cpus=list(worker_cpus),
            watchdog_seconds=watchdog_seconds,
            spin_ns=spin_ns,
            on_failure=raise_in_main_thread,
        )
        # Before that of the executor, which was made first.
        self._finalizer = weakref.finalize(self, self.coordinator.close)
        handovers.add(self)
        self.way = self._choose(way)
        for slot in self.slots:  # without an executor nobody overwrites what the test left
            slot.output.zero_()

    def layer_handle(self, number: int, top_k: int) -> "DeviceLayerHandle":
        """Of the layer at this place of `layers`."""
        return DeviceLayerHandle(self, number, top_k)

    def restore(self) -> None:
        """After the device's memory was discarded."""
        for slot in self.slots:
            slot.restore_device_words()

    def _choose(self, wanted: str) -> Way:
        if wanted == "hostfunc":
            way: Way = HostFunctions()
            reason = "asked for"
            problem = self._test(way)
        else:
            way, reason = Flags(), "the test call came back right"
            problem = self._test(way)
            if problem and wanted == "auto":
                reason = f"flags: {problem}"
                way = HostFunctions()
                problem = self._test(way)
        if problem:
            raise ConfigError(
                f"the hand-over between device and executor by {way.name} does not work here: {problem}; "
                f"give --kt-handover {'hostfunc' if way.name == 'flags' else 'auto'}, or update the GPU driver."
            )
        logger.info("kt_vllm: device and executor hand over by %s (%s).", way.name, reason)
        return way

    def _test(self, way: Way) -> str | None:
        """Sends rows there and back, as few as go by kernel and as many as go; what was wrong, or None.

        This compiles every kernel too, which must not happen while a graph is captured.
        """
        calls = itertools.product(
            self.slots, sorted({1, min(2, self.max_tokens), self.max_tokens}), self._top_ks, (False, True)
        )
        try:
            for call in calls:
                problem = self._echo(way, *call)
                if problem:
                    return problem
        except ResourceError:
            raise
        except Exception as error:  # of the driver, or of one of the compilers between Triton and it
            return str(error) or type(error).__name__
        return None

    def _echo(self, way: Way, slot: Slot, num_tokens: int, top_k: int, with_padding: bool) -> str | None:
        device = slot.sent.device
        # Not the default one, from which unseeded requests are sampled.
        own = {"generator": torch.Generator(device).manual_seed(0), "device": device}
        rows = torch.randn(num_tokens, slot.hidden_states.shape[1], **own).to(slot.hidden_states.dtype)
        ids = torch.randint(1 << 15, (num_tokens, top_k), dtype=torch.int32, **own)
        weights = torch.rand(num_tokens, top_k, **own)
        padding = torch.rand(num_tokens, **own) < 0.5 if with_padding else None
        output = torch.full_like(rows, float("nan"))
        sequence = slot.last_request() + 1
        way.send(slot, _native.ECHO_LAYER, rows, weights, ids, padding)
        way.receive(slot, output)
        done = torch.cuda.Event()
        done.record()
        if not _finished(done):
            return self._give_up(slot, done, sequence)
        expected_ids = ids if padding is None else ids.masked_fill(padding[:, None], -1)
        for what, seen, expected in (
            ("hidden states", output, rows),
            ("ids", slot.topk_ids[: ids.numel()].to(device), expected_ids.flatten()),
            ("weights", slot.topk_weights[: weights.numel()].to(device), weights.flatten()),
        ):
            if not torch.equal(seen, expected):
                return f"{what} of {num_tokens} tokens came back changed"
        return None

    def _give_up(self, slot: Slot, done: torch.cuda.Event, sequence: int) -> str:
        """Frees the device, which waits for the reply to this request; says what hung."""
        arrived = slot.last_request() == sequence
        slot.reply.fill_(sequence)
        if not _finished(done):
            raise ResourceError(
                "the device sees nothing that the host writes to pinned memory, and waits for it: this machine cannot "
                "serve with --kt-gguf."
            )
        # Both sides agree again: the next way's first reply must not be there already.
        slot.reply.fill_(slot.last_request())
        slot.restore_device_words()
        return "the device did not see the reply" if arrived else "the request of the device did not arrive"


class DeviceLayerHandle:
    """One layer. Calls alternate submit(), wait(); all device work goes to the current stream."""

    def __init__(self, handover: Handover, number: int, top_k: int) -> None:
        self.handover = handover
        self._number = number
        self._top_k = top_k
        self._pieces: list[tuple[Slot, tuple[torch.Tensor | None, ...], torch.Tensor]] = []

    @staticmethod
    def is_capturing() -> bool:
        """Whether calls go into a CUDA graph, where they cost nothing now."""
        return torch.cuda.is_current_stream_capturing()

    def submit(
        self,
        hidden_states: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        output: torch.Tensor,
        padding: torch.Tensor | None = None,
    ) -> None:
        """As LayerHandle.submit(), of tensors on the device. padding: bool [num_tokens], rows that cost no work."""
        num_tokens, top_k = topk_ids.shape
        slots, size = self.handover.slots, self.handover.max_tokens
        assert top_k == self._top_k, f"{top_k} experts a token in a layer of {self._top_k}"
        assert num_tokens <= size or len(slots) > 1, f"{num_tokens} tokens and a slot of {size}"
        inputs = (hidden_states.contiguous(), topk_weights.contiguous(), topk_ids.contiguous(), padding)
        self._pieces = [
            (
                slots[i % len(slots)],
                tuple(None if x is None else x[begin : begin + size] for x in inputs),
                output[begin : begin + size],
            )
            for i, begin in enumerate(range(0, num_tokens, size))
        ]
        for slot, tensors, _ in self._pieces[: len(slots)]:
            self.handover.way.send(slot, self._number, *tensors)

    def wait(self) -> None:
        """Holds the stream until the output of the last submit() is complete."""
        pieces, self._pieces = self._pieces, []
        num_slots = len(self.handover.slots)
        for i, (slot, _, output) in enumerate(pieces):
            self.handover.way.receive(slot, output)
            for later, tensors, _ in pieces[i + num_slots : i + num_slots + 1]:
                self.handover.way.send(later, self._number, *tensors)


def raise_in_main_thread(sentence: str) -> None:
    """Ends vLLM's engine loop, or a worker's, by an exception of its own main thread, so that vLLM tells its clients.

    It may wait for the device, which is released only after this. What it then has are no answers: the exception comes
    before it can send them.
    """
    error = type("HandoverError", (RuntimeError,), {"__init__": lambda self: RuntimeError.__init__(self, sentence)})
    main_thread = threading.main_thread().ident
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(main_thread or 0), ctypes.py_object(error))


def _finished(event: torch.cuda.Event) -> bool:
    deadline = time.monotonic() + _TEST_SECONDS
    while not event.query():
        if time.monotonic() > deadline:
            return False
        time.sleep(1e-4)
    return True
