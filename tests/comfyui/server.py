"""A real ComfyUI server for the tests: started on a free port, with folders of its own."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
COMFYUI_PATH = os.environ.get("COMFYUI_PATH")
COMFYUI_PYTHON = os.environ.get("COMFYUI_PYTHON", sys.executable)
SMALL_MODEL = "small model (built in, 64 px)"


@dataclass(frozen=True)
class Outcome:
    """What became of a queued graph.

    Attributes:
        status: ``success``, ``error`` or ``interrupted``.
        messages: ComfyUI's messages by their kind, the last of each.
        outputs: What nodes showed, by their numbers.
    """

    status: str
    messages: dict[str, dict[str, Any]]
    outputs: dict[str, Any]

    @property
    def cached(self) -> set[str]:
        """Numbers of the nodes that were not run again."""
        return set(self.messages["execution_cached"]["nodes"])

    @property
    def error(self) -> str:
        return self.messages["execution_error"]["exception_message"]


class Server:
    """One server process.

    Args:
        base: Folder for everything that ComfyUI writes and reads.
        pack_name: What this repository is called in ``custom_nodes``.
        more: Further arguments.
        program: What Python runs: ComfyUI's main.py, or something that runs it.
        python_path: For PYTHONPATH, which ComfyUI is otherwise started without.
    """

    def __init__(
        self,
        base: Path,
        pack_name: str = "cntlora-nodes",
        *more: str,
        program: tuple[str, ...] = ("main.py",),
        python_path: str = "",
    ) -> None:
        assert COMFYUI_PATH is not None
        self.base, self.pack_name = base, pack_name
        for name in ("input", "output", "models/checkpoints", "custom_nodes", "user"):
            (base / name).mkdir(parents=True, exist_ok=True)
        pack = base / "custom_nodes" / pack_name
        if not pack.exists():
            pack.symlink_to(ROOT, target_is_directory=True)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.address = f"http://127.0.0.1:{free.getsockname()[1]}"
        self.log_path = base / "server.log"
        port = self.address.rpartition(":")[2]
        arguments = [
            COMFYUI_PYTHON, *program, "--cpu", "--port", port, "--base-directory", str(base),
            "--disable-auto-launch", "--database-url", "sqlite:///:memory:", *more,
        ]  # fmt: skip
        environment = {**os.environ, "PYTHONPATH": python_path}
        with self.log_path.open("w") as log:
            self.process = subprocess.Popen(
                arguments, cwd=COMFYUI_PATH, env=environment, stdout=log, stderr=log
            )
        self.wait_for(lambda: "To see the GUI go to" in self.log, 600)

    @property
    def log(self) -> str:
        return self.log_path.read_text("utf-8", errors="replace")

    def memory(self, kind: str = "VmRSS") -> int:
        """Resident memory in bytes; or its peak (VmHWM), or without mapped files (RssAnon)."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        line = next(line for line in status.splitlines() if line.startswith(kind))
        return int(line.split()[1]) * 1024

    def forget_peak_memory(self) -> None:
        """From now on VmHWM is the peak since this call."""
        Path(f"/proc/{self.process.pid}/clear_refs").write_text("5")

    def settled_memory(self) -> int:
        """Resident memory once ComfyUI has dropped its models and its cache, in bytes."""
        self.free()
        readings = [self.memory()]
        while len(readings) < 5 or max(readings[-5:]) > 1.01 * min(readings[-5:]):
            assert len(readings) < 90, readings
            time.sleep(2)
            readings.append(self.memory())
        return readings[-1]

    def wait_for(self, condition: Callable[[], Any], seconds: float) -> Any:
        deadline = time.monotonic() + seconds
        while not (result := condition()):
            assert self.process.poll() is None, self.log[-4000:]
            assert time.monotonic() < deadline, self.log[-4000:]
            time.sleep(0.05)
        return result

    def get(self, path: str) -> Any:
        with urllib.request.urlopen(self.address + path) as answer:
            content = answer.read()
        return json.loads(content) if content[:1] in (b"{", b"[") else content.decode("utf-8")

    def post(self, path: str, content: dict[str, Any]) -> dict[str, Any]:
        request = urllib.request.Request(
            self.address + path, json.dumps(content).encode(), {"Content-Type": "application/json"}
        )
        try:
            with urllib.request.urlopen(request) as answer:
                text = answer.read()
        except urllib.error.HTTPError as error:
            text = error.read()
        return json.loads(text) if text else {}

    def queue(self, graph: dict[str, Any], workflow: dict[str, Any] | None = None) -> str:
        """Queue a graph, with the canvas that the front end would send along."""
        more = {} if workflow is None else {"extra_pnginfo": {"workflow": workflow}}
        answer = self.post("/prompt", {"prompt": graph, "extra_data": more})
        assert "prompt_id" in answer, answer
        return answer["prompt_id"]

    def outcome(self, prompt_id: str, seconds: float = 1800) -> Outcome:
        """Wait for the end of a queued graph."""
        entry = self.wait_for(lambda: self.get(f"/history/{prompt_id}").get(prompt_id), seconds)
        messages = dict(entry["status"]["messages"])
        ended = [k for k in messages if k in ("execution_success", "execution_error",
                                              "execution_interrupted")]  # fmt: skip
        return Outcome(ended[-1].removeprefix("execution_"), messages, entry["outputs"])

    def run(
        self,
        graph: dict[str, Any],
        seconds: float = 1800,
        workflow: dict[str, Any] | None = None,
    ) -> Outcome:
        return self.outcome(self.queue(graph, workflow), seconds)

    def free(self) -> None:
        """Let ComfyUI drop its models and its cache."""
        self.post("/free", {"unload_models": True, "free_memory": True})
        time.sleep(5)  # its worker thread wakes up and does it

    def stop(self) -> None:
        self.process.terminate()
        self.process.wait(60)


def workflow(name: str, changes: dict[str, dict[str, Any]] | None = None) -> dict[str, Any]:
    """A shipped workflow in the API's layout, with other widget values by kind of node."""
    path = ROOT / "workflows" / "api" / f"{name}.json"
    graph = json.loads(path.read_text("utf-8"))
    for node in graph.values():
        new = (changes or {}).get(node["class_type"], {})
        assert set(new) <= set(node["inputs"]), (node["class_type"], new)
        node["inputs"] |= new
    return graph


def number_of(graph: dict[str, Any], kind: str) -> str:
    """The number of the first node of a kind."""
    return next(number for number, node in graph.items() if node["class_type"] == kind)
