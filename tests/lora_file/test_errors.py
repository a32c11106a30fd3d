"""What is no LoRA file, or cannot become one, is refused in words."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from cntlora_core.lora_file.writing import (
    LoRALayer,
    collect_adapter,
    read_lora_file,
    write_lora_file,
)

from .conftest import PATH, adapted

GOOD = f"lora_unet_{PATH.replace('.', '_')}_to_q"
FACTORS = {f"{GOOD}.lora_down.weight": torch.ones(2, 3), f"{GOOD}.lora_up.weight": torch.ones(5, 2)}


@pytest.mark.parametrize(
    ("tensors", "says"),
    [
        ({"model.diffusion_model.out.2.weight": torch.ones(2)}, "full Stable Diffusion checkpoint"),
        ({"encoder.weight": torch.ones(2)}, "no LoRA.*encoder.weight"),
        ({}, "no tensors"),
        ({**FACTORS, f"{GOOD}.dora_scale": torch.ones(5, 1)}, "DoRA"),
        ({f"{GOOD}.hada_w1_a": torch.ones(2, 2)}, "LoHa"),
        ({f"{GOOD}.lokr_w1": torch.ones(2, 2)}, "LoKr"),
        ({**FACTORS, f"{GOOD}.diff_b": torch.ones(5)}, "full difference"),
        ({f"{GOOD}.lora_down.weight": torch.ones(2, 3)}, "no up factor"),
        ({**FACTORS, f"{GOOD}.lora_up.weight": torch.ones(5, 3)}, f"{GOOD}.*must agree"),
        ({**FACTORS, "what.is.this": torch.ones(1)}, r"1 keys that fit no layer.*what\.is\.this"),
        ({**FACTORS, "lora_unet_conv_in.alpha": torch.ones(())}, r"conv_in \(alpha\)"),
        (
            {"lora_unet_double_blocks_0_img_mod_lin.lora_down.weight": torch.ones(2, 3)},
            "another model",
        ),
        (
            {
                **FACTORS,
                f"unet.{PATH}.to_q.lora_A.weight": torch.ones(2, 3),
                f"unet.{PATH}.to_q.lora_B.weight": torch.ones(5, 2),
            },
            "two LoRA layers for",
        ),
    ],
)
def test_says_what_a_file_is_instead(tmp_path: Path, tensors: dict[str, Tensor], says: str) -> None:
    path = tmp_path / "thing.safetensors"
    save_file(tensors, path)
    with pytest.raises(ValueError, match=says) as caught:
        read_lora_file(path)
    assert str(path) in str(caught.value)


def test_unknown_keys_are_listed_when_allowed(tmp_path: Path) -> None:
    path = tmp_path / "lora.safetensors"
    save_file({**FACTORS, "what.is.this": torch.ones(1)}, path)
    with pytest.warns(UserWarning, match=r"what\.is\.this"):
        found = read_lora_file(path, strict=False)
    assert found.unknown_keys == ("what.is.this",)
    assert list(found.layers) == [f"unet.{PATH}.to_q"]


def test_unreadable_files(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no LoRA at"):
        read_lora_file(tmp_path / "absent.safetensors")
    torch.save({"a": torch.ones(1)}, tmp_path / "a.ckpt")
    torch.save({"a": torch.ones(1)}, tmp_path / "b.ckpt", _use_new_zipfile_serialization=False)
    for name in ("a.ckpt", "b.ckpt"):
        with pytest.raises(ValueError, match="is a pickle"):
            read_lora_file(tmp_path / name)
    (tmp_path / "text.safetensors").write_text("version https://git-lfs.github.com/spec/v1")
    (tmp_path / "empty.safetensors").write_bytes(b"")
    for name in ("text", "empty"):
        with pytest.raises(ValueError, match="is no safetensors file"):
            read_lora_file(tmp_path / f"{name}.safetensors")
    save_file(FACTORS, tmp_path / "whole.safetensors")
    content = (tmp_path / "whole.safetensors").read_bytes()
    for length in (40, len(content) - 1):
        (tmp_path / "cut.safetensors").write_bytes(content[:length])
        with pytest.raises(ValueError, match="cut off or damaged"):
            read_lora_file(tmp_path / "cut.safetensors")
    with pytest.raises(ValueError, match="no peft folder"):
        read_lora_file(tmp_path)


def test_peft_file_without_its_config_or_of_another_method(base, tmp_path: Path) -> None:
    folder = write_lora_file(tmp_path / "a", collect_adapter(adapted(base)[0]), layout="peft")
    config = folder / "unet" / "adapter_config.json"
    settings = json.loads(config.read_text())
    for change, says in (({"peft_type": "LOHA"}, "type LOHA"), ({"use_dora": True}, "DoRA")):
        config.write_text(json.dumps({**settings, **change}))
        with pytest.raises(ValueError, match=says):
            read_lora_file(folder)
    config.unlink()
    with pytest.raises(ValueError, match=r"scale stands in adapter_config\.json"):
        read_lora_file(folder)


def test_writer_refuses(base, tmp_path: Path) -> None:
    layer = LoRALayer(torch.ones(2, 3), torch.ones(5, 2), 1.0)
    path = tmp_path / "lora.safetensors"
    good = {"unet.conv_in": layer}
    large = {"unet.conv_in": LoRALayer(torch.full((2, 3), 1e6), torch.ones(5, 2), 1.0)}
    odd = {"unet.conv_in": LoRALayer(torch.full((2, 3), float("nan")), torch.ones(5, 2), 1.0)}
    for layers, options, says in (
        ({}, {}, "no LoRA layers"),
        ({"down_blocks.0": layer}, {}, "no name of an adapted module"),
        ({"text_encoder.text_model.encoder": layer}, {}, "without text_model"),
        (good, {"layout": "a1111"}, "kohya, diffusers or peft"),
        (good, {"dtype": torch.float64}, "float32, float16 or bfloat16"),
        (large, {"dtype": torch.float16}, "too large for torch.float16"),
        (odd, {}, "unet.conv_in: a value of lora_down is not finite"),
        (good, {"layout": "peft"}, "peft layout is a folder"),
    ):
        with pytest.raises(ValueError, match=says):
            write_lora_file(path, layers, **options)  # pyright: ignore[reportArgumentType]
        assert not path.exists()
    with pytest.raises(ValueError, match="is a folder"):
        write_lora_file(tmp_path, good)
    write_lora_file(tmp_path / "peft", {"text_encoder.encoder.x": layer}, layout="peft")
    with pytest.raises(ValueError, match="already holds an adapter for text_encoder"):
        write_lora_file(tmp_path / "peft", good, layout="peft")
