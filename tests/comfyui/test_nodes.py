"""The nodes' bodies, from photos to a grid, on a tiny random model."""

from __future__ import annotations

import dataclasses
import gc
import json
import shutil
import warnings
from pathlib import Path, PureWindowsPath
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from torch import Tensor

from .conftest import STEPS, Pack, pictures, subject_of, train


@pytest.fixture(scope="module")
def run(pack: Pack) -> SimpleNamespace:
    """One graph, from photos to a trained LoRA."""
    model = pack.run("CNTLoRALoadModel", checkpoint="diffusers/tiny").args[0]
    subject = subject_of(pack, images=[pictures(2), pictures(1, 48)])
    others = pack.run("CNTLoRAClassImages", model=model, subject=subject.args[0], count=2, steps=1)
    initialized = pack.run(
        "CNTLoRAInitialize", model=model, subject=subject.args[0], rank=4, passes=1
    )
    trained = train(pack, initialized.args[0], others.args[0])
    return SimpleNamespace(
        model=model, subject=subject, others=others, initialized=initialized, trained=trained
    )


def test_images_of_different_sizes_become_a_subject(run: SimpleNamespace) -> None:
    subject, shown, prompt, report = run.subject.args
    assert len(subject.photos.photos) == 3
    assert [tuple(picture.shape) for picture in shown] == [(1, 512, 512, 3)] * 3
    assert prompt == "a photo of sks dog"
    assert report.startswith("3 photos")


def test_photos_keep_their_shape_and_take_masks(pack: Pack, comfy: Path) -> None:
    with torch.inference_mode():
        wide, mask = torch.rand(2, 60, 80, 3), torch.zeros(2, 60, 80)
        mask[0, :, :40] = 1.0
    kept = subject_of(pack, images=[wide], masks=[mask])
    subject, shown, _, report = kept.args
    assert [tuple(picture.shape) for picture in shown] == [(1, 448, 576, 3)] * 2
    assert [photo.mask is None for photo in subject.photos.photos] == [False, True]
    assert "the mask of image 2 is black throughout" in report
    assert "cropped: 4 % of the width of image 1" in report
    (sheet,) = kept.ui["images"]
    with Image.open(comfy / sheet["type"] / sheet["filename"]) as picture:
        assert picture.size == (2 * 200 + 8, 218 + 8)

    cropped = subject_of(pack, images=[wide], crop=True, unmasked_weight=0.0)
    assert [tuple(picture.shape) for picture in cropped.args[1]] == [(1, 512, 512, 3)] * 2
    assert "25 % of the width of image 1" in cropped.args[3]
    assert cropped.args[0].settings.crop
    assert cropped.args[0].settings.unmasked_weight == 0


def test_nodes_show_pictures_that_are_there(run: SimpleNamespace, comfy: Path) -> None:
    for output in (run.subject, run.others, run.initialized, run.trained):
        assert output.ui["images"]
        for image in output.ui["images"]:
            with Image.open(comfy / image["type"] / image["filename"]) as picture:
                picture.load()
    assert len(run.trained.ui["images"]) == 2  # the loss, and the last preview


def test_the_initialisation_keeps_the_budget_and_can_be_trained(run: SimpleNamespace) -> None:
    plan = run.initialized.args[0].initialization.plan
    assert sum(plan.ranks.values()) == 4 * len(plan.ranks)
    assert not any(f.down.is_inference() or f.up.is_inference() for f in plan.factors.values())
    assert run.initialized.args[1].ndim == 4


def test_training_gives_a_lora_losses_and_a_file(run: SimpleNamespace, comfy: Path) -> None:
    lora, losses, path, picture = run.trained.args
    assert len(losses["loss"]) == STEPS
    assert all(np.isfinite(losses["loss"]))
    assert Path(path).parent.parent == comfy / "output" / "cntlora"
    with safe_open(path, framework="pt") as file:
        assert set(file.keys()) == set(lora)
        assert lora.metadata == file.metadata()
    assert lora.label == f"cross, {STEPS} steps"
    assert max(float(t.abs().max()) for name, t in lora.items() if "lora_up" in name) > 0
    assert picture.shape[0] == 1
    record = json.loads((Path(path).parent / "run.json").read_text("utf-8"))
    assert record["settings"]["prior"]["num_class_images"] == 2
    assert all(step["prior_loss"] > 0 for step in record["history"])


def test_a_finished_training_is_found_again_and_another_one_is_not(
    pack: Pack, run: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    initialized, others = run.initialized.args[0], run.others.args[0]

    def refuse(*_args: object, **_options: object) -> None:
        raise AssertionError("it trains")

    monkeypatch.setattr("cntlora_core.diffusion.job.personalise", refuse)
    again = train(pack, initialized, others)
    assert again.args[2] == run.trained.args[2]
    assert again.args[1] == run.trained.args[1]
    for other in ({"training_seed": 1}, {"steps": 2}, {"trained_before": "train anew"}):
        with pytest.raises(AssertionError, match="it trains"):
            train(pack, initialized, others, **other)
    with pytest.raises(AssertionError, match="it trains"):
        train(pack, initialized)


class Steps:
    """Counts the training steps that nodes report."""

    def __init__(self, pack: Pack, monkeypatch: pytest.MonkeyPatch) -> None:
        self.done = 0
        reporter = pack.module("runtime").HostReporter
        plain = reporter._say

        def count(reporter: Any, stage: str, done: int, total: int, values: dict) -> None:
            self.done += stage == "training"
            plain(reporter, stage, done, total, values)

        monkeypatch.setattr(reporter, "_say", count)

    def of(self, *inputs: Any, **widgets: Any) -> tuple[int, Any]:
        """How many steps were trained, and the node's output."""
        before = self.done
        output = train(*inputs, preview_every=0, **widgets)
        return self.done - before, output


def test_names_and_exports_train_nothing_and_more_steps_go_on(
    pack: Pack, run: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = Steps(pack, monkeypatch)
    graph = (pack, run.initialized.args[0], run.others.args[0])
    done, first = steps.of(*graph, name="once", training_seed=11, steps=4)
    assert done == 4
    folder = Path(first.args[2]).parent
    for changed in (
        {"name": "twice"},
        {"name": "thrice", "gradient_checkpointing": True},
        {"name": "exact", "compress": False},
    ):
        done, output = steps.of(*graph, **{"training_seed": 11, "steps": 4, **changed})
        assert done == 0, changed
        path = Path(output.args[2])
        assert path.parent == folder
        assert path.stem == changed["name"]
    assert (folder / "once.safetensors").is_file()
    done, longer = steps.of(*graph, name="longer", training_seed=11, steps=6)
    assert done == 2
    assert Path(longer.args[2]).parent == folder
    assert len(longer.args[1]["loss"]) == 6
    done, shorter = steps.of(*graph, name="once", training_seed=11, steps=4)
    assert done == 4
    assert Path(shorter.args[2]).parent.name == f"once-{folder.name.rpartition('-')[2]}-4"
    assert all(torch.equal(first.args[0][k], tensor) for k, tensor in shorter.args[0].items())
    assert steps.of(*graph, name="once", training_seed=11, steps=4)[0] == 0
    assert steps.of(*graph, name="longer", training_seed=11, steps=6)[0] == 0
    done, whole = steps.of(
        *graph, name="longer", training_seed=11, steps=6, trained_before="train anew"
    )
    assert done == 6
    assert all(torch.equal(longer.args[0][k], tensor) for k, tensor in whole.args[0].items())


def test_what_shapes_the_training_trains_anew(
    pack: Pack, run: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = Steps(pack, monkeypatch)
    graph = (pack, run.initialized.args[0], run.others.args[0])
    assert steps.of(*graph, training_seed=12, steps=1)[0] == 1
    assert steps.of(*graph, training_seed=12, steps=1, learning_rate=2e-3)[0] == 1
    monkeypatch.setattr("cntlora_core.diffusion.run_identity.ALGORITHM", 10**6)
    assert steps.of(*graph, training_seed=12, steps=1)[0] == 1


def test_a_damaged_state_is_said_and_can_be_trained_anew(pack: Pack, run: SimpleNamespace) -> None:
    inputs = {"training_seed": 13, "steps": 1, "preview_every": 0, "name": "damaged"}
    graph = (pack, run.initialized.args[0], run.others.args[0])
    path = Path(train(*graph, **inputs).args[2])
    (path.parent / "state.safetensors").write_bytes(b"no state")
    path.unlink()
    with pytest.raises(ValueError, match="cannot be read as a training state"):
        train(*graph, **inputs)
    assert train(*graph, **inputs, trained_before="train anew").args[2] == str(path)


def test_the_same_seed_trains_the_same_lora(pack: Pack, run: SimpleNamespace) -> None:
    again = train(
        pack,
        run.initialized.args[0],
        run.others.args[0],
        name="the same again",
        trained_before="train anew",
    )
    assert Path(again.args[2]).name == "the_same_again.safetensors"
    first = run.trained.args[0]
    assert all(torch.equal(first[name], tensor) for name, tensor in again.args[0].items())


def test_cancelling_keeps_a_state_and_queueing_again_goes_on_from_it(
    pack: Pack, run: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    from comfy import model_management  # pyright: ignore[reportMissingImports]

    initialized, others = run.initialized.args[0], run.others.args[0]
    reporter = pack.module("runtime").HostReporter
    plain = reporter._say

    def press_cancel(self: Any, stage: str, done: int, total: int, values: dict) -> None:
        plain(self, stage, done, total, values)
        if stage == "training" and done == 1:
            model_management.interrupt_current_processing()

    monkeypatch.setattr(reporter, "_say", press_cancel)
    with pytest.raises(model_management.InterruptProcessingException):
        train(pack, initialized, others, name="cancelled", preview_every=0, training_seed=5)
    assert not model_management.processing_interrupted()
    folder = next((Path(run.trained.args[2]).parent.parent).glob("cancelled-*"))
    assert (folder / "state.safetensors").is_file()
    monkeypatch.undo()
    resumed = train(pack, initialized, others, name="cancelled", preview_every=0, training_seed=5)
    record = json.loads((folder / "run.json").read_text("utf-8"))
    assert any("going on after step 2" in note for note in record["notes"])
    whole = train(
        pack, initialized, others, preview_every=0, training_seed=5, trained_before="train anew"
    )
    assert resumed.args[1] == whole.args[1]


CANCELLED_IN = {
    "generating class images": ("CNTLoRAClassImages", {"count": 9, "steps": 3, "images_seed": 9}),
    "encoding photos": ("CNTLoRAInitialize", {"rank": 4, "passes": 1}),
    "reading activations": ("CNTLoRAInitialize", {"rank": 4, "passes": 5}),
    "looking at pictures (DINO)": ("CNTLoRAEvaluate", {"prompts": "a dog"}),
}


@pytest.mark.parametrize("stage", CANCELLED_IN)
def test_cancelling_stops_at_once_and_leaves_nothing_half_written(
    pack: Pack,
    run: SimpleNamespace,
    comfy: Path,
    tiny_encoders: Path,
    monkeypatch: pytest.MonkeyPatch,
    stage: str,
) -> None:
    from comfy import model_management  # pyright: ignore[reportMissingImports]

    from cntlora_core.metrics import encoders

    kind, settings = CANCELLED_IN[stage]
    inputs = {"subject": subject_of(pack, images=[pictures(4, 44 + len(stage))]).args[0]}
    inputs |= {"images": pictures(40, 16)} if "DINO" in stage else {"model": run.model}
    monkeypatch.setattr(encoders.mini, "encoder_path", lambda kind: tiny_encoders / kind)
    reporter = pack.module("runtime").HostReporter
    plain, after = reporter._say, []

    def press_cancel(self: Any, told: str, done: int, total: int, values: dict) -> None:
        plain(self, told, done, total, values)
        if after or (told == stage and 0 < done + values.get("within", 0.0) < total):
            after.append(told)
            model_management.interrupt_current_processing()

    monkeypatch.setattr(reporter, "_say", press_cancel)
    with pytest.raises(model_management.InterruptProcessingException):
        pack.run(kind, **inputs, **settings)
    assert after == [stage]  # nothing more was done than the step at which it was pressed
    assert not model_management.processing_interrupted()
    assert not [path for path in comfy.rglob("*.tmp") if path.is_file()]
    monkeypatch.setattr(reporter, "_say", plain)
    again = pack.run(kind, **inputs, **settings)
    assert again.ui["images"]


def test_saving_puts_the_lora_where_loaders_look(
    pack: Pack, run: SimpleNamespace, comfy: Path
) -> None:
    import folder_paths  # pyright: ignore[reportMissingImports]

    lora = run.trained.args[0]
    first = pack.run("CNTLoRASave", lora=lora, filename_prefix="dogs/rex").args
    second = pack.run("CNTLoRASave", lora=dict(lora), filename_prefix="dogs/rex").args
    assert first[0] == "dogs/rex_00001_.safetensors"
    assert second[0] == "dogs/rex_00002_.safetensors"
    assert first[0] in folder_paths.get_filename_list("loras")
    with safe_open(first[1], framework="pt") as file:
        assert file.metadata()["modelspec.trigger_phrase"] == "sks"
    with pytest.raises(Exception, match="outside"):
        pack.run("CNTLoRASave", lora=lora, filename_prefix="../../rex")
    report = pack.run("CNTLoRAInspect", lora_name=first[0]).args[0]
    assert "trigger word: sks" in report
    assert "method: cross" in report


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


def test_the_grid_has_a_row_for_each_lora(pack: Pack, run: SimpleNamespace) -> None:
    lora = run.trained.args[0]
    few = {"steps": 1, "prompts": "a dog", "strengths": "0.5, 1", "seeds": "0 1"}
    grid = pack.run("CNTLoRACompare", model=run.model, lora_1=lora, lora_3=dict(lora), **few)
    smaller = pack.run("CNTLoRACompare", model=run.model, lora_1=lora, with_base=False, **few)
    assert grid.args[0].shape[1] > smaller.args[0].shape[1]
    with pytest.raises(ValueError, match="'many' is no number"):
        pack.run("CNTLoRACompare", model=run.model, lora_1=lora, **{**few, "seeds": "many"})


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


def test_previews_of_an_earlier_prompt_are_not_shown(pack: Pack, run: SimpleNamespace) -> None:
    asked = {"training_seed": 6, "validation_prompt": "a red dog"}
    first = train(pack, run.initialized.args[0], run.others.args[0], **asked)
    assert len(first.ui["images"]) == 2
    again = train(
        pack, run.initialized.args[0], run.others.args[0], **{**asked, "validation_prompt": "a cat"}
    )
    assert again.args[2] == first.args[2]
    assert len(again.ui["images"]) == 1  # the loss


def test_a_saved_lora_is_named_as_the_list_of_its_system_names_it(pack: Pack) -> None:
    name = pack.module("lora").listed_name
    windows = PureWindowsPath(r"C:\ComfyUI\output\loras")
    assert name(windows / "dogs" / "rex.safetensors", windows) == r"dogs\rex.safetensors"


def test_a_lora_of_another_model_is_refused_in_few_words(pack: Pack, run: SimpleNamespace) -> None:
    other = {name: torch.zeros(t.shape[0], 7) if "lora_down" in name else t
             for name, t in run.trained.args[0].items()}  # fmt: skip
    with pytest.raises(ValueError, match="does not fit this model") as caught:
        pack.run("CNTLoRASample", model=run.model, lora=other, prompts="a dog", steps=1)
    assert len(str(caught.value)) < 600


def test_a_changed_photo_changes_the_fingerprint(pack: Pack, comfy: Path) -> None:
    folder = comfy / "input" / "my dog"
    folder.mkdir()
    widgets = {"token": ["sks"], "class_name": ["dog"], "captions": [""], "flip": [False],
               "resolution": [0], "crop": [False], "unmasked_weight": [0.1]}  # fmt: skip
    fingerprint = pack.nodes["CNTLoRASubject"].fingerprint_inputs

    def now() -> str:
        return fingerprint(folder=["my dog"], **widgets)

    Image.new("RGB", (40, 40), "red").save(folder / "1.png")
    first = now()
    (folder / "notes.md").write_text("nothing to do with it")
    assert now() == first
    Image.new("RGB", (40, 40), "blue").save(folder / "1.png")
    second = now()
    (folder / "1.txt").write_text("a photo of {token} {class} at night")
    third = now()
    (folder / "masks").mkdir()
    Image.new("L", (40, 40), 255).save(folder / "masks" / "1.png")
    assert len({first, second, third, now()}) == 4
    assert fingerprint(folder=["(none)"], **widgets) == ""
    subject = subject_of(pack, folder="my dog").args[0]
    assert subject.training_prompts.prompts == ("a photo of sks dog at night",)
    assert "my dog" in pack.module("widgets").input_folders()


def test_a_replaced_checkpoint_changes_the_fingerprint(
    pack: Pack, comfy: Path, tiny_model: Path
) -> None:
    copy = comfy / "models" / "diffusers" / "copy"
    shutil.copytree(tiny_model, copy)
    fingerprint = pack.nodes["CNTLoRALoadModel"].fingerprint_inputs
    tiny = fingerprint("diffusers/tiny", "float32")
    assert fingerprint("diffusers/copy", "float32") == tiny
    config = copy / "unet" / "config.json"
    config.write_text(config.read_text("utf-8") + "\n", "utf-8")
    assert fingerprint("diffusers/copy", "float32") != tiny
    assert fingerprint("diffusers/tiny", "bfloat16") != tiny


def test_the_small_model_is_among_the_checkpoints(pack: Pack) -> None:
    widgets = pack.module("widgets")
    assert widgets.SMALL_MODEL in widgets.model_names()
    assert pack.nodes["CNTLoRALoadModel"].validate_inputs(widgets.SMALL_MODEL) is True


def test_the_small_model_is_refused_for_ksampler_in_words(pack: Pack) -> None:
    small = pack.module("widgets").SMALL_MODEL
    model = pack.run("CNTLoRALoadModel", checkpoint=small).args[0]
    with pytest.raises(ValueError, match=r"generate images with Generate Images"):
        pack.run("CNTLoRAOpenModel", model=model)


def test_a_wrong_checkpoint_is_said_when_it_is_queued(pack: Pack, comfy: Path) -> None:
    from safetensors.torch import save_file

    path = comfy / "models" / "checkpoints" / "sdxl.safetensors"
    save_file({"conditioner.embedders.0.x": torch.zeros(1)}, path)
    validate = pack.nodes["CNTLoRALoadModel"].validate_inputs
    assert "Stable Diffusion XL" in validate("sdxl.safetensors")
    assert "no checkpoint" in validate("../../etc/passwd")


@pytest.mark.parametrize(
    ("inputs", "words"),
    [
        ({}, "there are no photos"),
        ({"images": [pictures()], "folder": "my dog"}, "set folder to"),
        ({"images": [pictures()], "captions": "one\ntwo"}, "3 images but 2 captions"),
        ({"images": [pictures()], "masks": [torch.ones(2, 40, 40)]}, "3 images but 2 masks"),
        ({"folder": "example/penguin", "captions": "one"}, "captions are for connected images"),
        ({"folder": "../models"}, "no folder"),
        ({"images": [pictures()], "token": "dog"}, "share the word"),
    ],
)
def test_bad_photos_are_an_error_in_words(pack: Pack, inputs: dict[str, Any], words: str) -> None:
    with pytest.raises((ValueError, OSError), match=words):
        subject_of(pack, **inputs)


def test_bad_settings_are_an_error_in_words(pack: Pack, run: SimpleNamespace) -> None:
    def initialize(**inputs: Any) -> Any:
        subject = run.subject.args[0]
        return pack.run("CNTLoRAInitialize", model=run.model, subject=subject, passes=1, **inputs)

    with pytest.raises(ValueError, match="more than their widths hold"):
        initialize(rank=1280)
    with pytest.raises(ValueError, match="belongs to constraint='shift'"):
        initialize(rank=4, shift=10.0)
    with pytest.raises(ValueError, match="lr_warmup=5 has no effect"):
        train(pack, run.initialized.args[0], lr_warmup=5)
    other = dataclasses.replace(run.initialized.args[0].initialization, model="0" * 16)
    moved = dataclasses.replace(run.initialized.args[0], initialization=other)
    with pytest.raises(ValueError, match="made on another model"):
        train(pack, moved)


def live_bytes() -> int:
    """What the tensors that Python knows of hold."""
    gc.collect()
    storages = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # some objects warn when they are asked for their type
        for found in gc.get_objects():
            if isinstance(found, Tensor) and found.device.type == "cpu":
                storage = found.untyped_storage()
                storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def test_no_model_stays_in_memory(pack: Pack, run: SimpleNamespace) -> None:
    def teach_and_draw(seed: int) -> None:
        model, subject = run.model, run.subject.args[0]
        initialized = pack.run("CNTLoRAInitialize", model=model, subject=subject, rank=4, passes=1)
        lora = train(pack, initialized.args[0], run.others.args[0], training_seed=seed).args[0]
        pack.run("CNTLoRASample", model=model, lora=lora, prompts="a dog", steps=1)
        pack.run("CNTLoRACompare", model=model, lora_1=lora, prompts="a dog", seeds="0", steps=1)

    teach_and_draw(21)  # what libraries keep for themselves
    before = live_bytes()
    teach_and_draw(22)
    weights = sum(path.stat().st_size for path in run.model.path.rglob("*.safetensors"))
    assert live_bytes() - before < 0.01 * weights


def test_memory_is_asked_for_and_given_back_also_after_an_error(
    pack: Pack, monkeypatch: pytest.MonkeyPatch
) -> None:
    runtime = pack.module("runtime")
    said: list[str] = []
    for name in ("unload_all_models", "soft_empty_cache"):
        monkeypatch.setattr(runtime.model_management, name, lambda name=name: said.append(name))

    def fail(reporter: Any) -> None:
        assert not torch.is_inference_mode_enabled()
        assert torch.is_grad_enabled()
        hold_and_fail()

    def hold_and_fail() -> None:
        large = torch.zeros(3)
        raise ValueError(f"holding {large}")

    with torch.inference_mode(), pytest.raises(ValueError, match="holding") as caught:
        runtime.run_heavy(fail)
    assert "large" not in caught.traceback[-1].frame.f_locals
    assert said == ["unload_all_models", "soft_empty_cache", "soft_empty_cache"]


@pytest.mark.parametrize(
    ("raised", "shown"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), torch.OutOfMemoryError),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: 8 GB"), MemoryError),
    ],
)
def test_lack_of_memory_is_said_with_what_to_lower(
    pack: Pack, monkeypatch: pytest.MonkeyPatch, raised: Exception, shown: type[Exception]
) -> None:
    runtime = pack.module("runtime")
    for name in ("unload_all_models", "soft_empty_cache"):
        monkeypatch.setattr(runtime.model_management, name, lambda: None)

    def fail(reporter: Any) -> None:
        raise raised

    with pytest.raises(shown, match=r"lower the resolution.*memory"):
        runtime.run_heavy(fail)


def test_caches_are_emptied_when_the_models_have_gone(
    pack: Pack, run: SimpleNamespace, tiny_encoders: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torch import nn

    from cntlora_core.metrics import encoders

    monkeypatch.setattr(encoders.mini, "encoder_path", lambda kind: tiny_encoders / kind)
    management = pack.module("runtime").model_management
    models: list[int] = []

    def count_models(force: bool = False) -> None:
        alive = [found for found in gc.get_objects() if isinstance(found, nn.Module)]
        models.append(len(alive))

    monkeypatch.setattr(management, "soft_empty_cache", count_models)
    subject = subject_of(pack, images=[pictures(2, 52)]).args[0]
    model, lora = run.model, run.trained.args[0]
    few = {"model": model, "prompts": "a dog", "steps": 1}
    others = pack.run("CNTLoRAClassImages", model=model, subject=subject, count=1, steps=1)
    initialized = pack.run("CNTLoRAInitialize", model=model, subject=subject, rank=4, passes=1)
    train(pack, initialized.args[0], others.args[0], name="counted")
    pack.run("CNTLoRASample", lora=lora, **few)
    pack.run("CNTLoRACompare", lora_1=lora, seeds="0", **few)
    pack.run("CNTLoRAEvaluate", images=pictures(1, 16), subject=subject, prompts="a dog")
    assert len(models) >= 2 * 6  # before and after each
    assert set(models) == {models[0]}
