"""Compose the training set once and encode it: ``python -m cntlora_core.mini.making.dataset``.

The output folder holds ``captions.txt`` (a line a sample), ``latents.npy`` (float16,
(count, 4, 16, 16), not scaled), ``covers.npy`` (uint8, (count, 16, 16), 255 where objects are all),
``tokenizer/`` and ``dataset.json``.
"""

# diffusers wraps its methods in untyped decorators and annotates tuples of any length as of one:
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false

from __future__ import annotations

import argparse
import json
import re
import shutil
import time
from collections import Counter
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from PIL import Image

from cntlora_core.mini.making.backgrounds import COLOURS, PATTERNS, SCENES
from cntlora_core.mini.making.compose import ComposeConfig, Composer
from cntlora_core.mini.making.object_classes import HELD_OUT_NAMES, OBJECT_CLASSES
from cntlora_core.mini.making.sprites import SpriteSource
from cntlora_core.mini.making.train_autoencoder import to_tensor
from cntlora_core.mini.making.vocabulary import learn_merges, save_tokenizer
from cntlora_core.runtime.files import write_json_atomic

__all__ = ["build", "build_tokenizer", "save_sheet"]

# Words that prompts of personalisation use, beside those of the captions.
_PROMPT_WORDS = (
    "sks zwx ohwx photo picture image rendition close up of the a an on in with and wearing front "
    "top at to for background stripes dots checks gradient drawing painting style shiny wet small "
    "big toy animal thing dark bright night day street jungle rug fabric floor house santa rainbow "
    "outfit glasses view from by"
)


def build_tokenizer(folder: Path, composer: Composer, samples: int = 4000) -> int:
    """Learn the vocabulary from captions; every name and colour is one token a word.

    Returns:
        The number of tokens.
    """
    counts: Counter[str] = Counter()
    for index in range(samples):
        counts.update(re.findall(r"[a-z]+", composer.sample(index)[1]))
    words = [w for t in OBJECT_CLASSES for w in t.name.split()] + [*COLOURS, *PATTERNS]
    words += [w for phrase in SCENES for w in phrase.split()] + _PROMPT_WORDS.split()
    whole = list(dict.fromkeys(words))
    counts = Counter({word: n for word, n in counts.items() if n > 3 or word in whole})
    return save_tokenizer(folder, learn_merges(counts, whole, limit=500))


@torch.no_grad()
def build(
    node_modules: Path,
    vae: AutoencoderKL,
    output: Path,
    count: int,
    seed: int,
    chunk: int = 256,
    tokenizer: Path | None = None,
) -> None:
    """Compose and encode ``count`` samples; begun work is continued.

    Args:
        node_modules: where the emoji are.
        vae: trained autoencoder in float32.
        output: folder to fill.
        count: number of samples.
        seed: of the samples.
        chunk: samples encoded between two notes of progress.
        tokenizer: folder of the tokenizer to go on with; None learns one from the captions.
    """
    output.mkdir(parents=True, exist_ok=True)
    composer = Composer(SpriteSource(node_modules), ComposeConfig(), seed)
    if tokenizer is not None:
        shutil.copytree(tokenizer, output / "tokenizer", dirs_exist_ok=True)
    elif not (output / "tokenizer" / "vocab.json").is_file():
        size = build_tokenizer(output / "tokenizer", composer)
        print(f"vocabulary of {size} tokens", flush=True)
    note, data = output / "dataset.json", output / "latents.npy"
    record = {"count": count, "seed": seed, "compose": asdict(composer.config), "done": 0}
    record["held_out_names"] = list(HELD_OUT_NAMES)
    if note.is_file():
        before = json.loads(note.read_text(encoding="utf-8"))
        if {**before, "done": 0} != record:
            raise ValueError(f"{note} was made with other settings; choose an empty folder")
        record = before
    shape = (count, vae.config.latent_channels, 16, 16)
    mode = "r+" if record["done"] else "w+"
    latents = np.lib.format.open_memmap(data, mode, np.float16, shape)
    covers = np.lib.format.open_memmap(output / "covers.npy", mode, np.uint8, (count, *shape[2:]))
    captions = output / "captions.txt"
    lines: list[str] = []
    if record["done"]:
        lines = captions.read_text(encoding="utf-8").splitlines()[: record["done"]]
    vae = vae.to(memory_format=torch.channels_last)
    began, first = time.monotonic(), record["done"]
    for start in range(first, count, chunk):
        stop = min(start + chunk, count)
        samples = [composer.sample_with_cover(index) for index in range(start, stop)]
        pictures = to_tensor(np.stack([picture for picture, _, _ in samples]))
        cover = np.stack([cover for _, _, cover in samples]).reshape(-1, 16, 4, 16, 4)
        covers[start:stop] = (255 * cover.mean((2, 4))).round()
        parts = [
            vae.encode(part.contiguous(memory_format=torch.channels_last)).latent_dist.mean
            for part in pictures.split(32)
        ]
        latents[start:stop] = torch.cat(parts).half().numpy()
        lines += [caption for _, caption, _ in samples]
        record["done"] = stop
        if stop == count or (stop // chunk) % 10 == 0:
            latents.flush()
            covers.flush()
            captions.write_text("\n".join(lines) + "\n", encoding="utf-8")
            write_json_atomic(note, record)
            left = (time.monotonic() - began) / (stop - first) * (count - stop)
            print(f"{stop} of {count} samples · {left / 60:.1f} min left", flush=True)


def save_sheet(path: Path, pictures: list[Image.Image], columns: int, scale: int = 2) -> None:
    """Pictures of one size, in rows."""
    side = pictures[0].width * scale
    rows = -(-len(pictures) // columns)
    sheet = Image.new("RGB", (columns * (side + 2), rows * (side + 2)), "white")
    for index, picture in enumerate(pictures):
        at = (index % columns * (side + 2), index // columns * (side + 2))
        sheet.paste(picture.resize((side, side), Image.Resampling.NEAREST), at)
    sheet.save(path)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cache", type=Path, required=True, help="folder filled by mini.fetch")
    parser.add_argument("--vae", type=Path, required=True, help="folder of the trained autoencoder")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--count", type=int, default=24_576)
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--tokenizer", type=Path, help="folder of one to use instead of a new one")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    vae = AutoencoderKL.from_pretrained(args.vae)
    modules, words = args.cache / "node_modules", args.tokenizer
    build(modules, vae, args.output, args.count, args.seed, tokenizer=words)


if __name__ == "__main__":
    main()
