"""Mixed load on `vllm serve` for some minutes: no error, no leak, no hang; then a lost executor, which must end it.

    benchmarks/soak.py [--model FOLDER --kt-gguf PATH] [--seconds 600] [--concurrency 16] [--json FILE] [flags of serve]

Prompts of 16 to 4096 tokens (as many as --max-model-len holds), answers of 1 to 128; one request in five is given up
somewhere on its way. Ends with status 1 and a sentence for each thing that was not as it should be.
"""

import argparse
import asyncio
import contextlib
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp

ROOT = Path(__file__).resolve().parents[1]
TINY = ROOT / "examples/models/tiny-deepseek-v3"

START_SECONDS = 300
# What a request may take at most, prefill of others before it included; more is a hang.
REQUEST_SECONDS = 120
SAMPLE_SECONDS = 10
# Growth of all processes together from the end of the warm-up: allocators of a running server breathe, leaks go on.
MAX_HOST_GROWTH = 256 << 20
MAX_DEVICE_GROWTH = 256 << 20
# All that is used on a device, also by others; and the part of the worker's allocator.
DEVICE_KINDS = ("device", "allocator")
WARM_UP_SHARE = 0.25
ABORTED_SHARE = 0.2
# From the watchdog's sentence to the end of every process.
END_SLACK_SECONDS = 30


@dataclass
class Figures:
    """Of the whole run. bytes by kind and time: in `samples`."""

    completed: int = 0
    aborted: int = 0
    prompt_tokens: int = 0
    answer_tokens: int = 0
    longest_seconds: float = 0.0
    errors: list[str] = field(default_factory=list)
    samples: list[dict[str, float]] = field(default_factory=list)


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


class Server:
    """`kt-vllm serve` in a process group of its own."""

    def __init__(self, model: str, flags: list[str], log: Path) -> None:
        port = free_port()
        self.url, self.log_path = f"http://127.0.0.1:{port}", log
        command = [
            *(sys.executable, "-m", "kt_vllm.cli", "serve", model, "--host", "127.0.0.1", "--port", str(port)),
            *("--served-model-name", "soak", "--worker-extension-cls", "benchmarks.soak_worker.SoakWorker", *flags),
        ]
        path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
        with log.open("wb") as out:
            self.process = subprocess.Popen(
                command,
                stdout=out,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
                # The endpoint that reaches the workers is for developers.
                env={**os.environ, "PYTHONPATH": path, "VLLM_SERVER_DEV_MODE": "1"},
            )

    def log(self) -> str:
        return self.log_path.read_text(errors="replace")

    async def wait_healthy(self, session: aiohttp.ClientSession) -> None:
        deadline = time.monotonic() + START_SECONDS
        while True:
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise SystemExit(f"the server did not start:\n{self.log()[-4000:]}")
            try:
                async with session.get(self.url + "/health") as response:
                    if response.status == 200:
                        return
            except aiohttp.ClientError:
                pass
            await asyncio.sleep(0.5)

    def host_memory(self) -> dict[str, int]:
        """Bytes and threads of all its processes; memory that they share with files or each other is left out."""
        total = {"rss": 0, "threads": 0}
        for entry in Path("/proc").iterdir():
            # A process may go away meanwhile, and a zombie has no memory.
            with contextlib.suppress(OSError, KeyError):
                if entry.name.isdigit() and os.getpgid(int(entry.name)) == self.process.pid:
                    lines = (entry / "status").read_text().splitlines()
                    fields = dict(line.split(":", 1) for line in lines)
                    total["rss"] += int(fields["RssAnon"].split()[0]) << 10
                    total["threads"] += int(fields["Threads"])
        return total

    async def ask_workers(self, session: aiohttp.ClientSession, method: str) -> list[dict[str, int]]:
        async with session.post(self.url + "/collective_rpc", json={"method": method}) as response:
            response.raise_for_status()
            return (await response.json())["results"]

    def kill(self) -> None:
        """Everything of it that still runs."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


async def one_request(
    session: aiohttp.ClientSession, url: str, rng: random.Random, args: argparse.Namespace, figures: Figures
) -> None:
    # As many short prompts as long ones, on a logarithmic scale.
    longest = max(16, min(4096, args.max_model_len - 130))
    length = int(16 * (longest / 16) ** rng.random())
    answer = rng.randint(1, 128)
    body = {
        "model": "soak",
        "prompt": [rng.randrange(args.vocabulary) for _ in range(length)],
        "max_tokens": answer,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    # After so many pieces of the answer, the first of them may be none at all.
    give_up = rng.randint(0, answer) if rng.random() < ABORTED_SHARE else None
    begin, pieces, usage = time.monotonic(), 0, None
    try:
        timeout = aiohttp.ClientTimeout(total=rng.uniform(0.0, 0.2) + 0.01 if give_up == 0 else REQUEST_SECONDS)
        async with session.post(url + "/v1/completions", json=body, timeout=timeout) as response:
            if response.status != 200:
                figures.errors.append(f"status {response.status}: {(await response.text())[:300]}")
                return
            async for line in response.content:
                if not line.startswith(b"data: {"):
                    continue
                data = json.loads(line[6:])
                if "error" in data:
                    figures.errors.append(str(data["error"])[:300])
                    return
                usage = data.get("usage") or usage
                pieces += 1
                if give_up is not None and pieces >= give_up:
                    figures.aborted += 1
                    return  # leaving the block closes the connection, and vLLM gives the request up
    except TimeoutError:
        if give_up == 0:
            figures.aborted += 1
        else:
            figures.errors.append(f"a request of {length} + {answer} tokens had no end after {REQUEST_SECONDS} s")
        return
    if usage is None or usage["completion_tokens"] != answer:
        figures.errors.append(f"a request for {answer} tokens ended with {usage}")
        return
    figures.completed += 1
    figures.prompt_tokens += length
    figures.answer_tokens += answer
    figures.longest_seconds = max(figures.longest_seconds, time.monotonic() - begin)


async def load(server: Server, session: aiohttp.ClientSession, args: argparse.Namespace) -> Figures:
    figures, begin = Figures(), time.monotonic()
    deadline = begin + args.seconds

    async def client(number: int) -> None:
        rng = random.Random(f"{args.seed} {number}")
        while time.monotonic() < deadline and server.process.poll() is None:
            try:
                await one_request(session, server.url, rng, args, figures)
            except aiohttp.ClientError as error:
                figures.errors.append(f"{type(error).__name__}: {error}")
                await asyncio.sleep(1)

    async def sample() -> None:
        while True:
            await asyncio.sleep(min(SAMPLE_SECONDS, args.seconds / 12))
            if server.process.poll() is not None:
                return
            workers = await server.ask_workers(session, "soak_memory")
            figures.samples.append(
                {
                    "seconds": time.monotonic() - begin,
                    **server.host_memory(),
                    # All workers of a device see the same figure.
                    "device": max(w["device"] for w in workers),
                    "allocator": max(w["allocator"] for w in workers),
                }
            )

    sampler = asyncio.create_task(sample())
    await asyncio.gather(*(client(i) for i in range(args.concurrency)))
    sampler.cancel()
    if server.process.poll() is not None:
        figures.errors.append(f"the server ended with status {server.process.returncode}")
    return figures


def growth(figures: Figures, key: str) -> float:
    """From the level after the warm-up to that at the end; the least of a few samples each, since memory breathes."""
    warm = [s for s in figures.samples if s["seconds"] > WARM_UP_SHARE * figures.samples[-1]["seconds"]]
    if len(warm) < 4:
        return 0.0
    part = max(2, len(warm) // 4)
    return min(s[key] for s in warm[-part:]) - min(s[key] for s in warm[:part])


async def lose_coordinator(server: Server, session: aiohttp.ClientSession, watchdog: float) -> dict[str, Any]:
    """Nobody answers the device from here on: the server must end, and say why. Returns what happened."""
    stopped = sum(w["stopped"] for w in await server.ask_workers(session, "soak_stop_answering"))
    if not stopped:
        return {"stopped": 0}
    begin = time.monotonic()
    body = {"model": "soak", "prompt": [1, 2, 3], "max_tokens": 4}
    try:
        async with session.post(server.url + "/v1/completions", json=body) as response:
            answer = f"status {response.status}"
    except (aiohttp.ClientError, TimeoutError) as error:
        answer = type(error).__name__
    answered = time.monotonic() - begin
    while server.process.poll() is None and time.monotonic() - begin < watchdog + END_SLACK_SECONDS:
        await asyncio.sleep(0.1)
    return {
        "stopped": stopped,
        "answer": answer,
        "answered_seconds": answered,
        "ended_seconds": time.monotonic() - begin if server.process.poll() is not None else None,
        "says_why": "the executor did not answer MoE layer" in server.log(),
    }


async def soak(args: argparse.Namespace, flags: list[str]) -> tuple[dict[str, Any], list[str]]:
    """Figures, and what was not as it should be."""
    log = Path(args.log)
    server = Server(args.model, flags, log)
    timeout = aiohttp.ClientTimeout(total=REQUEST_SECONDS)
    try:
        connector = aiohttp.TCPConnector(limit=0)
        async with aiohttp.ClientSession(timeout=timeout, connector=connector) as session:
            await server.wait_healthy(session)
            figures = await load(server, session, args)
            problems = list(dict.fromkeys(figures.errors))
            lost: dict[str, Any] | None = None
            if server.process.poll() is None and not args.keep_coordinator:
                lost = await lose_coordinator(server, session, args.watchdog)
    finally:
        server.kill()
    grown = {key: growth(figures, key) for key in ("rss", *DEVICE_KINDS, "threads")} if figures.samples else {}
    limits = {"rss": MAX_HOST_GROWTH} | dict.fromkeys(DEVICE_KINDS, MAX_DEVICE_GROWTH)
    for key, limit in limits.items():
        if grown.get(key, 0) > limit:
            problems.append(f"{key} memory grew by {grown[key] / 2**20:.0f} MiB, more than {limit >> 20} MiB")
    if grown.get("threads", 0) > 0:
        problems.append(f"{grown['threads']:.0f} threads more than after the warm-up")
    if len(figures.samples) < 4:
        problems.append(f"memory was looked at {len(figures.samples)} times only")
    if figures.completed == 0:
        problems.append("no request was completed")
    if lost and lost["stopped"]:
        if lost["ended_seconds"] is None:
            problems.append(f"the server still ran {END_SLACK_SECONDS} s after the watchdog's time")
        elif not lost["says_why"]:
            problems.append("the server ended without the watchdog's sentence")
    report = {
        "seconds": args.seconds,
        "concurrency": args.concurrency,
        **{k: v for k, v in vars(figures).items() if k not in ("errors", "samples")},
        "tokens_per_s": (figures.prompt_tokens + figures.answer_tokens) / args.seconds,
        "grown": grown,
        "lost_coordinator": lost,
        "problems": problems,
        "samples": figures.samples,
    }
    return report, problems


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", default=str(TINY), help="folder")
    add("--kt-gguf", default=str(TINY / "tiny-deepseek-v3-Q4_K_M.gguf"))
    add("--seconds", type=float, default=600)
    add("--concurrency", type=int, default=16)
    add("--max-model-len", type=int, default=0, help="default: the model's")
    add("--watchdog", type=float, default=10, help="seconds until a lost executor ends the engine")
    add("--keep-coordinator", action="store_true", help="do not end with a lost executor")
    add("--seed", default="0")
    add("--log", default="soak-server.log", help="of the server")
    add("--json", metavar="FILE")
    args, flags = parser.parse_known_args()
    config = json.loads(Path(args.model, "config.json").read_text())
    args.vocabulary = config["vocab_size"]
    args.max_model_len = args.max_model_len or config["max_position_embeddings"]
    flags += ["--kt-gguf", args.kt_gguf, "--max-model-len", str(args.max_model_len), "--max-num-seqs", "16"]
    flags += ["--additional-config", json.dumps({"kt": {"watchdog_seconds": args.watchdog}})]
    report, problems = asyncio.run(soak(args, flags))
    if args.json:
        Path(args.json).write_text(json.dumps(report, indent=1) + "\n")
    grown = ", ".join(f"{key} {value / 2**20:+.0f} MiB" for key, value in report["grown"].items() if key != "threads")
    print(
        f"soak: {args.seconds:.0f} s, {report['completed']} requests completed, {report['aborted']} given up, "
        f"{report['tokens_per_s']:.0f} tokens/s, longest {report['longest_seconds']:.1f} s; {grown or 'not sampled'}; "
        f"lost executor: {report['lost_coordinator']}"
    )
    for problem in problems:
        print(f"soak: FAILED: {problem}")
    raise SystemExit(bool(problems))


if __name__ == "__main__":
    main()
