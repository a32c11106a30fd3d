"""A small LLaVA that captions pictures: the small CLIP's image tower and a language model.

    python -m cntlora_core.benchmark.tasks.small_llava --cache CACHE --output LLAVA --minutes 30

The image tower stays as it is; projector and language model learn the captions of composed
pictures. ``LLAVA/llava`` is the model with its tokenizer.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import (
    CLIPModel,
    CLIPTokenizer,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
)

from cntlora_core import mini
from cntlora_core.mini.making.collage import Collage
from cntlora_core.mini.making.loop import Budget, ExponentialAverage, optimise
from cntlora_core.mini.making.object_classes import with_article
from cntlora_core.mini.making.sprites import SpriteSource
from cntlora_core.mini.making.train_clip import ClipSet
from cntlora_core.runtime.files import write_json_atomic
from cntlora_core.runtime.memory import keep_freed_memory
from cntlora_core.tasks.answers import collate_answers, encode_answer, generate_answers

IMAGE = "<image>"
PATCHES = 64
"""Image tokens: 8 x 8 patches of 8 pixels."""
PROMPT = "describe the picture :"
LONGEST = 256


@dataclass(frozen=True)
class LlavaSettings:
    """Shape and training; see :class:`~cntlora_core.mini.making.loop.Schedule`.

    Attributes:
        width: Of the language model.
        layers: Of the language model.
        heads: Of the language model.
        batch: Pictures a step.
    """

    width: int = 160
    layers: int = 4
    heads: int = 4
    batch: int = 32
    rate: float = 2e-3
    warmup_steps: int = 50
    decay_from: float = 0.4
    ema: float = 0.99
    seed: int = 9


def build_tokenizer() -> CLIPTokenizer:
    """The small model's, with a token for an image patch."""
    tokenizer = CLIPTokenizer.from_pretrained(mini.model_path() / "tokenizer")
    tokenizer.add_special_tokens({"additional_special_tokens": [IMAGE]})
    return tokenizer


def build_llava(settings: LlavaSettings, tokenizer: CLIPTokenizer) -> LlavaForConditionalGeneration:
    """Projector and language model are random; the image tower is that of the small CLIP."""
    clip = CLIPModel.from_pretrained(mini.encoder_path("clip"), dtype=torch.float32)
    text = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=settings.width,
        intermediate_size=3 * settings.width,
        num_hidden_layers=settings.layers,
        num_attention_heads=settings.heads,
        max_position_embeddings=LONGEST,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.eos_token_id,
    )
    model = LlavaForConditionalGeneration(
        LlavaConfig(
            vision_config=clip.config.vision_config,
            text_config=text,
            image_token_index=tokenizer.convert_tokens_to_ids(IMAGE),
            vision_feature_layer=-1,
        )
    )
    tower = dict(model.named_modules())["model.vision_tower"]
    tower.load_state_dict(_tower_weights(clip, tower))
    for parameter in tower.parameters():
        parameter.requires_grad_(False)
    return model


def load_llava(folder: Path) -> tuple[LlavaForConditionalGeneration, CLIPTokenizer]:
    """What the training has left.

    Raises:
        FileNotFoundError: if it is not there; says how to make it.
    """
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(
            f"there is no small LLaVA in {folder}: make it by python -m "
            "cntlora_core.benchmark.tasks.small_llava"
        )
    model = LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
    return model, CLIPTokenizer.from_pretrained(folder)


def encode(tokenizer: CLIPTokenizer, captions: Sequence[str]) -> dict[str, Tensor]:
    """Image, prompt and caption of each; the loss counts the caption alone.

    Returns:
        ``input_ids``, ``attention_mask`` and ``labels``, (n, tokens), filled up on the right.
    """
    prompt = IMAGE * PATCHES + PROMPT
    rows = [encode_answer(tokenizer, prompt, caption, LONGEST) for caption in captions]
    return collate_answers(rows, tokenizer.pad_token_id)


def describe(
    model: Any, tokenizer: CLIPTokenizer, batch: Mapping[str, Tensor]
) -> tuple[list[str], list[str], list[str]]:
    """Of each picture of a batch the prompt, the caption, and the model's own by greedy search."""
    return generate_answers(model, batch, tokenizer, max_new_tokens=16)


def compose_captioned(
    known: ClipSet, collage: Collage, rng: np.random.Generator, count: int
) -> tuple[Tensor, list[str]]:
    """Pictures of any object on any background, (count, 3, 64, 64), and their captions."""
    names = rng.choice(known.names.unique().numpy(), size=count)
    options = [(known.names == name).nonzero()[:, 0] for name in names]
    chosen = torch.stack([at[rng.integers(len(at))] for at in options])
    behind = torch.from_numpy(rng.integers(len(known.backgrounds), size=count))
    captions = [
        f"a photo of {with_article(known.classes[name].name)} {known.backgrounds[b].phrase}"
        for name, b in zip(names.tolist(), behind.tolist(), strict=True)
    ]
    return collage.compose(chosen, behind), captions


def caption_loss(
    model: LlavaForConditionalGeneration,
    pictures: Tensor,
    ids: Tensor,
    mask: Tensor,
    labels: Tensor,
) -> Tensor:
    """Cross-entropy of the captions' tokens, a scalar."""
    found = model(input_ids=ids, attention_mask=mask, pixel_values=pictures, labels=labels)
    return found.loss


def train(node_modules: Path, output: Path, settings: LlavaSettings, budget: Budget) -> None:
    """Train until the budget is spent; a state in the folder is gone on from.

    Args:
        node_modules: Where the emoji are.
        output: Folder of state, log and result.
        settings: Shape and training.
        budget: Minutes or steps.
    """
    output.mkdir(parents=True, exist_ok=True)
    tokenizer, known = build_tokenizer(), ClipSet(SpriteSource(node_modules))
    collage = Collage(known.sprites, known.backgrounds, settings.seed)
    torch.manual_seed(settings.seed)
    model = build_llava(settings, tokenizer)

    def batch_of(step: int) -> tuple[Tensor, ...]:
        rng = np.random.default_rng((settings.seed, step))
        pictures, captions = compose_captioned(known, collage, rng, settings.batch)
        return pictures, *encode(tokenizer, captions).values()

    def note(average: ExponentialAverage) -> None:
        final = build_llava(settings, tokenizer)
        final.load_state_dict({**model.state_dict(), **average.shadow})
        torch.manual_seed(settings.seed + 1)
        rng = np.random.default_rng(settings.seed + 1)
        pictures, captions = compose_captioned(known, collage, rng, 200)
        batch = encode(tokenizer, captions) | {"pixel_values": pictures}
        pairs = list(zip(describe(final.eval(), tokenizer, batch)[2], captions, strict=True))
        right = {
            "whole": sum(t == c for t, c in pairs) / len(pairs),
            "object": sum(t.split()[:5] == c.split()[:5] for t, c in pairs) / len(pairs),
        }
        final.save_pretrained(output / "llava")
        tokenizer.save_pretrained(output / "llava")
        record = {"settings": asdict(settings), "steps": budget.step, "examples": pairs[:20]}
        write_json_atomic(output / "llava.json", record | right)
        print(json.dumps(right), flush=True)

    optimise(
        output,
        {name: p for name, p in model.named_parameters() if p.requires_grad},
        partial(caption_loss, model),
        batch_of,
        settings,
        budget,
        note,
        workers=1,
        report_every=25,
    )


def _tower_weights(clip: CLIPModel, tower: torch.nn.Module) -> dict[str, Tensor]:
    """Under the names that this version of transformers gives a tower by itself."""
    weights = clip.vision_model.state_dict()
    nested = next(iter(tower.state_dict())).startswith("vision_model.")
    return {f"vision_model.{name}" if nested else name: t for name, t in weights.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cache", type=Path, required=True, help="folder filled by mini.fetch")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--steps", type=int, help="end after so many steps instead")
    args = parser.parse_args()
    keep_freed_memory()
    budget = Budget(args.minutes, args.steps)
    train(args.cache / "node_modules", args.output, LlavaSettings(), budget)


if __name__ == "__main__":
    main()
