"""Write the trained parts as a diffusers folder: ``python -m cntlora_core.mini.making.export``.

Averaged weights in float16 safetensors, in the layout that Stable Diffusion 1.5 has, next to
``training.json``, which says what made them.
"""

# diffusers wraps its methods in untyped decorators and annotates tuples of any length as of one:
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from pathlib import Path

import diffusers
import numpy as np
import torch
import transformers
from diffusers import AutoencoderKL, StableDiffusionPipeline
from PIL import Image, ImageDraw
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import CLIPTokenizer

from cntlora_core.mini.making.train_diffusion import (
    DiffusionConfig,
    build_scheduler,
    build_text_encoder,
    build_unet,
    trained_parameters,
)
from cntlora_core.runtime.files import write_json_atomic

__all__ = ["SHEET_PROMPTS", "assemble", "export", "generate_sheet"]

SHEET_PROMPTS = (
    "a photo of a dog on a red background",
    "a photo of a cat on blue stripes",
    "a photo of an apple on a yellow background",
    "a car on the beach",
    "a photo of a penguin in the snow",
    "a photo of a dog in the snow",
    "an owl in the forest",
    "a photo of a dragon on green dots",
    "a fox on the grass",
    "a rocket in space",
    "a photo of a house in the mountains",
    "a teddy bear on a wooden floor",
    "a photo of a banana on purple checks",
    "a fish in the water",
    "a photo of a purple elephant on a white background",
    "a cat wearing a hat on a green background",
    "a dog and an apple on a gray background",
    "a photo of a tree in the desert",
    "a strawberry on a pink background",
    "a photo of a clock in front of a brick wall",
    "a balloon in the sky",
    "a hat on orange stripes",
    "a photo of a sks dog on a blue background",
    "a cake on a black background",
)


def assemble(run: Path, vae: Path, tokenizer: Path) -> StableDiffusionPipeline:
    """The pipeline of the averaged weights of a run, in float32.

    Args:
        run: output folder of ``mini.train_diffusion``.
        vae: folder of the autoencoder.
        tokenizer: folder of the tokenizer.
    """
    record = json.loads((run / "diffusion.json").read_text(encoding="utf-8"))
    config = DiffusionConfig.from_json(record["config"])
    words = CLIPTokenizer.from_pretrained(tokenizer)
    unet, text_encoder = build_unet(config), build_text_encoder(config, words)
    named = trained_parameters(unet, text_encoder)
    with safe_open(run / "state.safetensors", "pt") as file, torch.no_grad():
        for name, parameter in named.items():
            parameter.copy_(file.get_tensor(f"ema/{name}"))
    pipeline = StableDiffusionPipeline(
        vae=AutoencoderKL.from_pretrained(vae),
        text_encoder=text_encoder.eval(),
        tokenizer=words,
        unet=unet.eval(),
        scheduler=build_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def export(
    run: Path,
    vae: Path,
    data: Path,
    autoencoder_record: Path,
    target: Path,
    started_from: Path | None = None,
) -> None:
    """Write the folder beside ``target``, then put it in ``target``'s place.

    Args:
        run: output folder of ``mini.train_diffusion``.
        vae: folder of the autoencoder.
        data: output folder of ``mini.dataset``.
        autoencoder_record: ``autoencoder.json`` of the autoencoder's run.
        target: the model folder to make or replace.
        started_from: the model folder that the run went on from, whose record is kept.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=".model-", dir=target.parent))
    temporary.chmod(0o755)
    pipeline = assemble(run, vae, data / "tokenizer").to(dtype=torch.float16)
    pipeline.save_pretrained(temporary, safe_serialization=True)
    _name_as_stable_diffusion(temporary / "text_encoder" / "model.safetensors")
    for path in temporary.glob("*/config.json"):
        _make_portable(path)
    for path in temporary.rglob("*.safetensors"):
        path.chmod(0o644)
    shutil.rmtree(temporary / "tokenizer")
    shutil.copytree(data / "tokenizer", temporary / "tokenizer")
    records = {
        "autoencoder": json.loads(autoencoder_record.read_text(encoding="utf-8")),
        "dataset": json.loads((data / "dataset.json").read_text(encoding="utf-8")),
        "diffusion": json.loads((run / "diffusion.json").read_text(encoding="utf-8")),
        "versions": {
            "torch": torch.__version__,
            "diffusers": diffusers.__version__,
            "transformers": transformers.__version__,
            "numpy": np.__version__,
        },
    }
    if started_from is not None:
        before = json.loads((started_from / "training.json").read_text(encoding="utf-8"))
        kept = ["dataset", "diffusion", "started_from"]
        if before["autoencoder"] != records["autoencoder"]:
            kept.insert(0, "autoencoder")
        records["started_from"] = {name: before[name] for name in kept if name in before}
    write_json_atomic(temporary / "training.json", records)
    old = target.with_name(f".{target.name}-old")
    shutil.rmtree(old, ignore_errors=True)
    if target.exists():
        target.rename(old)
    temporary.rename(target)
    shutil.rmtree(old, ignore_errors=True)


def _make_portable(path: Path) -> None:
    """Take out of a part's config where it lay, and what makes it load in half precision.

    transformers 5 loads in the data type that a config names, diffusers in float32: a pipeline
    loaded without ``torch_dtype`` would have parts of both.
    """
    config = json.loads(path.read_text(encoding="utf-8"))
    config.pop("_name_or_path", None)
    if "dtype" in config:
        config["dtype"] = "float32"
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _name_as_stable_diffusion(path: Path) -> None:
    """Put ``text_model.`` before the text encoder's names, as in SD1.5's own files.

    transformers 5 writes them without; it reads both, and other tools read only the longer ones.
    """
    tensors = load_file(path)
    longer = {f"text_model.{name.removeprefix('text_model.')}": t for name, t in tensors.items()}
    save_file(longer, path, metadata={"format": "pt"})


def generate_sheet(
    pipeline: StableDiffusionPipeline,
    path: Path,
    prompts: tuple[str, ...] = SHEET_PROMPTS,
    each: int = 2,
    seed: int = 0,
    steps: int = 25,
    guidance: float = 2.5,
) -> None:
    """Draw every prompt ``each`` times and lay the pictures out with their prompts."""
    pictures: list[list[Image.Image]] = []
    for prompt in prompts:
        images = pipeline(
            [prompt] * each,
            num_inference_steps=steps,
            guidance_scale=guidance,
            height=64,
            width=64,
            generator=torch.Generator().manual_seed(seed),
        ).images
        pictures.append([picture.resize((96, 96), Image.Resampling.BICUBIC) for picture in images])
    columns = 6
    rows = -(-len(prompts) // columns)
    width, height = each * 97 + 5, 112
    sheet = Image.new("RGB", (columns * width, rows * height), "white")
    pen = ImageDraw.Draw(sheet)
    for index, row in enumerate(pictures):
        left, top = index % columns * width, index // columns * height
        for at, picture in enumerate(row):
            sheet.paste(picture, (left + 97 * at, top))
        words = prompts[index].removeprefix("a photo of ")
        pen.text((left + 1, top + 97), words, "black", font_size=9)
    sheet.save(path)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", type=Path, required=True, help="folder of mini.train_diffusion")
    parser.add_argument("--autoencoder", type=Path, required=True, help="of mini.train_autoencoder")
    parser.add_argument("--data", type=Path, required=True, help="folder of mini.dataset")
    parser.add_argument("--target", type=Path, help="model folder to make or replace")
    parser.add_argument("--started-from", type=Path, help="model folder that the run went on from")
    parser.add_argument("--sheet", type=Path, help="picture of samples to generate")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    vae = args.autoencoder / "vae"
    if args.target:
        record = args.autoencoder / "autoencoder.json"
        export(args.run, vae, args.data, record, args.target, args.started_from)
        print(f"wrote {args.target}")
    if args.sheet:
        generate_sheet(assemble(args.run, vae, args.data / "tokenizer"), args.sheet)
        print(f"wrote {args.sheet}")


if __name__ == "__main__":
    main()
