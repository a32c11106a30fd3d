"""Depth-Anything: lists of NYU depth v2, the loss, scores, training and loading."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel
from PIL import Image

import cntlora_core.lava  # noqa: F401  (makes LAVA known to peft)
from cntlora_core.tasks.depth import (
    DEPTH_SCORES,
    depth_rows,
    depth_task,
    metres,
    read_depths,
    scale_invariant_loss,
    train_depth,
)
from cntlora_core.tasks.presets import DEPTH
from cntlora_core.tasks.recipes import DepthSettings
from cntlora_core.tasks.settings import planned


@pytest.fixture(scope="module")
def depth_anything(tmp_path_factory) -> Path:
    """A model of relative depth, as on the hub."""
    from transformers import DepthAnythingConfig, DepthAnythingForDepthEstimation

    torch.manual_seed(0)
    config = DepthAnythingConfig(
        backbone_config={
            "model_type": "dinov2", "image_size": 28, "patch_size": 14, "hidden_size": 16,
            "num_hidden_layers": 4, "num_attention_heads": 2, "mlp_ratio": 2,
            "out_indices": [1, 2, 3, 4], "initializer_range": 0.3, "reshape_hidden_states": False,
        },
        reassemble_hidden_size=16,
        neck_hidden_sizes=[4, 4, 8, 8],
        fusion_hidden_size=8,
        head_hidden_size=4,
        initializer_range=0.3,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("depth anything")
    DepthAnythingForDepthEstimation(config).save_pretrained(str(folder))
    return folder


@pytest.fixture
def nyu(tmp_path: Path) -> Path:
    """NYU depth v2 as BTS lays it out: lists beside folders of scenes, depths in millimetres."""
    root = tmp_path / "nyu"
    lines: dict[str, list[str]] = {"train": [], "test": []}
    for split, count in (("train", 4), ("test", 2)):
        for i in range(count):
            folder = root / split / "kitchen"
            folder.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (32, 24), (40 * i, 90, 120)).save(folder / f"rgb_{i}.jpg")
            depth = np.full((24, 32), 1500 + 500 * i, np.uint16)
            depth[:, :4] = 0  # not known
            Image.fromarray(depth).save(folder / f"sync_depth_{i}.png")
            lines[split].append(f"/kitchen/rgb_{i}.jpg /kitchen/sync_depth_{i}.png 518.8579")
    lines["train"].append("/kitchen/rgb_9.jpg None 518.8579")
    for split, entries in lines.items():
        (root / f"nyudepthv2_{split}_files_with_gt.txt").write_text("\n".join(entries) + "\n")
    return root


def settings(tmp_path: Path, model: Path, data: Path | None, **more) -> DepthSettings:
    given = {
        "output": str(tmp_path / "run"),
        "model": str(model),
        "data": None if data is None else str(data),
        "rank": 2,
        "steps": 2,
        "batch_size": 2,
        "image_size": (28, 42),
        "device": "cpu",
    }
    return DepthSettings(**{**given, **more})


@pytest.mark.parametrize(
    "more",
    [{"learning_rate": 0.01}, pytest.param({"method": "cross"}, marks=pytest.mark.thorough)],
    ids=["lora", "cross"],
)
def test_a_run_adapts_encoder_and_decoder_and_fits_the_metric_base(
    more, tmp_path, depth_anything, nyu
):
    from transformers import DepthAnythingForDepthEstimation

    wanted = settings(tmp_path, depth_anything, nyu, **more)
    result = train_depth(wanted)
    assert {*DEPTH_SCORES, "loss"} == result.metrics["test"].keys()
    trained = {name for name, p in result.model.named_parameters() if p.requires_grad}
    for layer in ("backbone", "convolution1.", "neck.convs.0.", "head.conv1.", "conv3.modules_to"):
        assert any(layer in name for name in trained)
    batch = torch.randn(2, 3, 28, 42, generator=torch.Generator().manual_seed(0))
    stock = DepthAnythingForDepthEstimation.from_pretrained(
        depth_anything, depth_estimation_type="metric", max_depth=10
    )
    with torch.no_grad():
        before = stock.eval()(pixel_values=batch).predicted_depth
        expected = result.model.eval()(pixel_values=batch).predicted_depth
        loaded = PeftModel.from_pretrained(stock, result.adapter).eval()
        found = loaded(pixel_values=batch).predicted_depth
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
    assert expected.std() > 0.02
    assert (expected - before).abs().max() > 0.1


def test_a_new_last_layer_begins_at_half_of_the_largest_depth(tmp_path, depth_anything, nyu):
    wanted = settings(tmp_path, depth_anything, nyu, max_depth=8)
    task = depth_task(planned(wanted, DEPTH["nyu"]), wanted)
    image, depth = task.train[0]
    assert image.shape == (3, 28, 42)
    assert depth[0, 0] == 0
    assert depth[0, 5] == 1.5
    with torch.no_grad():
        found = task.model.eval()(pixel_values=image[None]).predicted_depth
    assert float(found.mean()) == pytest.approx(4.0, abs=0.5)


def test_what_is_wrong_with_depths_is_named(tmp_path, depth_anything, nyu):
    with pytest.raises(ValueError, match=r"image_size=\(30, 42\): both must be multiples .* 14"):
        train_depth(settings(tmp_path, depth_anything, nyu, image_size=(30, 42)))
    with pytest.raises(ValueError, match=r"is depth_scale, .* right"):
        train_depth(settings(tmp_path, depth_anything, nyu, depth_scale=1e9, method="cross"))
    lines = nyu / "nyudepthv2_test_files_with_gt.txt"
    lines.write_text("/kitchen/rgb_0.jpg\n")
    with pytest.raises(ValueError, match=r"line 1: .* is not an image and its depth image"):
        read_depths(str(nyu))
    lines.write_text("/kitchen/rgb_7.jpg /kitchen/sync_depth_0.png\n")
    with pytest.raises(FileNotFoundError, match=r"line 1 names the image .*rgb_7.jpg"):
        read_depths(str(nyu))
    with pytest.raises(ValueError, match="give data"):
        train_depth(settings(tmp_path, depth_anything, None))


def test_the_loss_does_not_mind_a_factor_much_and_scores_do():
    generator = torch.Generator().manual_seed(1)
    depth = 1 + 5 * torch.rand(1, 20, 30, generator=generator)
    depth[0, :3] = 0
    assert float(scale_invariant_loss(depth.clamp_min(0.5), depth, 10.0)) < 1e-3
    twice = float(scale_invariant_loss(2 * depth.clamp_min(0.5), depth, 10.0))
    assert twice == pytest.approx(10 * (0.15 * np.log(2) ** 2) ** 0.5, rel=1e-4)
    row = dict(zip(DEPTH_SCORES, depth_rows(1.2 * depth, depth, 10.0)[0].tolist()))
    known = depth[0, 3:].numpy()
    assert row["delta_1"] == 1.0
    assert row["abs_rel"] == pytest.approx(0.2, rel=1e-4)
    assert row["rmse"] == pytest.approx(np.sqrt(((0.2 * known) ** 2).mean()), rel=1e-4)
    assert row["log10"] == pytest.approx(np.log10(1.2), rel=1e-4)
    assert depth_rows(1.3 * depth, depth, 10.0)[0, 0] == 0.0


def test_images_of_nyu_s_size_are_measured_within_eigen_s_crop():
    depth = torch.full((1, 480, 640), 2.0)
    found = depth.clone()
    found[:, :45] = 9.0  # outside
    assert float(depth_rows(found, depth, 10.0)[0, 0]) == 1.0
    assert metres(np.ones((2, 3)), 1000.0).tolist() == [[1.0] * 3] * 2
