"""The workflows in ComfyUI's real front end, in a headless Chromium.

Needs a ComfyUI checkout (COMFYUI_PATH), an environment that runs it (COMFYUI_PYTHON, else this one)
and Chromium. A minute or two.
"""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from .server import COMFYUI_PATH, COMFYUI_PYTHON, ROOT, Server

BROWSER = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), ""
)
WORKFLOWS = [path.stem for path in sorted((ROOT / "workflows").glob("*.json"))]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(3600),
    pytest.mark.skipif(not COMFYUI_PATH, reason="COMFYUI_PATH does not name a ComfyUI checkout"),
    pytest.mark.skipif(not BROWSER, reason="there is no Chromium"),
]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server(tmp_path_factory.mktemp("front end") / "base")
    yield server
    server.stop()


def browse(server: Server, workflows: list[str], runs: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """What the browser sees of each workflow; the pictures are beside the report."""
    folder = server.base.parent
    job = {
        "browser": BROWSER,
        "address": server.address,
        "pack": server.pack_name,
        "workflows": workflows,
        "runs": runs,
        "pictures": str(folder),
        "report": str(folder / "report.json"),
    }
    (folder / "job.json").write_text(json.dumps(job))
    script = Path(__file__).with_name("open_in_browser.py")
    subprocess.run([COMFYUI_PYTHON, str(script), str(folder / "job.json")], check=True)
    report = json.loads((folder / "report.json").read_text("utf-8"))
    return {name: {**found, "picture": folder / f"{name}.jpg"} for name, found in report.items()}


@pytest.fixture(scope="module")
def seen(server: Server) -> dict[str, dict[str, Any]]:
    """All workflows as they are opened."""
    return browse(server, WORKFLOWS, {})


@pytest.mark.parametrize("name", WORKFLOWS)
def test_a_workflow_opens_without_missing_or_red_nodes(
    seen: dict[str, dict[str, Any]], name: str
) -> None:
    canvas = json.loads((ROOT / "workflows" / f"{name}.json").read_text("utf-8"))
    found = seen[name]
    assert {node["id"]: node["type"] for node in found["nodes"]} == {
        node["id"]: node["type"] for node in canvas["nodes"]
    }
    assert not [node["type"] for node in found["nodes"] if not node["known"] or node["red"]]
    assert found["dialogs"] == []
    assert not [line for line in found["console"] if "cntlora" in line.lower()]
    with Image.open(found["picture"]) as picture:
        assert picture.width == 1200


@pytest.mark.parametrize("name", WORKFLOWS)
def test_run_would_post_what_the_api_file_holds(seen: dict[str, dict[str, Any]], name: str) -> None:
    api = json.loads((ROOT / "workflows" / "api" / f"{name}.json").read_text("utf-8"))
    posted = seen[name]["prompt"]
    assert {number: node["inputs"] for number, node in posted.items()} == {
        number: node["inputs"] for number, node in api.items()
    }


@pytest.mark.parametrize("name", WORKFLOWS)
def test_the_template_browser_has_a_picture_of_it(name: str) -> None:
    with Image.open(ROOT / "workflows" / f"{name}.jpg") as picture:
        assert picture.width == 1200


def test_after_a_run_each_node_shows_its_result_and_no_live_preview(server: Server) -> None:
    name = "personalise_small_model"
    few = {
        "CNTLoRAClassImages": {"count": 3, "steps": 2},
        "CNTLoRAInitialize": {"passes": 1},
        "CNTLoRATrain": {"steps": 4, "preview_every": 2, "preview_steps": 2},
        "CNTLoRACompare": {"steps": 2},
    }
    found = browse(server, [name], {name: few})[name]
    shown = {node["type"]: node["shown"] for node in found["nodes"]}
    outputs = list(server.get("/history").values())[-1]["outputs"]
    for node in found["nodes"]:
        if node["type"] in ("CNTLoRAClassImages", "CNTLoRATrain", "CNTLoRACompare"):
            names = [image["filename"] for image in outputs[str(node["id"])]["images"]]
            sources = shown[node["type"]]
            assert len(sources) == len(names), node["type"]
            for source, file in zip(sources, names, strict=True):
                assert f"filename={file}" in source, node["type"]
