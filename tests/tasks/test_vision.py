"""Image classification: VTAB-1K's lists, folders of classes, parquet; the head, layer decay."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from PIL import Image
from torch import nn
from transformers import TrainerCallback

from cntlora_core.tasks.presets import VISION
from cntlora_core.tasks.recipes import VisionSettings
from cntlora_core.tasks.settings import planned
from cntlora_core.tasks.trainer import parameter_groups
from cntlora_core.tasks.vision import HEAD_DEVIATION, read_pictures, train_vision, vision_task

COLOURS = [(200, 30, 30), (30, 30, 200), (30, 180, 30)]


@pytest.fixture(scope="module")
def dinov2(tmp_path_factory) -> Path:
    from transformers import Dinov2Config, Dinov2Model

    from .conftest import SHAPE

    folder = tmp_path_factory.mktemp("dinov2")
    shape = {k: v for k, v in SHAPE.items() if k != "intermediate_size"}
    torch.manual_seed(0)
    config = Dinov2Config(image_size=28, patch_size=14, mlp_ratio=2, initializer_range=0.3, **shape)
    Dinov2Model(config).save_pretrained(str(folder))
    return folder


def picture(path: Path, label: int, i: int = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    r, g, b = COLOURS[label]
    Image.new("RGB", (20 + i, 24), (r - 2 * i, g + i, b)).save(path)


@pytest.fixture(scope="module")
def vtab(tmp_path_factory) -> Path:
    """A task in VTAB-1K's layout: lists of paths and classes beside the images."""
    folder = tmp_path_factory.mktemp("vtab") / "caltech101"
    lists = {
        "train800": (8, "train800val200"),
        "val200": (4, "train800val200"),
        "test": (6, "test"),
    }
    lines = {}
    for name, (count, folder_of) in lists.items():
        for i in range(count):
            path = f"images/{folder_of}/{name}{i:06d}.jpg"
            picture(folder / path, i % 3, i)
            lines.setdefault(name, []).append(f"{path} {i % 3}")
    lines["train800val200"] = lines["train800"] + lines["val200"]
    for name, entries in lines.items():
        (folder / f"{name}.txt").write_text("\n".join(entries) + "\n")
    return folder


def settings(tmp_path: Path, dinov2: Path, data: Path | None, **more) -> VisionSettings:
    given = {
        "output": str(tmp_path / "run"),
        "model": str(dinov2),
        "data": None if data is None else str(data),
        "rank": 2,
        "steps": 3,
        "batch_size": 4,
        "image_size": 28,
        "precision": "float32",
        "device": "cpu",
    }
    return VisionSettings(**{**given, **more})


def test_head_adapters_and_biases_train_and_fit_the_stock_base(tmp_path, dinov2, vtab):
    from transformers import AutoModelForImageClassification

    result = train_vision(settings(tmp_path, dinov2, vtab, learning_rate=0.01))
    assert result.metrics["test"].keys() >= {"accuracy", "loss"}
    trained = [n for n, p in result.model.named_parameters() if p.requires_grad]
    assert any(name.endswith("norm1.bias") for name in trained)
    assert any("classifier.modules_to_save" in name for name in trained)
    assert not any(name.endswith("base_layer.weight") for name in trained)
    batch = torch.randn(4, 3, 28, 28, generator=torch.Generator().manual_seed(0))
    stock = AutoModelForImageClassification.from_pretrained(dinov2, num_labels=3)
    loaded = PeftModel.from_pretrained(stock, result.adapter).eval()
    with torch.no_grad():
        expected = result.model.eval()(pixel_values=batch).logits
        torch.testing.assert_close(
            loaded(pixel_values=batch).logits, expected, rtol=1e-3, atol=1e-4
        )


def test_a_fresh_head_is_small_and_has_no_bias(tmp_path, dinov2, vtab):
    wanted = settings(tmp_path, dinov2, vtab)
    task = vision_task(planned(wanted, VISION["cntlora"]), wanted)
    head = task.model.classifier
    assert head.weight.std().item() == pytest.approx(HEAD_DEVIATION, rel=0.2)
    assert not head.bias.any()
    assert len(task.train) == 12
    assert list(task.splits) == ["test"]
    assert task.train[0][0].shape == (3, 28, 28)


def test_layers_learn_more_slowly_the_lower_they_are():
    model = nn.ModuleDict(
        {
            "embeddings": nn.Embedding(3, 2),
            "layer": nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)]),
            "classifier": nn.Linear(2, 2),
        }
    )
    groups = parameter_groups(model, 1.0, 0.05, 0.75)
    rates = {id(p): (g["lr"], g["weight_decay"]) for g in groups for p in g["params"]}
    found = {name: rates[id(p)] for name, p in model.named_parameters()}
    assert found["classifier.weight"] == (1.0, 0.05)
    assert found["layer.1.weight"] == (0.75, 0.05)
    assert found["layer.0.bias"] == (0.75**2, 0.0)
    assert found["embeddings.weight"] == (0.75**3, 0.05)


def test_up_matrices_learn_faster_by_the_ratio_of_lora_plus():
    base = nn.Sequential(nn.Linear(4, 4))
    model = get_peft_model(base, LoraConfig(r=2, target_modules=["0"]))
    groups = parameter_groups(model, 1e-3, 0.0, lora_plus=16.0)
    rates = {id(p): g["lr"] for g in groups for p in g["params"]}
    found = {n.split(".")[-3]: rates[id(p)] for n, p in model.named_parameters() if "lora" in n}
    assert found == pytest.approx({"lora_A": 1e-3, "lora_B": 16e-3})


def test_the_head_may_have_a_learning_rate_of_its_own(tmp_path, dinov2, vtab):
    wanted = settings(tmp_path, dinov2, vtab, learning_rate=1e-3, head_learning_rate=5e-2)
    seen = []

    class Rates(TrainerCallback):
        def on_step_begin(self, *_args, model=None, optimizer=None, **_):
            names = {id(p): name for name, p in model.named_parameters()}
            seen.extend(
                ("classifier" in names[id(p)], group["initial_lr"])
                for group in optimizer.param_groups
                for p in group["params"]
            )

    train_vision(wanted, callbacks=(Rates(),))
    assert set(seen) == {(True, 5e-2), (False, 1e-3)}


def test_folders_of_classes_and_parquet_are_read(tmp_path):
    for split, count in (("train", 4), ("val", 2)):
        for i in range(count):
            picture(tmp_path / f"pets/{split}/{('cat', 'dog')[i % 2]}/{i}.png", i % 2, i)
    data, classes = read_pictures(str(tmp_path / "pets"))
    assert classes == ("cat", "dog")
    assert {split: [label for _, label in rows] for split, rows in data.items()} == {
        "train": [0, 0, 1, 1],
        "validation": [0, 1],
    }
    picture(tmp_path / "pets/val/bird/0.png", 2)
    with pytest.raises(ValueError, match="class 'bird', which the training data have not"):
        read_pictures(str(tmp_path / "pets"))

    datasets = pytest.importorskip("datasets")
    rows = [{"image": str(tmp_path / f"pets/train/cat/{i}.png"), "label": i // 2} for i in (0, 2)]
    features = datasets.Features(
        image=datasets.Image(), label=datasets.ClassLabel(names=["a", "b"])
    )
    table = datasets.Dataset.from_list(rows, features=features)
    for split in ("train", "test"):
        table.to_parquet(str(tmp_path / f"{split}-00000-of-00001.parquet"))
    data, classes = read_pictures(str(tmp_path))
    assert classes == ("a", "b")
    assert data["test"][1][0].size == (22, 24)
    assert data["test"].labels == [0, 1]


def test_what_is_wrong_with_pictures_is_named(tmp_path, dinov2, vtab):
    lists = tmp_path / "lists"
    picture(lists / "a.jpg", 0)
    for line, message in (
        ("b.jpg 0", r"line 1 names the image .*b.jpg, which is not there"),
        ("a.jpg cat", "line 1: 'a.jpg cat' is not a path, a blank and the number of a class"),
    ):
        (lists / "train800val200.txt").write_text(line + "\n")
        (lists / "test.txt").write_text("a.jpg 0\n")
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            train_vision(settings(tmp_path, dinov2, lists))
    (lists / "train800val200.txt").write_text("a.jpg 0\n")
    (lists / "test.txt").write_text("")
    with pytest.raises(ValueError, match="split 'test' is empty"):
        train_vision(settings(tmp_path, dinov2, lists))
    (lists / "test.txt").unlink()
    with pytest.raises(FileNotFoundError, match=r"there is no .*test.txt: VTAB-1K's layout"):
        train_vision(settings(tmp_path, dinov2, lists))
    with pytest.raises(ValueError, match="give data"):
        train_vision(settings(tmp_path, dinov2, None))
    pictures = [(lists / "a.jpg", 0), (lists / "a.jpg", 5)]
    from transformers import AutoModelForImageClassification

    model = AutoModelForImageClassification.from_pretrained(dinov2, num_labels=3)
    with pytest.raises(ValueError, match="the data have the class 5, and the model 3 classes"):
        train_vision(
            settings(tmp_path, dinov2, None), model=model, data={"train": pictures, "val": pictures}
        )
