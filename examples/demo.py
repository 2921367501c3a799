"""The whole slice in one run: serve the tiny model from its GGUF, ask it two things, stop it, see that nothing is left.

    make demo                                            the shipped model
    .venv/bin/python examples/demo.py --help             another model, other prompts
    .venv/bin/python examples/demo.py -- --enforce-eager what follows -- goes to the server

Exits 0 when the server answered both requests and stopped when asked to, else 1.
"""

import argparse
import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

TINY_MODEL = Path(__file__).resolve().parent / "models" / "tiny-deepseek-v3"
HOST = "127.0.0.1"
SERVED_NAME = "demo"
# What a server may take to end all its processes; vLLM's takes 1 to 4 s on an idle machine.
STOP_SECONDS = 10


class DemoError(Exception):
    """Ends the demo with its one sentence."""


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=TINY_MODEL, help="folder with config.json and tokenizer")
    parser.add_argument("--gguf", type=Path, help="file, folder or first shard (default: the one *.gguf in the folder)")
    parser.add_argument("--prompt", default="The function returns the number of", help="for /v1/completions")
    parser.add_argument("--message", default="How do I create a table with a primary key?", help="for the chat")
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--timeout", type=float, default=600, help="seconds the server may take to become healthy")
    parser.add_argument("server_args", nargs="*", help="after --: passed to `kt-vllm serve`")
    args = parser.parse_args()
    if args.gguf is None:
        found = sorted(args.model.glob("*.gguf"))
        if len(found) != 1:
            parser.error(f"{args.model} holds {len(found)} *.gguf files, expected one: name it with --gguf")
        args.gguf = found[0]
    return args


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return probe.getsockname()[1]


def start_server(args: argparse.Namespace, port: int, log: Path) -> subprocess.Popen[bytes]:
    command = Path(sys.executable).with_name("kt-vllm")
    if not command.is_file():
        raise DemoError(f"no kt-vllm command beside {sys.executable}: run `make venv`, or this file with its Python")
    environment = {
        "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB; vLLM would take half of the machine's memory
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",  # everything is local: no name look-ups to wait for
    } | os.environ
    with log.open("wb") as output:
        return subprocess.Popen(
            [
                *(command, "serve", args.model, "--kt-gguf", args.gguf, "--host", HOST, "--port", str(port)),
                # Small: what vLLM warms up and compiles at start grows with them.
                *("--served-model-name", SERVED_NAME, "--max-model-len", "1024", "--max-num-seqs", "4"),
                *args.server_args,
            ],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=environment,
            # A session of its own: our Ctrl-C does not reach it by chance, and all its processes can be found.
            start_new_session=True,
        )


def processes_of(session: int) -> list[int]:
    """The living processes of a session; one that has ended and only waits to be reaped does not count."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            # pid (name) state parent group session ...; the name may hold spaces and brackets.
            state, _, _, owner = stat.read_text().rpartition(")")[2].split()[:4]
            if int(owner) == session and state != "Z":
                found.append(int(stat.parent.name))
    return found


def signal_all(session: int, what: signal.Signals) -> None:
    for pid in processes_of(session):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, what)


def ended(server: subprocess.Popen[bytes], seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while server.poll() is None or processes_of(server.pid):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True


def stop(server: subprocess.Popen[bytes], serving: bool) -> bool:
    """Returns whether the server, asked politely, ended with all its processes."""
    start = time.monotonic()
    if serving and server.poll() is None:
        server.send_signal(signal.SIGINT)
    else:
        # What Ctrl-C in a terminal does: while it starts, vLLM's first process waits for the others and does not end.
        signal_all(server.pid, signal.SIGINT)
    polite = ended(server, STOP_SECONDS)
    if not polite:
        print(f"demo: {len(processes_of(server.pid))} processes left after {STOP_SECONDS} s, ending them")
        signal_all(server.pid, signal.SIGTERM)
        if not ended(server, 3):
            signal_all(server.pid, signal.SIGKILL)
    if not ended(server, 3):
        print(f"demo: still running: {processes_of(server.pid)}")
        return False
    print(f"demo: server stopped in {time.monotonic() - start:.1f} s, no process left")
    return polite


def healthy(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://{HOST}:{port}/health", timeout=5) as answer:
            return answer.status == 200
    except (urllib.error.URLError, OSError):
        return False


def last_line(log: Path) -> str:
    lines = log.read_text(errors="replace").replace("\r", "\n").split("\n")
    # vLLM's prefix `(EngineCore pid=1) INFO 11-22 17:17:17 [file.py:1] ` says nothing here.
    return next((line.split("] ", 1)[-1].strip() for line in reversed(lines) if line.strip()), "")


def wait_until_healthy(server: subprocess.Popen[bytes], port: int, log: Path, timeout: float) -> None:
    start = time.monotonic()
    terminal = sys.stdout.isatty()
    next_report = 0.0
    while not healthy(port):
        elapsed = time.monotonic() - start
        if server.poll() is not None:
            raise DemoError(f"the server ended with code {server.returncode} after {elapsed:.0f} s")
        if elapsed > timeout:
            raise DemoError(f"the server was not healthy after {timeout:.0f} s")
        if elapsed >= next_report:
            next_report = elapsed + (1 if terminal else 10)
            line = f"  {elapsed:3.0f} s  {last_line(log)}"[:110]
            print(f"\r\033[K{line}" if terminal else line, end="" if terminal else "\n", flush=True)
        time.sleep(0.25)
    print(("\r\033[K" if terminal else "") + f"demo: healthy after {time.monotonic() - start:.1f} s")


def ask(port: int, prompt: str, message: str, max_tokens: int) -> None:
    from openai import OpenAI

    client = OpenAI(base_url=f"http://{HOST}:{port}/v1", api_key="unused", timeout=120, max_retries=0)

    start = time.monotonic()
    completion = client.completions.create(model=SERVED_NAME, prompt=prompt, max_tokens=max_tokens, temperature=0)
    seconds = time.monotonic() - start
    if not completion.choices[0].text.strip() or completion.usage is None:
        raise DemoError("the completion holds no text")
    print(f"\n/v1/completions\n{prompt} ->{completion.choices[0].text}")
    tokens = completion.usage.completion_tokens
    print(f"-- {tokens} tokens in {seconds:.2f} s, {tokens / seconds:.1f} tokens/s")

    print(f"\n/v1/chat/completions, streamed\n{message} -> ", end="", flush=True)
    start = time.monotonic()
    first = None
    tokens = 0
    with client.chat.completions.create(
        model=SERVED_NAME,
        messages=[{"role": "user", "content": message}],
        max_tokens=max_tokens,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
    ) as stream:
        for chunk in stream:
            if chunk.usage is not None:
                tokens = chunk.usage.completion_tokens
            for choice in chunk.choices:
                if choice.delta.content:
                    first = first or time.monotonic() - start
                    print(choice.delta.content, end="", flush=True)
    seconds = time.monotonic() - start
    print()
    if first is None:
        raise DemoError("the streamed chat completion holds no text")
    print(f"-- {tokens} tokens in {seconds:.2f} s, {tokens / seconds:.1f} tokens/s, the first after {first:.2f} s\n")


@contextlib.contextmanager
def terminate_as_interrupt() -> Iterator[None]:
    """SIGTERM takes the way of Ctrl-C, so that the server is stopped then, too."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def main() -> int:
    args = parse_args()
    port = free_port()
    with tempfile.TemporaryDirectory(prefix="kt-vllm-demo-") as folder, terminate_as_interrupt():
        log = Path(folder) / "server.log"
        server = None
        serving = False
        failure = None
        try:
            server = start_server(args, port, log)
            print(f"demo: kt-vllm serve {args.model.name} --kt-gguf {args.gguf.name}, port {port}, pid {server.pid}")
            wait_until_healthy(server, port, log, args.timeout)
            serving = True
            ask(port, args.prompt, args.message, args.max_tokens)
        except KeyboardInterrupt:
            failure = "interrupted"
        except Exception as error:  # whatever it was, the server must be stopped and its log shown
            failure = f"{error}" if isinstance(error, DemoError) else f"{type(error).__name__}: {error}"
        finally:
            # From here to the end a second Ctrl-C must not leave processes behind.
            signal.signal(signal.SIGINT, signal.SIG_IGN)
            stopped = server is None or stop(server, serving)
        if failure is not None:
            if failure != "interrupted" and log.is_file():
                print("\n".join(log.read_text(errors="replace").splitlines()[-40:]))
            print(f"demo: {failure}", file=sys.stderr)
        elif not stopped:
            print("demo: the server did not stop by itself when asked to", file=sys.stderr)
    return 0 if failure is None and stopped else 1


if __name__ == "__main__":
    sys.exit(main())
