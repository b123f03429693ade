"""A real vLLM server as a child process, for tests."""

import os
import signal
import subprocess
import time
from contextlib import contextmanager
from pathlib import Path

import httpx

from tests.support.ports import free_port

ROOT = Path(__file__).resolve().parents[2]
PYTHON = Path(os.environ.get("BRIDGE_VLLM_PYTHON") or ROOT / ".venv-vllm/bin/python")
START_S = 420


class Vllm:
    """One that can be killed and started again at its address; `log` is the file it writes to."""

    def __init__(self, model, log, *options, dtype="float32", context=256, **environment):
        port = free_port()
        self.url = f"http://127.0.0.1:{port}"
        self._log = log
        self._arguments = [
            *(str(PYTHON), "-m", "vllm.entrypoints.openai.api_server"),
            *("--model", str(model), "--host", "127.0.0.1", "--port", str(port)),
            *("--dtype", dtype, "--max-model-len", str(context), "--enforce-eager", *options),
        ]
        self._surroundings = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "VLLM_NO_USAGE_STATS": "1",
            "HF_HUB_OFFLINE": "1",
            **environment,
        }

    def start(self):
        """Until it answers."""
        with self._log.open("a") as out:
            self.process = subprocess.Popen(
                self._arguments,
                env=self._surroundings,
                stdout=out,
                stderr=out,
                start_new_session=True,
            )
        end = time.monotonic() + START_S
        while time.monotonic() < end and self.process.poll() is None:
            try:
                if httpx.get(f"{self.url}/health", timeout=5).is_success:
                    return
            except httpx.HTTPError:
                pass
            time.sleep(0.5)
        raise AssertionError(f"vLLM did not start:\n{self._log.read_text()[-3000:]}")

    def kill(self):
        """At once, with all its processes."""
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def stop(self):
        """Politely, and then at once."""
        os.killpg(self.process.pid, signal.SIGTERM)
        try:
            self.process.wait(120)
        except subprocess.TimeoutExpired:
            self.kill()


@contextmanager
def vllm_server(model, log, *options, **how):
    """Its address, as long as the block lasts."""
    server = Vllm(model, log, *options, **how)
    try:
        server.start()
        yield server.url
    finally:
        server.stop()
