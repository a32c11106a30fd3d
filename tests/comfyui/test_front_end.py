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
import torch
from PIL import Image
from safetensors.torch import save_file

from .server import COMFYUI_PATH, COMFYUI_PYTHON, ROOT, Server
from .test_initialization_options import BEFORE

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


def browse(
    server: Server,
    workflows: list[str],
    runs: dict[str, Any],
    files: dict[str, Path] | None = None,
) -> dict[str, dict[str, Any]]:
    """What the browser sees of each workflow; the pictures are beside the report."""
    folder = server.base.parent
    job = {
        "browser": BROWSER,
        "address": server.address,
        "pack": server.pack_name,
        "workflows": workflows,
        "runs": runs,
        "files": {name: str(path) for name, path in (files or {}).items()},
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


def test_the_subgraph_is_among_the_nodes(seen: dict[str, dict[str, Any]]) -> None:
    found = seen["subject_lora_sd15"]
    assert found["subgraphs"] == ["Subject LoRA"]
    assert not [line for line in found["console"] if "blueprint" in line.lower()]


def test_a_graph_that_was_saved_before_opens_and_posts_its_values(server: Server) -> None:
    path = Path(__file__).parent / "saved" / "personalise_sd15.json"
    canvas = json.loads(path.read_text("utf-8"))
    node = next(node for node in canvas["nodes"] if node["type"] == "CNTLoRAInitialize")
    node["widgets_values"][BEFORE.index("rank_budget")] = "fixed"
    node["widgets_values"][BEFORE.index("passes")] = 3
    changed = server.base.parent / "saved.json"
    changed.write_text(json.dumps(canvas), "utf-8")
    found = browse(server, [], {}, {"saved": changed})["saved"]
    assert len(found["nodes"]) == len(canvas["nodes"])
    assert not [node["type"] for node in found["nodes"] if not node["known"] or node["red"]]
    posted = found["prompt"][str(node["id"])]["inputs"]
    assert [posted[name] for name in BEFORE] == node["widgets_values"]


def test_a_lora_that_is_dropped_opens_as_its_workflow(server: Server) -> None:
    name = "use_a_saved_lora"
    header = {
        key: (ROOT / "workflows" / folder / f"{name}.json").read_text("utf-8")
        for key, folder in (("workflow", ""), ("prompt", "api"))
    }
    path = server.base.parent / "rex.safetensors"
    save_file({"lora": torch.zeros(2)}, path, header)
    found = browse(server, [], {}, {"rex": path})["rex"]
    assert [node["type"] for node in found["nodes"]] == [
        node["type"] for node in json.loads(header["workflow"])["nodes"]
    ]


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
