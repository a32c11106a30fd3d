"""Opens workflows in ComfyUI's front end with a headless Chromium, and says what it sees there.

    python open_in_browser.py JOB.json

Runs in ComfyUI's environment, for aiohttp. The job names ``browser`` (a program), ``address`` (of
the server), ``pack``, ``workflows`` (names of its templates), ``files`` (paths of further ones by
name, opened as if they were dropped on the canvas), ``pictures`` (a folder for a JPEG of each
graph, as the template browser shows it), ``runs`` (workflows for which Run is pressed first, with
values of widgets by kind of node) and ``report`` (JSON to write: for each workflow its nodes, the
prompt that the front end makes of it, the subgraphs that it offers, and messages in the console).
"""

from __future__ import annotations

import asyncio
import base64
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import aiohttp

SECONDS = 240
SECONDS_OF_A_RUN = 7200
LEFT, TOP, RIGHT, BOTTOM = 90, 120, 40, 90  # for the front end's own bars
PICTURE_WIDTH = 1200
READY = """(() => {
  const graph = window.app?.graph;
  return !!graph && graph._nodes.length > 0 && !window.app.configuringGraph;
})()"""
# What is drawn red: a node of an unknown type, or one that was marked as wrong.
NODES = """(() => window.app.graph._nodes.map((node) => ({
  id: node.id,
  type: node.type,
  known: !!window.LiteGraph.registered_node_types[node.type],
  red: !!node.has_errors,
  widgets: (node.widgets ?? []).length,
  inputs: (node.inputs ?? []).map((input) => input.name),
  shown: (node.imgs ?? []).map((img) => img.src),
})))()"""
PROMPT = "window.app.graphToPrompt().then((prompt) => prompt.output)"
IDLE = "fetch('/prompt').then((r) => r.json()).then((r) => r.exec_info.queue_remaining === 0)"
DIALOGS = """[...document.querySelectorAll('.p-dialog')].map((dialog) => dialog.innerText)"""
SUBGRAPHS = """document.querySelector("#vue-app").__vue_app__.config.globalProperties.$pinia._s
  .get("subgraph").subgraphBlueprints.map((subgraph) => subgraph.display_name)"""
BOX = """(() => {
  const boxes = window.app.graph._nodes.map((node) => node.getBounding());
  const left = Math.min(...boxes.map((b) => b[0])), top = Math.min(...boxes.map((b) => b[1]));
  const right = Math.max(...boxes.map((b) => b[0] + b[2]));
  return [left, top, right - left, Math.max(...boxes.map((b) => b[1] + b[3])) - top];
})()"""
SET_WIDGETS = """(() => {
  const changes = %s;
  for (const node of window.app.graph._nodes) {
    for (const [name, value] of Object.entries(changes[node.type] ?? {})) {
      node.widgets.find((widget) => widget.name === name).value = value;
    }
  }
})()"""
OPEN = """(async () => {
  const bytes = Uint8Array.from(atob("%s"), (letter) => letter.charCodeAt(0));
  await window.app.handleFile(new File([bytes], "%s"));
})()"""
PLACE = """(() => {
  const canvas = window.app.canvas;
  canvas.ds.scale = 1;
  canvas.ds.offset = [%f, %f];
  canvas.setDirty(true, true);
})()"""
SETTINGS = {
    "Comfy.TutorialCompleted": True,  # a new user is shown the templates over the canvas
    "Comfy.Minimap.Visible": False,
    "Comfy.Release.Status": "skip",
}


class Page:
    """One tab, spoken to in the DevTools protocol."""

    def __init__(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        self._socket, self._number = socket, 0
        self.console: list[str] = []

    async def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        self._number += 1
        await self._socket.send_json({"id": self._number, "method": method, "params": parameters})
        while True:
            message = await self._socket.receive_json(timeout=SECONDS)
            if message.get("method") == "Runtime.exceptionThrown":
                details = message["params"]["exceptionDetails"]
                self.console.append(str(details.get("exception", details).get("description")))
            if message.get("method") == "Runtime.consoleAPICalled":
                told = message["params"]
                if told["type"] in ("error", "warning"):
                    words = [str(a.get("value", a.get("description"))) for a in told["args"]]
                    self.console.append(f"{told['type']}: {' '.join(words)}")
            if message.get("id") == self._number:
                assert "error" not in message, message
                return message["result"]

    async def evaluate(self, code: str) -> Any:
        answer = await self.call(
            "Runtime.evaluate", expression=code, awaitPromise=True, returnByValue=True
        )
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    async def until(self, code: str, seconds: float = SECONDS) -> None:
        deadline = time.monotonic() + seconds
        while not await self.evaluate(code):
            assert time.monotonic() < deadline, (code, self.console[-20:])
            await asyncio.sleep(0.5)


async def fit(page: Page) -> tuple[float, float]:
    """Make the window as large as the whole graph at its own size; the graph's width and height."""
    left, top, width, height = await page.evaluate(BOX)
    await page.call(
        "Emulation.setDeviceMetricsOverride",
        width=round(width) + LEFT + RIGHT,
        height=round(height) + TOP + BOTTOM,
        deviceScaleFactor=1,
        mobile=False,
    )
    await asyncio.sleep(1)
    await page.evaluate(PLACE % (LEFT + 10 - left, TOP + 10 - top))
    return width, height


async def photograph(page: Page, path: Path) -> None:
    """The whole graph at its own size, without the front end's bars."""
    width, height = await fit(page)
    await asyncio.sleep(3)
    clip = {"x": LEFT, "y": TOP - 10, "width": width + 20, "height": height + 30}
    picture = await page.call(
        "Page.captureScreenshot",
        format="jpeg",
        quality=82,
        clip={**clip, "scale": PICTURE_WIDTH / clip["width"]},
    )
    path.write_bytes(base64.b64decode(picture["data"]))


async def look(page: Page, job: dict[str, Any], name: str) -> dict[str, Any]:
    """Open one workflow from the template browser's address."""
    page.console.clear()
    await page.call("Page.navigate", url="about:blank")
    file = job["files"].get(name)
    query = "" if file else f"?{urlencode({'template': name, 'source': job['pack']})}"
    await page.call("Page.navigate", url=f"{job['address']}/{query}")
    await page.until(READY)
    if file:
        content = base64.b64encode(Path(file).read_bytes()).decode("ascii")
        await page.evaluate(OPEN % (content, Path(file).name))
    await asyncio.sleep(1)
    if name in job["runs"]:
        await fit(page)  # nodes out of sight load no pictures
        await page.evaluate(SET_WIDGETS % json.dumps(job["runs"][name]))
        await page.evaluate("window.app.queuePrompt(0)")
        await asyncio.sleep(5)
        await page.until(IDLE, SECONDS_OF_A_RUN)
        await asyncio.sleep(5)  # the last pictures are fetched
    await photograph(page, Path(job["pictures"]) / f"{name}.jpg")
    return {
        "nodes": await page.evaluate(NODES),
        "prompt": await page.evaluate(PROMPT),
        "dialogs": await page.evaluate(DIALOGS),
        "subgraphs": await page.evaluate(SUBGRAPHS),
        "console": list(page.console),
    }


async def debugger(session: aiohttp.ClientSession, profile: Path) -> str:
    """The address at which the browser's first tab can be spoken to."""
    port_file = profile / "DevToolsActivePort"
    deadline = time.monotonic() + SECONDS
    while True:
        assert time.monotonic() < deadline, "the browser did not start"
        await asyncio.sleep(0.2)
        if not port_file.exists() or len(lines := port_file.read_text().split()) < 2:
            continue
        async with session.get(f"http://127.0.0.1:{lines[0]}/json/list") as answer:
            for tab in await answer.json(content_type=None):
                if tab["type"] == "page":
                    return tab["webSocketDebuggerUrl"]


async def main(job: dict[str, Any]) -> None:
    async with aiohttp.ClientSession() as session:
        for setting, value in SETTINGS.items():
            address = f"{job['address']}/api/settings/{setting}"
            async with session.post(address, json=value) as answer:
                assert answer.ok, answer
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
            arguments = [
                job["browser"], "--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run",
                "--disable-dev-shm-usage", "--remote-debugging-port=0", f"--user-data-dir={folder}",
                "--window-size=1600,900", "about:blank",
            ]  # fmt: skip
            browser = subprocess.Popen(
                arguments, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
            )
            try:
                url = await debugger(session, Path(folder))
                async with session.ws_connect(url, max_msg_size=2**28) as socket:
                    page = Page(socket)
                    await page.call("Page.enable")
                    await page.call("Runtime.enable")
                    names = (*job["workflows"], *job["files"])
                    report = {name: await look(page, job, name) for name in names}
            finally:
                browser.terminate()
                browser.wait(60)
    Path(job["report"]).write_text(json.dumps(report), "utf-8")


if __name__ == "__main__":
    asyncio.run(main(json.loads(Path(sys.argv[1]).read_text("utf-8"))))
