"""What `pip install` brings: the product, without the measurements and the making of the model."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from setuptools import Distribution

ROOT = Path(__file__).parent.parent
AS_INSTALLED = """
import sys  # without the way back to the checkout that an editable installation makes
sys.meta_path = [finder for finder in sys.meta_path if "__editable__" not in finder.__module__]
from cntlora_core.cli import main
sys.exit(main(sys.argv[1:]))
"""
RESEARCH = ("cntlora_core/benchmark", "cntlora_core/mini/making")


@contextmanager
def chdir(folder: Path) -> Iterator[None]:
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


@pytest.fixture(scope="module")
def packaged(tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    """Names of the files that a wheel would hold, as setuptools itself lists them."""
    distribution = Distribution({"script_name": "setup.py"})
    with chdir(ROOT), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the licence's form, which older setuptools need
        distribution.parse_config_files()
        distribution.get_command_obj("egg_info").egg_base = str(tmp_path_factory.mktemp("egg"))
        build: Any = distribution.get_command_obj("build_py")
        build.ensure_finalized()
        names = build.get_outputs(include_bytecode=False)
    return {Path(name).relative_to(build.build_lib).as_posix() for name in names}


def test_the_wheel_brings_the_product_and_not_the_research(packaged: set[str]) -> None:
    for name in (
        "cntlora_core/py.typed",
        "cntlora_core/cli.py",
        "cntlora_core/commands/train.py",
        "cntlora_core/mini/model/unet/diffusion_pytorch_model.safetensors",
        "cntlora_core/mini/encoders/clip/merges.txt",
        "cntlora_core/mini/subjects/subjects.json",
        "cntlora_core/diffusion/sd15/tokenizer/merges.txt",
    ):
        assert name in packaged, name
    assert any(name.startswith("cntlora_core/mini/subjects/penguin/") for name in packaged)
    assert not [name for name in packaged if name.startswith(RESEARCH)]
    modules = {path.relative_to(ROOT).as_posix() for path in (ROOT / "cntlora_core").rglob("*.py")}
    assert {name for name in modules if not name.startswith(RESEARCH)} == {
        name for name in packaged if name.endswith(".py")
    }


def test_nothing_in_the_wheel_needs_the_research(packaged: set[str]) -> None:
    users = set()
    for name in packaged:
        if name.endswith(".py"):
            for node in ast.walk(ast.parse((ROOT / name).read_text("utf-8"))):
                found = []
                if isinstance(node, ast.ImportFrom):
                    found = [f"{node.module}.{alias.name}" for alias in node.names]
                elif isinstance(node, ast.Import):
                    found = [alias.name for alias in node.names]
                if any(module.replace(".", "/").startswith(RESEARCH) for module in found):
                    users.add(name)
    # One says so without it, the other leaves a column out.
    assert users == {"cntlora_core/commands/bench.py", "cntlora_core/commands/demo.py"}


def test_bench_says_where_it_can_be_run(packaged: set[str], tmp_path: Path) -> None:
    for name in packaged:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).symlink_to(ROOT / name)

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", AS_INSTALLED, *arguments]
        environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
        return subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
        )

    said = run("bench", "init", "--quick")
    assert said.returncode == 2
    assert "in a checkout of the repository" in " ".join(said.stderr.split())
    assert not said.stdout
    listed = run("--help")
    assert listed.returncode == 0
    assert "train" in listed.stdout
    assert "bench" not in listed.stdout


def test_help_is_quick_because_torch_is_not_loaded() -> None:
    code = "import sys, cntlora_core.cli; print(sorted({'torch', 'diffusers'} & set(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"
