"""Images generated, compared and measured by the nodes."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from .conftest import Pack, pictures


def test_sampling_with_the_lora_changes_the_pictures(pack: Pack, run: SimpleNamespace) -> None:
    few = {"prompts": "a photo of sks dog\n\na red dog", "steps": 1, "per_prompt": 2}
    plain, prompts = pack.run("CNTLoRASample", model=run.model, **few).args
    generated = pack.run("CNTLoRASample", model=run.model, lora=run.trained.args[0], **few).args[0]
    off = pack.run(
        "CNTLoRASample", model=run.model, lora=run.trained.args[0], strength=0.0, **few
    ).args[0]
    assert prompts.splitlines() == ["a photo of sks dog"] * 2 + ["a red dog"] * 2
    assert plain.shape == (4, 32, 32, 3)
    assert not torch.equal(plain, generated)
    assert torch.equal(plain, off)
    assert not torch.equal(plain[0], plain[1])


def test_token_and_class_in_prompts_are_the_lora_s_own(pack: Pack, run: SimpleNamespace) -> None:
    lora, model = run.trained.args[0], run.model
    few = {"model": model, "steps": 1}
    template, words = "a photo of {token} {class}", "a photo of sks dog"
    generated = pack.run("CNTLoRASample", lora=lora, prompts=template, **few)
    assert generated.args[1] == words
    grids = [
        pack.run("CNTLoRACompare", lora_1=lora, lora_2=lora, prompts=text, seeds="0", **few).args[0]
        for text in (template, words)
    ]
    assert torch.equal(*grids)
    with pytest.raises(ValueError, match="write the words themselves"):
        pack.run("CNTLoRASample", prompts=template, **few)
    with pytest.raises(ValueError, match="write the words themselves"):
        pack.run("CNTLoRACompare", lora_1=lora, lora_2=dict(lora), prompts=template, **few)


def test_the_grid_has_a_row_for_each_lora(pack: Pack, run: SimpleNamespace) -> None:
    lora = run.trained.args[0]
    few = {"steps": 1, "prompts": "a dog", "strengths": "0.5, 1", "seeds": "0 1"}
    grid = pack.run("CNTLoRACompare", model=run.model, lora_1=lora, lora_3=dict(lora), **few)
    smaller = pack.run("CNTLoRACompare", model=run.model, lora_1=lora, with_base=False, **few)
    assert grid.args[0].shape[1] > smaller.args[0].shape[1]
    with pytest.raises(ValueError, match="'many' is no number"):
        pack.run("CNTLoRACompare", model=run.model, lora_1=lora, **{**few, "seeds": "many"})


def test_a_lora_of_another_model_is_refused_in_few_words(pack: Pack, run: SimpleNamespace) -> None:
    other = {name: torch.zeros(t.shape[0], 7) if "lora_down" in name else t
             for name, t in run.trained.args[0].items()}  # fmt: skip
    with pytest.raises(ValueError, match="does not fit this model") as caught:
        pack.run("CNTLoRASample", model=run.model, lora=other, prompts="a dog", steps=1)
    assert len(str(caught.value)) < 600


def test_pictures_are_measured_against_the_photos(
    pack: Pack, run: SimpleNamespace, comfy: Path, tiny_encoders: Path
) -> None:
    from cntlora_core.metrics import load_encoders, measure, subject_features

    subject = run.subject.args[0]
    folder = comfy / "models" / "clip_vision"
    for kind in ("vision", "clip"):
        (folder / f"tiny {kind}").symlink_to(tiny_encoders / kind, target_is_directory=True)
    chosen = {"dino": "tiny vision", "clip": "tiny clip"}
    widgets = pack.module("widgets")
    assert widgets.encoder_names("vision") == [widgets.SMALL_ENCODER, chosen["dino"]]
    assert widgets.encoder_names("clip") == [widgets.SMALL_ENCODER, chosen["clip"]]
    images, prompts = pictures(4, 32), "a red {token} {class}\na cat"
    output = pack.run("CNTLoRAEvaluate", images=images, subject=subject, prompts=prompts, **chosen)
    dino, clip_i, clip_t, sheet, report = output.args
    encoders = load_encoders(tiny_encoders / "vision", tiny_encoders / "clip")
    generated = [Image.fromarray(np.rint(x.numpy() * 255).astype(np.uint8)) for x in images]
    expected = measure(
        encoders,
        subject_features(encoders, [photo.image for photo in subject.photos.photos]),
        generated,
        ["a red sks dog"] * 2 + ["a cat"] * 2,
        token="sks",
    )
    assert dino == pytest.approx(100 * expected.dino, abs=1e-3)
    assert clip_i == pytest.approx(100 * expected.clip_i, abs=1e-3)
    assert clip_t == pytest.approx(100 * (expected.clip_t or 0), abs=1e-3)
    assert "  a red sks dog: DINO" in report
    assert "the photos themselves (3)" in report
    assert sheet.ndim == 4
    assert len(output.ui["images"]) == 1
    with pytest.raises(ValueError, match="4 pictures and 3 prompts"):
        pack.run("CNTLoRAEvaluate", images=images, subject=subject, prompts="a\nb\nc", **chosen)
    with pytest.raises(FileNotFoundError, match="no encoder"):
        pack.run(
            "CNTLoRAEvaluate", images=images, subject=subject, **{**chosen, "clip": "../../etc"}
        )


def test_large_pictures_before_the_small_encoders_are_remarked_upon(
    pack: Pack, run: SimpleNamespace, tiny_encoders: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from cntlora_core.metrics import encoders

    monkeypatch.setattr(encoders.mini, "encoder_path", lambda kind: tiny_encoders / kind)

    def report(side: int) -> str:
        given = {"images": pictures(1, side), "subject": run.subject.args[0], "prompts": "a dog"}
        return pack.run("CNTLoRAEvaluate", **given).args[4]

    assert "small DINO and CLIP encoder" in report(512)
    assert "these are of 512 px" in report(512)
    assert "encoder" not in report(8)
