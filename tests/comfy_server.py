"""A real ComfyUI with this pack in it, started for the tests marked ``host`` and ``browser``."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[1]
START_SECONDS = 300
# How a prompt ends, as the host tells it.
ENDS = ("execution_interrupted", "execution_success", "execution_error")


class ComfyServer:
    """One running ComfyUI: its address, folders and log, and the API calls that tests make."""

    def __init__(self, url: str, base: Path, log: Path, process: subprocess.Popen):
        self.url, self.base, self.log_path, self.process = url, base, log, process

    @property
    def output(self) -> Path:
        return self.base / "output"

    def log(self) -> str:
        return self.log_path.read_text(errors="replace")

    def get(self, path: str) -> Any:
        with urllib.request.urlopen(f"{self.url}{path}", timeout=60) as answer:
            return json.loads(answer.read())

    def bytes(self, path: str) -> bytes:
        with urllib.request.urlopen(f"{self.url}{path}", timeout=60) as answer:
            return answer.read()

    def post(self, path: str, data: Any) -> tuple[int, Any]:
        """Status and decoded answer; an HTTP error is an answer too."""
        body = json.dumps(data).encode()
        request = urllib.request.Request(
            f"{self.url}{path}", body, {"Content-Type": "application/json"}
        )
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                status, text = answer.status, answer.read()
        except urllib.error.HTTPError as error:
            status, text = error.code, error.read()
        return status, json.loads(text) if text else None

    def queue(self, prompt: dict[str, Any]) -> str:
        """Queue an API-format workflow and return its prompt id."""
        status, answer = self.post("/prompt", {"prompt": prompt, "client_id": "tests"})
        assert status == 200, answer
        return answer["prompt_id"]

    def wait(self, prompt_id: str, seconds: float = 300) -> dict[str, Any]:
        """The history entry of a prompt once it has ended."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            history = self.get(f"/history/{prompt_id}")
            if prompt_id in history and history[prompt_id]["status"].get("status_str"):
                return history[prompt_id]
            assert self.process.poll() is None, f"ComfyUI ended:\n{self.log()[-4000:]}"
            time.sleep(0.1)
        raise AssertionError(f"prompt {prompt_id} did not end:\n{self.log()[-4000:]}")

    def run(self, prompt: dict[str, Any]) -> dict[str, Any]:
        """Queue a workflow, wait for it, and return its history entry."""
        return self.wait(self.queue(prompt))

    def cancel(self, prompt: dict[str, Any], steps: int, after: int) -> tuple[int, dict[str, Any]]:
        """Queue a workflow whose sampler has so many steps and interrupt it at one of them.

        Returns how many more steps it made, and its history entry.
        """
        prompt_id, at_cancel, last = asyncio.run(self._cancel(prompt, steps, after))
        return last - at_cancel, self.wait(prompt_id)

    async def _cancel(self, prompt: dict[str, Any], steps: int, after: int) -> tuple[str, int, int]:
        import aiohttp

        seen = at_cancel = last = 0
        url = self.url.replace("http", "ws") + "/ws?clientId=tests"
        async with aiohttp.ClientSession() as session, session.ws_connect(url) as socket:
            prompt_id = self.queue(prompt)
            async for message in socket:
                if message.type is not aiohttp.WSMsgType.TEXT:
                    continue
                event = json.loads(message.data)
                if event["type"] == "progress" and event["data"]["max"] == steps:
                    seen, last = seen + 1, event["data"]["value"]
                    if seen == after:
                        at_cancel = last
                        async with session.post(f"{self.url}/interrupt") as answer:
                            assert answer.status == 200
                if event["type"] in ENDS:
                    assert at_cancel, f"it ended before step {after} of {steps} ({event['type']})"
                    return prompt_id, at_cancel, last
        raise AssertionError("the socket closed")

    def file(self, entry: dict[str, str]) -> bytes:
        """A result as a node's ui output names it."""
        names = ("filename", "subfolder", "type")
        query = urllib.parse.urlencode({name: entry[name] for name in names})
        return self.bytes(f"/view?{query}")


@contextmanager
def comfy_server(folder: Path, *options: str) -> Iterator[ComfyServer]:
    """Start ComfyUI on the CPU with a fresh base folder that holds this pack alone."""
    comfy = Path(os.environ["COMFYUI_DIR"])
    (folder / "custom_nodes").mkdir(parents=True)
    (folder / "custom_nodes" / "layerloom").symlink_to(REPOSITORY, target_is_directory=True)
    for name in ("input", "output", "temp", "user", "models/checkpoints"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    log_path = folder / "comfyui.log"
    command = [sys.executable, "main.py", "--cpu", "--port", str(port), "--preview-method"]
    command += ["latent2rgb", "--base-directory", str(folder), "--disable-auto-launch"]
    command += ["--database-url", "sqlite:///:memory:", *options]
    with log_path.open("w") as log:
        process = subprocess.Popen(command, cwd=comfy, stdout=log, stderr=subprocess.STDOUT)
        server = ComfyServer(f"http://127.0.0.1:{port}", folder, log_path, process)
        try:
            _wait_until_up(server)
            yield server
        finally:
            process.terminate()
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
            shutil.rmtree(folder / "output", ignore_errors=True)


def _wait_until_up(server: ComfyServer) -> None:
    end = time.monotonic() + START_SECONDS
    while time.monotonic() < end:
        if server.process.poll() is not None:
            break
        try:
            server.get("/system_stats")
            return
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            time.sleep(0.3)
    raise AssertionError(f"ComfyUI did not start:\n{server.log()[-4000:]}")
