"""SAM: folders and lists of masks, losses, scores against naive ones, training and loading."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel
from PIL import Image

import cntlora_core.lava  # noqa: F401  (makes LAVA known to peft)
from cntlora_core.tasks.mask_scores import MASK_SCORES, e_measure, mask_rows, s_measure
from cntlora_core.tasks.recipes import SegmentationSettings
from cntlora_core.tasks.segmentation import (
    _Sample,
    balanced_loss,
    mask_logits,
    read_pairs,
    structure_loss,
    train_segmentation,
)

NAMES = (("images",), ("masks",), {"train": ("train", "TrainDataset"), "test": ("test",)})


def tiny_sam():
    from transformers import SamConfig, SamModel

    torch.manual_seed(0)
    return SamModel(
        SamConfig(
            vision_config={
                "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
                "image_size": 64, "patch_size": 16, "output_channels": 8, "window_size": 2,
                "global_attn_indexes": [1], "mlp_dim": 16, "num_pos_feats": 4,
                "initializer_range": 0.3,
            },
            prompt_encoder_config={
                "hidden_size": 8, "image_size": 64, "patch_size": 16, "mask_input_channels": 4,
            },
            mask_decoder_config={
                "hidden_size": 8, "mlp_dim": 16, "num_attention_heads": 2, "num_hidden_layers": 1,
                "iou_head_hidden_dim": 8,
            },
            initializer_range=0.3,
        )
    )  # fmt: skip


def pair(i: int) -> tuple[Image.Image, Image.Image]:
    image = Image.new("RGB", (40, 32), (20, 30, 40 + i))
    mask = Image.new("L", (40, 32))
    box = (4 + i, 6, 20 + i, 24)
    image.paste((220, 200, 30), box)
    mask.paste(255, box)
    return image, mask


def write(folder: Path, count: int, ending: str = "") -> None:
    for kind in ("images", "masks"):
        (folder / kind).mkdir(parents=True)
    for i in range(count):
        image, mask = pair(i)
        image.save(folder / f"images/{i}.jpg")
        mask.save(folder / f"masks/{i}{ending}.png")


def settings(tmp_path: Path, **more) -> SegmentationSettings:
    given = {"output": str(tmp_path / "run"), "steps": 2, "batch_size": 2, "device": "cpu"}
    return SegmentationSettings(**{**given, **more})


@pytest.mark.parametrize(
    "more",
    [
        {"preset": "polyp"},
        pytest.param(
            {"preset": "sbu", "adapter": "lora", "method": "cross"}, marks=pytest.mark.thorough
        ),
    ],
    ids=["lava", "cross"],
)
def test_a_run_adapts_matrices_and_convolutions_and_fits_the_stock_base(more, tmp_path):
    pairs = [pair(i) for i in range(6)]
    wanted = settings(tmp_path, learning_rate=0.01, alpha=3.0, **more)
    result = train_segmentation(wanted, model=tiny_sam(), data={"train": pairs, "CVC": pairs[:3]})
    assert {*MASK_SCORES, "loss"} == result.metrics["CVC"].keys()
    trained = {name for name, p in result.model.named_parameters() if p.requires_grad}
    for layer in ("attn.qkv.", "neck.conv2.", "mask_decoder.modules_to_save"):
        assert any(layer in name for name in trained)
    batch = {"pixel_values": torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))}
    with torch.no_grad():
        expected = mask_logits(result.model.eval(), batch)
        before = mask_logits(tiny_sam().eval(), batch)
        loaded = PeftModel.from_pretrained(tiny_sam(), result.adapter).eval()
        torch.testing.assert_close(mask_logits(loaded, batch), expected, rtol=1e-3, atol=1e-4)
    assert (expected - before).abs().max() > 1e-2


def test_a_base_of_fewer_bits_reads_images(tmp_path):
    sam = tiny_sam().to(torch.bfloat16)
    found = mask_logits(sam, {"pixel_values": torch.zeros(1, 3, 64, 64)})
    assert found.shape == (1, 1, 64, 64)


@pytest.mark.parametrize("colour", [(128, 0, 0), (0, 64, 0), (255, 255, 255)])
def test_masks_may_have_any_colour(colour, tmp_path):
    image, grey = pair(0)
    mask = grey.point(lambda v: int(v > 127)).convert("L")
    mask.putpalette([0, 0, 0, *colour])
    assert mask.mode == "P"
    _, found = _Sample(64)((image, mask))
    _, expected = _Sample(64)((image, grey))
    assert expected.sum() > 0
    torch.testing.assert_close(found, expected)


def test_isic_s_superpixels_are_no_images(tmp_path):
    write(tmp_path / "isic/train", 2, "_segmentation")
    pair(0)[1].save(tmp_path / "isic/train/images/0_superpixels.png")
    assert len(read_pairs(str(tmp_path / "isic"), *NAMES)["train"]) == 2


def test_folders_and_lists_are_read(tmp_path):
    write(tmp_path / "polyp/TrainDataset", 2)
    write(tmp_path / "polyp/test/CVC-612", 1, "_segmentation")
    write(tmp_path / "polyp/test/Kvasir", 1)
    found = read_pairs(str(tmp_path / "polyp"), *NAMES)
    assert {name: len(pairs) for name, pairs in found.items()} == {
        "train": 2, "CVC-612": 1, "Kvasir": 1,
    }  # fmt: skip
    assert found["CVC-612"][0][1].name == "0_segmentation.png"
    (tmp_path / "polyp/TrainDataset/masks/1.png").unlink()
    with pytest.raises(FileNotFoundError, match=r"masks holds nothing that belongs to .*1.jpg"):
        read_pairs(str(tmp_path / "polyp"), *NAMES)

    pytest.importorskip("datasets")
    root = tmp_path / "polyp/test/Kvasir"
    for name in ("train", "test"):
        (root / f"{name}.csv").write_text("image,label\nimages/0.jpg,masks/0.png\n")
    assert read_pairs(str(root), *NAMES)["test"] == [(root / "images/0.jpg", root / "masks/0.png")]
    (root / "test.csv").write_text("image,label\nimages/7.jpg,masks/0.png\n")
    with pytest.raises(FileNotFoundError, match=r"split 'test' .* row 0 names the image .*7.jpg"):
        read_pairs(str(root), *NAMES)
    (root / "test.csv").write_text("image,mask\nimages/0.jpg,masks/0.png\n")
    with pytest.raises(ValueError, match="no column 'label'; its columns are image, mask"):
        read_pairs(str(root), *NAMES)


def test_what_is_missing_is_named(tmp_path):
    with pytest.raises(ValueError, match="give data"):
        train_segmentation(settings(tmp_path), model=tiny_sam())
    with pytest.raises(FileNotFoundError, match=r"holds no split: train.csv and test.csv"):
        train_segmentation(settings(tmp_path, data=str(tmp_path)), model=tiny_sam())
    with pytest.raises(ValueError, match="split 'train' is empty"):
        train_segmentation(settings(tmp_path), model=tiny_sam(), data={"train": [], "test": []})
    with pytest.raises(ValueError, match="a split 'train' and one to measure on"):
        train_segmentation(settings(tmp_path), model=tiny_sam(), data={"train": [pair(0)]})


def test_a_perfect_mask_has_perfect_scores_and_an_inverted_one_none():
    mask = torch.zeros(1, 1, 24, 30)
    mask[..., 5:15, 8:20] = 1
    perfect, inverted = mask_rows(mask, mask)[0], mask_rows(1 - mask, mask)[0]
    scores = dict(zip(MASK_SCORES, perfect.tolist()))
    assert scores.pop("balanced_error_rate") == pytest.approx(0.0, abs=1e-4)
    # At threshold 0 all pixels are found, which is one of 256.
    assert scores == pytest.approx(dict.fromkeys(scores, 1.0), abs=4e-3)
    worst = dict(zip(MASK_SCORES, inverted.tolist()))
    assert worst["balanced_error_rate"] == pytest.approx(100.0)
    assert worst["dice"] == pytest.approx(0.0, abs=1e-6)
    assert worst["s_measure"] < 0.2


def test_scores_over_thresholds_are_those_of_a_loop():
    generator = torch.Generator().manual_seed(3)
    p = torch.rand(20, 16, generator=generator)
    m = (torch.rand(20, 16, generator=generator) < 0.3).float()
    e, f = [], []
    for t in torch.linspace(0, 1, 256):
        hard = (p >= t).float()
        e.append(float(e_measure(hard, m)))
        hits = float((hard * m).sum())
        precision, recall = hits / (float(hard.sum()) + 1e-8), hits / float(m.sum())
        f.append(1.3 * precision * recall / (0.3 * precision + recall + 1e-8))
    row = dict(zip(MASK_SCORES, mask_rows(p[None, None], m[None, None])[0].tolist()))
    assert row["e_measure"] == pytest.approx(np.mean(e), rel=1e-4)
    assert row["f_measure"] == pytest.approx(np.mean(f), rel=1e-4)
    hard = p > 0.5
    both = float((hard & m.bool()).sum())
    assert row["iou"] == pytest.approx(both / float((hard | m.bool()).sum()))
    assert row["dice"] == pytest.approx(2 * both / float(hard.sum() + m.sum()))


def test_masks_without_object_or_background_have_scores():
    p = torch.full((1, 1, 8, 8), 0.25)
    for value in (0.0, 1.0):
        row = dict(zip(MASK_SCORES, mask_rows(p, torch.full_like(p, value))[0].tolist()))
        assert row["s_measure"] == pytest.approx(0.25 if value else 0.75)
        assert np.isnan(row["balanced_error_rate"])
        assert all(np.isfinite(v) for k, v in row.items() if k != "balanced_error_rate")
    assert float(s_measure(torch.zeros(4, 4), torch.zeros(4, 4))) == 1.0


def test_losses_fall_towards_the_mask():
    mask = torch.zeros(1, 1, 64, 64)
    mask[..., 10:30, 10:30] = 1
    for loss in (structure_loss, balanced_loss):
        values = [float(loss(scale * (2 * mask - 1), mask)) for scale in (-2.0, 0.0, 2.0, 20.0)]
        assert values == sorted(values, reverse=True)
        assert values[-1] < 1e-3
    # Object and background weigh the same: all right on the larger part is half of the loss.
    wrong = float(balanced_loss(torch.full_like(mask, -3.0), mask))
    entropy = np.log1p(np.exp(3.0)), np.log1p(np.exp(-3.0))
    assert wrong == pytest.approx(np.mean(entropy), rel=1e-4)
