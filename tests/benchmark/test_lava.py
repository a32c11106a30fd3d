"""The LAVA benchmark: its real code path at the smallest size, and what it makes of numbers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from cntlora_core.benchmark.lava import cost
from cntlora_core.benchmark.lava.dynamics import gradient_variance, shape_of, spectrum
from cntlora_core.benchmark.lava.experiments import against, at_best_learning_rates
from cntlora_core.benchmark.lava.finetuning import Task, accuracy, adapt
from cntlora_core.benchmark.lava.networks import adapted_modules, build_network
from cntlora_core.benchmark.lava.pictures import (
    SHAPES,
    draw_shapes,
    radius_table,
    target_pictures,
)
from cntlora_core.benchmark.lava.results import ResultFile
from cntlora_core.benchmark.lava.run import run_lava
from cntlora_core.benchmark.lava.settings import MODELS, LavaBenchmark
from cntlora_core.cli import main

TINY = LavaBenchmark(quick=True).effective()


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("style", ["flat", "sketch"])
def test_shapes_are_pictures_of_what_their_labels_say(style):
    pictures, labels = draw_shapes(40, 32, style, seeded())
    assert pictures.shape == (40, 3, 32, 32)
    assert pictures.abs().max() <= 1
    assert pictures.std((1, 2, 3)).min() > 0.05
    assert set(labels.tolist()) <= set(range(len(SHAPES)))
    again, same = draw_shapes(40, 32, style, seeded())
    assert torch.equal(pictures, again)
    assert torch.equal(labels, same)


def test_each_shape_has_a_form_of_its_own():
    table = radius_table()
    assert table.shape[0] == len(SHAPES)
    assert table.max() <= 1
    assert table.min() > 0.05
    # Whatever they are turned by, no two are alike.
    spectra = torch.fft.rfft(table).abs()[:, :20]
    gaps = torch.cdist(spectra, spectra) + torch.eye(len(SHAPES)) * 1e9
    assert gaps.min() > 1


def test_photographs_are_split_by_photograph(tmp_path: Path):
    for name, colour in (("a", (250, 10, 10)), ("b", (10, 10, 250))):
        (tmp_path / name).mkdir()
        for i in range(5):
            shown = (colour[0], 50 * i, colour[2])
            Image.new("RGB", (50, 40), shown).save(tmp_path / name / f"{i}.png")
    settings = LavaBenchmark(target="photos", photos=tmp_path, size=32, pictures=24)
    data = target_pictures(settings, seed=0)
    assert data.classes == 2

    def shown(part) -> set[tuple[int, int]]:
        """Class and photograph of each crop."""
        green = ((part[0][:, 1].mean((1, 2)) + 1) * 127.5 / 50).round().long()
        return set(zip(part[1].tolist(), green.tolist(), strict=True))

    parts = [shown(part) for part in (data.train, data.validation, data.test)]
    assert [len(part) for part in parts] == [6, 2, 2]
    assert len(set.union(*parts)) == 10
    again = target_pictures(settings, seed=1)
    assert shown(again.test) != parts[2]
    red = data.train[0][:, 0].mean((1, 2)) > 0
    assert torch.equal(red.long(), 1 - data.train[1])


@pytest.mark.parametrize("name", MODELS)
def test_networks_take_every_kind_of_adapter(name):
    torch.manual_seed(0)
    network = build_network(name, 5, 0.05)
    shapes = [conv.weight.shape for conv in adapted_modules(network).values()]
    x = torch.randn(2, 3, 32, 32)
    task = Task(name, network, TINY, {0: target_pictures(TINY, 0)})
    before = task.fresh(0).eval()(x)
    assert before.shape == (2, len(SHAPES))
    rank = TINY.rank
    for method, expected in (
        ("lora", sum(s[0] + s[1:].numel() for s in shapes) * rank),
        ("lava_term", sum(sum(s) for s in shapes) * rank),
        ("head", 0),
    ):
        adapted = adapt(task.fresh(0), method, TINY)
        assert adapted.counts()[0] == expected
        assert adapted.counts()[1] == sum(p.numel() for p in task.fresh(0).parameters())
        torch.testing.assert_close(adapted.network.eval()(x), before)
    wide = adapt(task.fresh(0), "lava_wide", TINY)
    flat = sum(s[0] + s[1:].numel() for s in shapes) * rank
    assert abs(wide.counts()[0] - flat) <= 0.5 * sum(sum(s) for s in shapes) + 1


def test_the_variance_is_that_of_the_mini_batches():
    torch.manual_seed(0)
    network = build_network("resnet18", 3, 0.05)
    adapted = adapt(network, "lava", TINY, init_weights=False)
    layers = [m for m in adapted.network.modules() if hasattr(m, "lava_V")]
    pictures = (torch.randn(12, 3, 32, 32), torch.arange(12) % 3)
    adapted.network.train()
    before = {n: b.clone() for n, b in adapted.network.named_buffers() if "running" in n}
    found = gradient_variance(adapted, pictures, 4, count=5)
    for name, buffer in adapted.network.named_buffers():
        if "running" in name:
            assert torch.equal(buffer, before[name])
    generator, gradients = seeded(99), []
    for _ in range(5):
        chosen = torch.randint(12, (4,), generator=generator)
        loss = torch.nn.functional.cross_entropy(
            adapted.network(pictures[0][chosen]), pictures[1][chosen]
        )
        found_now = torch.autograd.grad(loss, [layer.lava_V["default"] for layer in layers])
        gradients.append([g.double() for g in found_now])
    wanted = [
        float(torch.stack(own).var(0, correction=1).sum()) for own in zip(*gradients, strict=True)
    ]
    assert found["layers"] == pytest.approx(wanted, rel=1e-4)


def test_what_is_said_of_a_spectrum():
    values = spectrum(torch.diag(torch.tensor([4.0, 4.0, 2.0, 1e-4, 0.0])))
    assert values.tolist() == pytest.approx([1, 1, 0.5, 2.5e-5, 0])
    said = shape_of(values.tolist(), 5)
    assert said["flat"] == 3 / 5
    assert said["steepest"] == 3 / 5
    assert said["drop"] == pytest.approx(5e-5)
    assert said["condition"] == pytest.approx(4e4)
    level = shape_of([1.0] * 4, 4)
    assert level["effective"] == pytest.approx(1)


def test_the_learning_rate_is_chosen_by_other_pictures_than_it_is_tested_on():
    def run(seed, learning_rate, chosen_by, accuracy):
        more = {"last_loss": 0.0, "trained": 1, "share": 0.1, "rank": 4}
        return {"method": "a", "seed": seed, "rate": learning_rate, "chosen_by": chosen_by,
                "accuracy": accuracy, **more}  # fmt: skip

    runs = [run(0, 0.1, 0.9, 0.5), run(1, 0.1, 0.7, 0.7), run(0, 0.2, 0.7, 0.9)]
    runs.append(run(1, 0.2, 0.6, 0.9))
    (row,) = at_best_learning_rates(runs, ("method",))
    assert row["rate"] == 0.1
    assert row["accuracy"] == pytest.approx(0.6)
    assert row["spread"] == pytest.approx(0.2 / 2**0.5)


def test_gains_are_of_one_seed():
    found = {"lora": (0.5, 0.7, 0.6), "lava": (0.6, 0.7, 0.8)}
    more = {"model": "m", "rate": 1.0, "chosen_by": 1, "last_loss": 0, "trained": 1, "share": 1}
    runs = [
        {"method": method, "seed": seed, "accuracy": accuracy, "rank": 4, **more}
        for method, accuracies in found.items()
        for seed, accuracy in enumerate(accuracies)
    ]
    rows = {row["method"]: row for row in against(runs, "method", "lora")}
    assert (rows["lora"]["gain"], rows["lora"]["gain_error"]) == (0, 0)
    assert rows["lava"]["gain"] == pytest.approx(0.1)
    assert rows["lava"]["gain_error"] == pytest.approx(0.1 / 3**0.5)


def test_costs_are_ratios_of_one_turn():
    runs = [{"case": "conv", "step_seconds": {"lora": [1.0, 2.0, 4.0], "lava": [1.1, 2.0, 40.0]}}]
    rows = {row["method"]: row for row in cost.summarise(runs)}
    assert rows["lava"]["over_lora"] == pytest.approx(1.1)
    assert rows["lora"]["step"] == 2


def test_a_result_file_keeps_and_refuses(tmp_path: Path):
    path = tmp_path / "x.json"
    results = ResultFile(path, {"rank": 4})
    assert results.keep("a", lambda: {"found": 1})["found"] == 1
    again = ResultFile(path, {"rank": 4})
    assert again.keep("a", lambda: {"found": 2})["found"] == 1
    with pytest.raises(ValueError, match=r"other settings \(rank differ\)"):
        ResultFile(path, {"rank": 5})


def test_the_command_runs_and_goes_on(tmp_path: Path, capsys):
    folder = tmp_path / "out"
    arguments = ["bench", "lava", "--quick", "--experiments", "structure", "--output", str(folder)]
    assert main(arguments) == 0
    first = json.loads((folder / "structure.json").read_text())
    assert len(first["cells"]) == 6
    methods = {row["method"] for row in first["summary"]}
    assert methods == {"head", "full", "lora", "lava", "lava_term", "lava_wide"}
    assert (folder / "structure.png").stat().st_size > 1000
    assert "reshape-free" in capsys.readouterr().out
    key = next(iter(first["cells"]))
    del first["cells"][key]
    (folder / "structure.json").write_text(json.dumps(first))
    assert main(arguments) == 0
    second = json.loads((folder / "structure.json").read_text())
    for name, cell in first["cells"].items():
        assert second["cells"][name] == cell
    assert key in second["cells"]


@pytest.mark.slow
def test_every_experiment_runs(tmp_path: Path):
    settings = LavaBenchmark(output=tmp_path, quick=True)
    summaries = run_lava(settings)
    assert set(summaries) == set(settings.experiments)
    for name, rows in summaries.items():
        assert rows
        assert (tmp_path / f"{name}.png").stat().st_size > 1000


def test_accuracy_leaves_the_mode():
    network = build_network("alexnet", 3, 0.05).train()
    pictures = torch.randn(3, 3, 32, 32)
    labels = network.eval()(pictures).argmax(1)
    assert accuracy(network.train(), (pictures, labels)) == 1
    assert network.training


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"target": "emoji"}, "needs sprites"),
        ({"target": "photos"}, "needs photos"),
        ({"rates": ()}, "rates is empty"),
        ({"size": 16}, "at least 32"),
        ({"seeds": 0}, "seeds must be at least 1"),
    ],
)
def test_settings_are_checked(options, words):
    with pytest.raises(ValueError, match=words):
        LavaBenchmark(**options)
