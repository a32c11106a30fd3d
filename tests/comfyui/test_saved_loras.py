"""LoRAs that are saved, with a picture beside them."""

from __future__ import annotations

from pathlib import Path, PureWindowsPath
from types import SimpleNamespace

import pytest
from PIL import Image
from safetensors import safe_open

from .conftest import Pack


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


def test_a_thumbnail_lies_beside_the_lora_and_its_copies(
    pack: Pack, run: SimpleNamespace, comfy: Path
) -> None:
    picture = Path(run.trained.args[2]).with_suffix(".jpg")
    saved = pack.run("CNTLoRASave", lora=run.trained.args[0], filename_prefix="pictured").args[1]
    for path in (picture, Path(saved).with_suffix(".jpg")):
        with Image.open(path) as thumbnail:
            assert (thumbnail.format, thumbnail.size) == ("JPEG", (32, 32))
    assert not [path for path in comfy.rglob("*.tmp") if path.is_file()]


@pytest.mark.parametrize("name", ["rex.jpg", "rex.png", "rex.preview.webp"])
def test_a_user_s_picture_stays(pack: Pack, tmp_path: Path, name: str) -> None:
    leave = pack.module("thumbnail").leave_thumbnail
    lora = tmp_path / "rex.safetensors"
    Image.new("RGB", (8, 8), "red").save(tmp_path / name)
    before = (tmp_path / name).read_bytes()
    leave(lora, Image.new("RGB", (8, 8), "blue"))
    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert (tmp_path / name).read_bytes() == before


def test_a_thumbnail_of_ours_is_replaced(pack: Pack, tmp_path: Path) -> None:
    leave = pack.module("thumbnail").leave_thumbnail
    for color in ("red", "blue"):
        leave(tmp_path / "rex.safetensors", Image.new("RGB", (8, 8), color))
    with Image.open(tmp_path / "rex.jpg") as picture:
        red, _, blue = picture.getpixel((4, 4))  # pyright: ignore[reportGeneralTypeIssues]
    assert blue > red


def test_a_saved_lora_is_named_as_the_list_of_its_system_names_it(pack: Pack) -> None:
    name = pack.module("lora").listed_name
    windows = PureWindowsPath(r"C:\ComfyUI\output\loras")
    assert name(windows / "dogs" / "rex.safetensors", windows) == r"dogs\rex.safetensors"
