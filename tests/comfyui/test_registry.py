"""What ComfyUI's registry would publish: whole, within its rules, and as its linter wants it."""

from __future__ import annotations

import ast
import fnmatch
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from .conftest import ROOT

try:
    import tomllib  # pyright: ignore[reportMissingImports]
except ImportError:  # Python 3.10
    tomllib = pytest.importorskip("tomli")

FORBIDDEN_MODULES = {
    "subprocess", "urllib", "requests", "httpx", "aiohttp", "socket", "http", "pip", "pickle",
    "huggingface_hub", "multiprocessing", "ctypes",
}  # fmt: skip
# ComfyUI's own, and what the requirements themselves ask for.
BROUGHT_ALONG = {
    "torch", "comfy", "comfy_api", "comfy_execution", "comfy_extras", "folder_paths", "server",
    "huggingface_hub", "packaging", "typing_extensions",
}  # fmt: skip
FORBIDDEN_CALLS = {"eval", "exec", "compile", "__import__", "system", "popen"}


def ignored(name: str) -> bool:
    """Whether .comfyignore leaves a file out, by git's rules as far as it uses them."""
    out = False
    for line in (ROOT / ".comfyignore").read_text("utf-8").splitlines():
        if not line or line.startswith("#"):
            continue
        pattern, again = line.removeprefix("!"), line.startswith("!")
        folder = pattern.endswith("/") and name.startswith(pattern)
        if folder or (fnmatch.fnmatch(name, pattern) and name.count("/") == pattern.count("/")):
            out = not again
    return out


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what git holds, or would, without what .comfyignore leaves out."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode:
        pytest.skip("this is no git checkout")
    folder = tmp_path_factory.mktemp("published") / "cntlora"
    for name in listed.stdout.splitlines():
        if (ROOT / name).is_file() and not ignored(name):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    return folder


def imports(path: Path) -> set[str]:
    """Names of the modules that a file imports anywhere."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def test_it_is_whole(published: Path) -> None:
    for name in (
        "__init__.py", "nodes/entry.py", "requirements.txt", "README.md", "LICENSE",
        "web/advanced.js", "web/results.js", "web/docs/CNTLoRATrain.md",
        "cntlora_core/mini/__init__.py",
        "cntlora_core/mini/model/unet/diffusion_pytorch_model.safetensors",
        "cntlora_core/diffusion/sd15/tokenizer/merges.txt", "workflows/personalise_sd15.json",
        "workflows/personalise_sd15.jpg", "docs/comfyui.md", "subgraphs/Subject LoRA.json",
    ):  # fmt: skip
        assert (published / name).is_file(), name
    for name in (
        "tests",
        ".ci",
        "workflows/api",
        "workflows/build.py",
        "cntlora_core/cli.py",
        "cntlora_core/benchmark",
    ):
        assert not (published / name).exists(), name
    modules = {
        ".".join(path.relative_to(published).with_suffix("").parts)
        for path in published.rglob("*.py")
    }
    modules |= {name.removesuffix(".__init__") for name in modules}
    for path in published.rglob("*.py"):
        for name in imports(path):
            if name.startswith("cntlora_core."):
                assert {name, name.rpartition(".")[0]} & modules, (path, name)


def test_what_the_nodes_import_is_among_the_requirements(published: Path) -> None:
    """What comes along with ComfyUI or is in requirements.txt, within functions too."""
    lines = (published / "requirements.txt").read_text("utf-8").split()
    known = {re.split("[<>=]", line)[0].lower() for line in lines} | BROUGHT_ALONG
    waiting = [*(published / "nodes").glob("*.py"), published / "cntlora_core" / "__init__.py"]
    seen, others = set(), {}
    while waiting:
        if (path := waiting.pop()) in seen:
            continue
        seen.add(path)
        for name in imports(path):
            root, inner = name.partition(".")[0], published / name.replace(".", "/")
            if root == "cntlora_core":
                waiting += filter(Path.is_file, (inner.with_suffix(".py"), inner / "__init__.py"))
            elif root not in sys.stdlib_module_names:
                others[root.replace("PIL", "pillow").lower()] = path
    known |= {
        "pillow_heif",
        "prodigyopt",
        "bitsandbytes",
    }  # asked for in words where they are missing
    assert not {name: path for name, path in others.items() if name not in known}
    assert len(seen) > 50


def test_node_code_starts_no_program_and_opens_no_connection(published: Path) -> None:
    for path in [published / "__init__.py", *(published / "nodes").glob("*.py")]:
        roots = {name.partition(".")[0] for name in imports(path)}
        assert not roots & FORBIDDEN_MODULES, path
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Call):
                called = getattr(node.func, "id", getattr(node.func, "attr", ""))
                assert called not in FORBIDDEN_CALLS, (path, node.lineno)
    for path in (published / "cntlora_core").rglob("*.py"):
        assert not imports(path) & {"subprocess", "multiprocessing", "pickle", "pip"}, path


def test_what_the_registry_asks_for_is_said(published: Path) -> None:
    project: dict[str, Any] = tomllib.loads((published / "pyproject.toml").read_text("utf-8"))
    name = project["project"]["name"]
    assert re.fullmatch(r"[a-z](-?[a-z0-9]+)*", name)
    assert "comfyui" not in name
    assert re.fullmatch(r"\d+\.\d+\.\d+", project["project"]["version"])
    comfy = project["tool"]["comfy"]
    assert comfy["PublisherId"]
    assert "comfyui" not in comfy["DisplayName"].lower()
    assert comfy["requires-comfyui"] == ">=0.8.0"
    with Image.open(published / comfy["Icon"]) as icon:
        assert icon.width == icon.height <= 400


def test_comfy_test_is_told_of_workflows_that_are_there() -> None:
    settings = tomllib.loads((ROOT / "comfy-test.toml").read_text("utf-8"))["test"]
    for name in settings["workflows"]["cpu"]:
        graph = json.loads((ROOT / "workflows" / name).read_text("utf-8"))
        kinds = {node["type"] for node in graph["nodes"]}
        assert "CheckpointLoaderSimple" not in kinds, name


def test_comfy_test_s_static_levels_pass(published: Path, capsys: Any) -> None:
    pytest.importorskip("comfy_test", reason="pip install comfy-test")
    pytest.importorskip("tree_sitter_javascript")
    from argparse import Namespace

    from comfy_test.cli.lint import cmd_lint  # pyright: ignore[reportMissingImports]

    assert cmd_lint(Namespace(path=str(published), check="all", json=False, strict=True)) == 0, (
        capsys.readouterr().out
    )
