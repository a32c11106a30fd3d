"""The models that the papers adapt, in their own classes: initialised, trained, saved, loaded."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file

from cntlora_core import collect_moments, find_attachment_points, save_converted
from cntlora_core.adapter.record import record_of
from cntlora_core.lava import LavaConfig, get_lava_model
from cntlora_core.methods import METHODS, initialize_adapter

from . import true_classes as true

STEPS = 10
LAVA = "lava"  # a kind of adapter of its own, not in the registry
RUNNABLE = [
    name
    for name in METHODS
    if name != "bitfit"  # not all of these models have biases
    and (name != "loftq" or find_spec("bitsandbytes"))
]
WITH_LAVA = ("roberta", "gemma2", "sam", "depth_anything")
Case = tuple[str, str]
"""A class and a method."""


def cases() -> list[Any]:
    """All classes by two methods, LAVA on its paper's; the rest is thorough."""
    found = []
    for name in true.TRUE_CLASSES:
        for method in (*RUNNABLE, LAVA):
            quick = method in ("cross", "lora") or (method == LAVA and name in WITH_LAVA)
            marks = () if quick else pytest.mark.thorough
            found.append(pytest.param((name, method), id=f"{name}-{method}", marks=marks))
    return found


def config_of(name: str, method: str) -> LoraConfig | LavaConfig:
    asked = true.TRUE_CLASSES[name]
    alpha = 2 * asked.rank
    # VeRA in peft cannot merge beside a saved module that has no weight of its own.
    saved = None if method == "vera" else asked.saved
    targets = asked.linear if asked.linear and method in ("lora_ga", "vera") else asked.targets
    kind, alpha_name = (LavaConfig, "lava_alpha") if method == LAVA else (LoraConfig, "lora_alpha")
    return kind(r=asked.rank, target_modules=targets, modules_to_save=saved, **{alpha_name: alpha})


def given(model: torch.nn.Module, batch: true.Batch) -> torch.Tensor:
    model.eval()
    with torch.no_grad():
        return true.output(model, batch)


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())


@dataclass(frozen=True)
class Trained:
    """What a training leaves: how many layers a plan adapts, of how many, and the output."""

    adapted: int | None
    points: int
    output: torch.Tensor


def initialise(case: Case) -> tuple[torch.nn.Module, Any, Callable[..., None], Callable[..., None]]:
    """A model, its plan, what is due after a step, and what saves it for the stock base."""
    name, method = case
    model, batches = true.TRUE_CLASSES[name].model(), true.TRUE_CLASSES[name].batches()
    config = config_of(*case)
    if isinstance(config, LavaConfig):
        wrapped = get_lava_model(model, config, None, batches)
        plan = record_of(wrapped, "default").plan
        return wrapped, plan, lambda step: None, lambda folder: save_converted(wrapped, folder)
    initialized = initialize_adapter(model, config, method, batches, loss_fn=true.loss, steps=STEPS)
    plan, after_step = initialized.plan, initialized.after_step
    return initialized.model, plan, after_step, initialized.save_pretrained


def train(case: Case, folder: Path) -> Trained:
    """Initialise, train for two steps, and save."""
    name, method = case
    batches = true.TRUE_CLASSES[name].batches()
    base = true.TRUE_CLASSES[name].model()
    points = 0 if method == "full" else len(find_attachment_points(base, config_of(*case)))
    stock = given(base, batches[0])
    model, plan, after_step, save = initialise(case)
    first = given(model, batches[0])
    assert (distance(first, stock) < 1e-4) == (method == LAVA or METHODS[method].preserves_output)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=0.02, weight_decay=0.0)
    for step in (1, 2):
        loss = true.loss(model.train(), batches[step])
        assert loss.isfinite()
        loss.backward()
        optimizer.step()
        after_step(step)
        optimizer.zero_grad()
    after = given(model, batches[0])
    assert distance(after, first) > 3e-4
    if method not in ("full", "loftq"):
        save(folder / "for the stock base")
        model.save_pretrained(str(folder / "as trained"))
    return Trained(None if plan is None else len(plan.factors), points, after)


class Trainings:
    """Trainings that are done once; what they save lies in one folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._done: dict[Case, Trained] = {}

    def __call__(self, case: Case) -> Trained:
        if case not in self._done:
            self._done[case] = train(case, self.folder / " ".join(case))
        return self._done[case]


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Trainings:
    return Trainings(tmp_path_factory.mktemp("true classes"))


@pytest.fixture(scope="module")
def loaded(trained, request) -> Path:
    """What one fresh process makes of all that the selected tests have saved."""
    for item in request.session.items:
        params = item.callspec.params if hasattr(item, "callspec") else {}
        if item.path == request.path and "case" in params:
            try:
                trained(params["case"])
            except Exception:  # the tests of that case say so
                continue
    subprocess.run([sys.executable, true.__file__, str(trained.folder)], check=True, timeout=600)
    return trained.folder


@pytest.mark.parametrize("name", true.TRUE_CLASSES)
def test_the_named_layers_are_found_and_what_they_share_is_read_once(name):
    asked = true.TRUE_CLASSES[name]
    model = asked.model()
    points = find_attachment_points(model, config_of(name, "cross"))
    moments = collect_moments(model, points, asked.batches())
    assert (len(points), len(moments.moments)) == (asked.points, asked.inputs)
    assert {moment.count for moment in moments.moments} == asked.rows


@pytest.mark.parametrize("case", cases())
def test_a_class_is_initialised_trained_and_saved(case, trained):
    done = trained(case)
    assert done.adapted in (None, done.points) or (case[1] == "eva" and done.adapted < done.points)


@pytest.mark.parametrize("case", [c for c in cases() if c.values[0][1] not in ("full", "loftq")])
@pytest.mark.thorough
def test_a_fresh_process_loads_and_merges_what_was_saved(case, trained, loaded):
    expected = trained(case).output
    folder = loaded / " ".join(case)
    assert not (error := folder / "error.txt").exists(), error.read_text()
    found = load_file(folder / "found.safetensors")
    distances = {name: distance(x, expected) for name, x in found.items()}
    assert distances.keys() == {"loaded", "merged", "again"}
    # CorDA's factors are large where its data has hardly anything, and are rounded as such.
    assert max(distances.values()) < (1e-3 if "corda" in case[1] else 1e-4), distances
