"""The nodes in a real ComfyUI server, on the embedded small model.

Needs a ComfyUI checkout (COMFYUI_PATH) and an environment that runs it with this pack's
requirements (COMFYUI_PYTHON, else this one). Minutes on two cores.
"""

from __future__ import annotations

import json
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from .server import COMFYUI_PATH, ROOT, Server, number_of, workflow
from .test_pack import NODE_IDS

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(3600),
    pytest.mark.skipif(not COMFYUI_PATH, reason="COMFYUI_PATH does not name a ComfyUI checkout"),
]

FEW = {
    "CNTLoRAClassImages": {"count": 3, "steps": 2},
    "CNTLoRAInitialize": {"passes": 1},
    "CNTLoRATrain": {"steps": 4, "preview_every": 2, "preview_steps": 2},
    "CNTLoRACompare": {"steps": 2},
    "CNTLoRASample": {"steps": 2, "per_prompt": 1},
}


def few(**more: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The changes that make a workflow quick, and some more."""
    return {kind: {**FEW.get(kind, {}), **more.get(kind, {})} for kind in {*FEW, *more}}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server(tmp_path_factory.mktemp("comfyui base"))
    yield server
    server.stop()


@pytest.fixture
def photos(server: Server, tmp_path: Path) -> str:
    """A folder in ComfyUI's input directory."""
    folder = server.base / "input" / f"photos of {tmp_path.name}"
    folder.mkdir()
    for i in range(2):
        Image.new("RGB", (64, 64), (90 * i, 120, 30)).save(folder / f"{i}.png")
    return folder.name


def runs_of(server: Server, name: str) -> list[Path]:
    return sorted((server.base / "output" / "cntlora").glob(f"{name}-*"))


def nothing_half_written(server: Server) -> bool:
    return not [path for path in server.base.rglob("*.tmp") if path.is_file()]


def test_the_pack_loads_without_a_warning(server: Server) -> None:
    lines = [line for line in server.log.splitlines() if server.pack_name in line]
    assert len(lines) == 1  # the import time
    assert "FAILED" not in lines[0]
    assert "CNTLoRA" not in server.log
    info = server.get("/object_info")
    ours = {name: node for name, node in info.items() if name.startswith("CNTLoRA")}
    assert len(ours) == len(NODE_IDS)
    for node in ours.values():
        for group in ("required", "optional"):
            for name, (_, options) in node["input"].get(group, {}).items():
                assert options.get("tooltip"), name


def test_pages_and_templates_are_served(server: Server) -> None:
    assert set(server.get("/workflow_templates")[server.pack_name]) == {
        path.stem for path in (ROOT / "workflows").glob("*.json")
    }
    for path in (ROOT / "web" / "docs").glob("*.md"):
        page = server.get(f"/extensions/{server.pack_name}/docs/{path.name}")
        assert page == path.read_text("utf-8")
    template = server.get(f"/api/workflow_templates/{server.pack_name}/personalise_sd15.json")
    assert template["nodes"]


def test_the_workflows_are_what_their_script_writes(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    import runpy

    monkeypatch.syspath_prepend(ROOT / "workflows")
    build = runpy.run_path(str(ROOT / "workflows" / "build.py"))
    info = server.get("/object_info")
    for name, graph in build["GRAPHS"].items():
        canvas = json.loads((ROOT / "workflows" / f"{name}.json").read_text("utf-8"))
        api = json.loads((ROOT / "workflows" / "api" / f"{name}.json").read_text("utf-8"))
        # Files that only this server has are no choice of ours.
        assert build["canvas_layout"](name, graph(), info) == canvas
        assert build["api_layout"](graph(), info) == api
    for path, content in build["blueprints"](info).items():
        assert json.loads(path.read_text("utf-8")) == content


def test_the_subgraph_is_offered(server: Server) -> None:
    (number, entry), *more = server.get("/global_subgraphs").items()
    assert not more
    assert entry["name"] == "Subject LoRA"
    assert entry["info"]["node_pack"] == f"custom_nodes.{server.pack_name}"
    data = server.get(f"/global_subgraphs/{number}")["data"]
    assert data == (ROOT / "subgraphs" / "Subject LoRA.json").read_text("utf-8")


def folder_index(server: Server) -> int:
    """The place of output/loras among the folders of LoRAs, as the model browser counts them."""
    folders = next(f for f in server.get("/experiment/models") if f["name"] == "loras")["folders"]
    return folders.index(str(server.base / "output" / "loras"))


def test_personalising_the_small_model_ends_well_and_is_cached(server: Server) -> None:
    graph = workflow("personalise_small_model", few())
    canvas = json.loads((ROOT / "workflows" / "personalise_small_model.json").read_text("utf-8"))
    first = server.run(graph, workflow=canvas)
    assert first.status == "success", first.messages
    assert first.cached == set()
    for kind in ("CNTLoRATrain", "CNTLoRACompare", "CNTLoRAEvaluate"):
        assert first.outputs[number_of(graph, kind)]["images"]
    saved = server.base / "output" / "loras" / "small_penguin_00001_.safetensors"
    with safe_open(saved, framework="pt") as file:
        header = file.metadata()
    assert json.loads(header["workflow"]) == canvas
    assert json.loads(header["prompt"]).keys() == graph.keys()
    preview = f"/experiment/models/preview/loras/{folder_index(server)}/{saved.name}"
    with urllib.request.urlopen(server.address + preview) as answer:
        assert answer.headers["Content-Type"] == "image/webp"
    again = server.run(graph)
    assert again.status == "success"
    assert again.cached == set(graph)


def test_comparing_initializations_ends_well(server: Server) -> None:
    outcome = server.run(workflow("compare_initializations", few()))
    assert outcome.status == "success", outcome.messages
    for method in ("lora", "self", "cross"):
        assert len(runs_of(server, f"sks-clock-{method}")) == 1


def test_lava_in_place_of_lora_ends_well(server: Server) -> None:
    changes = few(
        CNTLoRAInitialize={"adapter": "lava", "rank": 4}, CNTLoRATrain={"name": "by lava"}
    )
    outcome = server.run(workflow("personalise_small_model", changes))
    assert outcome.status == "success", outcome.messages
    (run,) = runs_of(server, "by_lava")
    assert any(".lora_mid." in name for name in load_file(run / "by_lava.safetensors"))


def test_stock_nodes_take_the_lora_and_the_loss(server: Server) -> None:
    graph = workflow("personalise_small_model", few())
    train = number_of(graph, "CNTLoRATrain")
    graph["90"] = {"class_type": "SaveLoRA", "inputs": {"lora": [train, 0], "prefix": "loras/own"}}
    graph["91"] = {
        "class_type": "LossGraphNode",
        "inputs": {"loss": [train, 1], "filename_prefix": "loss"},
    }
    assert server.run(graph).status == "success"
    stock = next((server.base / "output" / "loras").glob("own_*.safetensors"))
    ours = server.base / "output" / "loras" / "small_penguin_00001_.safetensors"
    assert_same(load_file(stock), load_file(ours))


def assert_same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_a_changed_photo_trains_again_and_nothing_else_does(server: Server, photos: str) -> None:
    changes = few(CNTLoRASubject={"folder": photos}, CNTLoRATrain={"name": "changed"})
    graph = workflow("personalise_small_model", changes)
    assert server.run(graph).status == "success"
    Image.new("RGB", (64, 64), "red").save(server.base / "input" / photos / "0.png")
    again = server.run(graph)
    assert again.status == "success"
    assert number_of(graph, "CNTLoRALoadModel") in again.cached
    for kind in ("CNTLoRASubject", "CNTLoRAInitialize", "CNTLoRATrain", "CNTLoRACompare"):
        assert number_of(graph, kind) not in again.cached
    assert len(runs_of(server, "changed")) == 2


def test_two_runs_give_the_same_lora_for_the_same_seed(server: Server) -> None:
    loras = []
    for name in ("twin_a", "twin_b"):
        anew = {"name": name, "training_seed": 7, "trained_before": "train anew"}
        graph = workflow("personalise_small_model", few(CNTLoRATrain=anew))
        assert server.run(graph).status == "success"
        loras.append(load_file(runs_of(server, "twin_a")[0] / f"{name}.safetensors"))
    assert_same(*loras)


MANY = "many photos"

CANCELLED_IN = {
    "encoding photos": {"CNTLoRASubject": {"folder": MANY}},
    "generating class images": {
        "CNTLoRAClassImages": {"count": 500, "steps": 30, "images_seed": 1}
    },
    "reading activations": {"CNTLoRAInitialize": {"passes": 500, "start_seed": 1}},
    "training": {"CNTLoRATrain": {"steps": 5000, "training_seed": 8, "preview_every": 0}},
}


@pytest.mark.parametrize("stage", CANCELLED_IN)
def test_cancelling_frees_the_queue_and_leaves_nothing_half_written(
    server: Server, stage: str
) -> None:
    folder = server.base / "input" / MANY
    folder.mkdir(exist_ok=True)
    for i in range(0 if any(folder.iterdir()) else 600):
        Image.effect_noise((64, 64), 80 + i / 10).convert("RGB").save(folder / f"{i}.png")
    before = server.log.count(f"CNTLoRA: {stage}")
    prompt = server.queue(workflow("personalise_small_model", few(**CANCELLED_IN[stage])))
    server.wait_for(lambda: server.log.count(f"CNTLoRA: {stage}") > before, 900)
    if stage != "encoding photos":  # which is quick
        time.sleep(2)
    started = time.monotonic()
    server.post("/interrupt", {})
    outcome = server.outcome(prompt, 300)
    print(f"{stage}: the queue is free after {time.monotonic() - started:.1f} s")
    assert outcome.status == "interrupted"
    queue = server.get("/queue")
    assert not queue["queue_running"]
    assert not queue["queue_pending"]
    assert nothing_half_written(server)


def test_a_cancelled_training_goes_on_when_it_is_queued_again(server: Server) -> None:
    steps = {"steps": 30, "name": "resumed", "preview_every": 0, "save_every": 1000}
    graph = workflow("personalise_small_model", few(CNTLoRATrain=steps | {"training_seed": 9}))
    before = server.log.count("CNTLoRA: training")
    prompt = server.queue(graph)
    server.wait_for(lambda: server.log.count("CNTLoRA: training") > before, 900)
    server.post("/interrupt", {})
    assert server.outcome(prompt).status == "interrupted"
    (folder,) = runs_of(server, "resumed")
    left = {path.name for path in folder.iterdir()} - {".lock"}
    assert left == {"photos.jpg", "state.safetensors"}
    again = server.run(graph)
    assert again.status == "success"
    record = json.loads((folder / "run.json").read_text("utf-8"))
    assert any("going on after step" in note for note in record["notes"])
    assert len(record["history"]) == 30


def test_a_new_name_trains_nothing_and_more_steps_go_on(server: Server) -> None:
    def notes_of(name: str, **widgets: Any) -> str:
        asked = {"training_seed": 10, "steps": 4, "preview_every": 0, "name": name, **widgets}
        asked["lr_schedule"] = "constant"  # cosine is another course for each number of steps
        graph = workflow("personalise_small_model", few(CNTLoRATrain=asked))
        assert server.run(graph).status == "success"
        (folder,) = runs_of(server, "named")
        assert (folder / f"{name}.safetensors").is_file()
        return "\n".join(json.loads((folder / "run.json").read_text("utf-8"))["notes"])

    assert "before" not in notes_of("named")
    assert "all 4 steps were done before" in notes_of("renamed")
    assert "all 4 steps were done before" in notes_of("exact", compress=False)
    assert "going on after step 4 of 6" in notes_of("longer", steps=6)


def test_memory_is_given_back(server: Server) -> None:
    def train(seed: int) -> int:
        graph = workflow("personalise_small_model", few(CNTLoRATrain={"training_seed": seed}))
        assert server.run(graph).status == "success"
        return server.settled_memory()

    train(21)  # libraries are imported, allocators warmed up
    before, after = train(22), train(23)
    print(f"resident memory: {before / 1e6:.0f} MB before, {after / 1e6:.0f} MB after")
    assert after < 1.1 * before


def test_any_folder_name_will_do_and_a_missing_package_is_one_line(tmp_path: Path) -> None:
    broken = tmp_path / "custom_nodes" / "broken copy"
    broken.mkdir(parents=True)
    for path in ("nodes", "cntlora_core", "web", "__init__.py"):
        (broken / path).symlink_to(ROOT / path)
    (broken / "requirements.txt").write_text("not-to-be-found>=2\n")
    server = Server(tmp_path, "My pack - 1.0 (copy)")
    try:
        info = server.get("/object_info")
        assert len([name for name in info if name.startswith("CNTLoRA")]) == len(NODE_IDS)
        assert "KSampler" in info
        (line,) = [line for line in server.log.splitlines() if "CNTLoRA" in line]
        assert "not-to-be-found>=2 (not installed)" in line
        assert "pip install -r" in line
        assert "Traceback" not in server.log
        assert "IMPORT FAILED" not in server.log
    finally:
        server.stop()


def sd2(server: Server) -> dict[str, Any]:
    path = server.base / "models" / "checkpoints" / "sd2.safetensors"
    save_file({"cond_stage_model.model.x": torch.zeros(1)}, path)
    return {"CNTLoRALoadModel": {"checkpoint": path.name}}


def no_photos(server: Server) -> dict[str, Any]:
    return {"CNTLoRASubject": {"folder": "(none)"}}


def rank_above_the_width(server: Server) -> dict[str, Any]:
    return {"CNTLoRAInitialize": {"rank": 1000}}


@pytest.mark.parametrize(
    ("spoil", "kind", "words"),
    [
        (sd2, "CNTLoRALoadModel", "Stable Diffusion 2.x"),
        (no_photos, "CNTLoRASubject", "there are no photos"),
        (rank_above_the_width, "CNTLoRAInitialize", "more than their widths hold"),
    ],
)
def test_bad_input_is_an_error_on_the_node_in_words(
    server: Server, spoil: Callable[[Server], dict[str, Any]], kind: str, words: str
) -> None:
    graph = workflow("personalise_small_model", few(**spoil(server)))
    answer = server.post("/prompt", {"prompt": graph})
    if answer.get("node_errors"):
        said = {n: str(node["errors"]) for n, node in answer["node_errors"].items()}
    else:
        outcome = server.outcome(answer["prompt_id"])
        assert outcome.status == "error"
        error = outcome.messages["execution_error"]
        said = {error["node_id"]: error["exception_message"]}
    assert words in said[number_of(graph, kind)]
    assert all("Traceback" not in text for text in said.values())
