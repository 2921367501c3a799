"""A served tiny model for tests: started once, on a free port, in its own process group, and surely gone afterwards."""

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

from tests.e2e.score import GGUF, MODEL_DIR

START_SECONDS = 240


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


def group_members(pgid: int) -> list[int]:
    """Processes of the group that still run (zombies do not)."""
    members = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rsplit(")", 1)[1].split()
            except OSError:
                continue
            if int(fields[2]) == pgid and fields[0] != "Z":
                members.append(int(entry.name))
    return members


class Server:
    """`kt-vllm serve` on the tiny model."""

    def __init__(self, log_path: Path, *flags: str, gguf: str = str(GGUF), model: str = str(MODEL_DIR)) -> None:
        self.port = free_port()
        self.base_url = f"http://127.0.0.1:{self.port}"
        self.log_path = log_path
        command = [
            *(sys.executable, "-m", "kt_vllm.cli", "serve", model, "--kt-gguf", gguf, "--port", str(self.port)),
            *("--served-model-name", "tiny", "--dtype", "bfloat16", "--max-model-len", "1024", "--max-num-seqs", "32"),
            *("--host", "127.0.0.1", *flags),
        ]
        with log_path.open("wb") as log:
            self.process = subprocess.Popen(
                command,
                stdout=log,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
                env={"VLLM_CPU_KVCACHE_SPACE": "1", **os.environ},
            )

    def log(self) -> str:
        return self.log_path.read_text(errors="replace")

    def wait_for_log(self, text: str, seconds: float = START_SECONDS) -> None:
        deadline = time.monotonic() + seconds
        while text not in self.log():
            assert self.process.poll() is None, self.log()[-4000:]
            assert time.monotonic() < deadline, f"no {text!r} in the log:\n{self.log()[-4000:]}"
            time.sleep(0.05)

    def wait_healthy(self) -> "Server":
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline:
            assert self.process.poll() is None, self.log()[-4000:]
            try:
                urllib.request.urlopen(self.base_url + "/health", timeout=1).close()
                return self
            except (urllib.error.URLError, OSError):
                time.sleep(0.3)
        raise AssertionError(f"not healthy after {START_SECONDS} s:\n{self.log()[-4000:]}")

    def stop(self, signal_number: int = signal.SIGINT, seconds: float = 10.0) -> float:
        """Signals the server process alone, as a supervisor does; returns the seconds until all processes are gone."""
        started = time.monotonic()
        if self.process.poll() is None:
            os.kill(self.process.pid, signal_number)
        while time.monotonic() - started < seconds:
            self.process.poll()
            if not group_members(self.process.pid):
                return time.monotonic() - started
            time.sleep(0.05)
        left = group_members(self.process.pid)
        self.kill()
        raise AssertionError(f"{len(left)} processes still run {seconds} s after the signal:\n{self.log()[-4000:]}")

    def kill(self) -> None:
        for pid in group_members(self.process.pid):
            os.kill(pid, signal.SIGKILL)
        self.process.wait()
