"""Train the small CLIP pair: ``python -m cntlora_core.mini.making.train_clip``.

It tells how well a picture fits a caption (CLIP-T) and how alike two pictures are (CLIP-I). Its
text tower is not the one that conditions the UNet.
"""

# transformers' forward methods are wrapped in untyped decorators:
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false

from __future__ import annotations

import argparse
import json
import shutil
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    CLIPTokenizer,
    CLIPVisionConfig,
)

try:
    from transformers import CLIPImageProcessorPil
except ImportError:  # transformers 4
    from transformers import CLIPImageProcessor as CLIPImageProcessorPil

from cntlora_core.mini.making.collage import Collage, CollageConfig, every_background
from cntlora_core.mini.making.loop import Budget, ExponentialAverage, optimise
from cntlora_core.mini.making.object_classes import HELD_OUT_NAMES, trained_classes, with_article
from cntlora_core.mini.making.sprites import STYLES, SpriteSource
from cntlora_core.runtime.files import write_json_atomic
from cntlora_core.runtime.memory import keep_freed_memory

__all__ = ["ClipConfig", "build_clip", "clip_loss", "retrieval", "train"]

LENGTH = 24  # tokens of a caption; those of the set have at most 20


@dataclass(frozen=True)
class ClipConfig:
    """Shape and training of the pair; see :class:`~cntlora_core.mini.making.loop.Schedule`.

    Attributes:
        width: of the vision tower.
        layers: of the vision tower.
        heads: of the vision tower.
        patch: side of a patch in pixels.
        text_width: of the text tower.
        text_layers: of the text tower.
        embedding: width of the common space.
        batch: pictures a step.
        muon: Muon for matrices and kernels instead of AdamW.
        bfloat16: autocast of both towers; for processors with AMX.
        dye_share: part of the objects whose hues are turned.
    """

    width: int = 160
    layers: int = 5
    heads: int = 5
    patch: int = 8
    text_width: int = 96
    text_layers: int = 2
    embedding: int = 128
    batch: int = 128
    rate: float = 1e-3
    warmup_steps: int = 150
    decay_from: float = 0.3
    ema: float = 0.99
    muon: bool = False
    bfloat16: bool = False
    dye_share: float = 0.0
    seed: int = 4


def build_clip(config: ClipConfig, tokenizer: CLIPTokenizer) -> CLIPModel:
    """A CLIPModel for 64-pixel pictures."""
    text = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=config.text_width,
        intermediate_size=4 * config.text_width,
        num_hidden_layers=config.text_layers,
        num_attention_heads=4,
        max_position_embeddings=77,
        projection_dim=config.embedding,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    vision = CLIPVisionConfig(
        image_size=64,
        patch_size=config.patch,
        hidden_size=config.width,
        intermediate_size=4 * config.width,
        num_hidden_layers=config.layers,
        num_attention_heads=config.heads,
        projection_dim=config.embedding,
    )
    return CLIPModel(
        CLIPConfig(
            text_config=text.to_dict(),
            vision_config=vision.to_dict(),
            projection_dim=config.embedding,
        )
    )


def clip_loss(
    model: CLIPModel,
    config: ClipConfig,
    every_name: Tensor,
    pictures: Tensor,
    tokens: Tensor,
    same: Tensor,
    names: Tensor,
) -> Tensor:
    """Contrastive loss both ways, and that of finding a picture's name among all.

    Captions that are alike count as right for one another. Backgrounds alone tell most pictures of
    a batch apart, so that the contrastive loss asks little for the names.

    Args:
        model: the pair.
        config: whether to compute in bfloat16.
        every_name: (names, length) ids of "a photo of a ..." for every name.
        pictures: (n, 3, 64, 64) in -1..1.
        tokens: (n, length) ids.
        same: (n,) one number for each different caption.
        names: (n,) which name a picture shows.

    Returns:
        Scalar.
    """
    with torch.autocast("cpu", torch.bfloat16, enabled=config.bfloat16):
        image = model.get_image_features(pixel_values=pictures)
        text, noun = (model.get_text_features(input_ids=ids) for ids in (tokens, every_name))
    image, text, noun = (_unit(features) for features in (image, text, noun))
    scale = model.logit_scale.exp()
    wanted = (same[:, None] == same).float()
    wanted = wanted / wanted.sum(1, keepdim=True)
    logits = scale * image @ text.T
    across = functional.cross_entropy(logits, wanted)
    contrast = (across + functional.cross_entropy(logits.T, wanted)) / 2
    return contrast + functional.cross_entropy(scale * image @ noun.T, names)


def encode(tokenizer: CLIPTokenizer, captions: list[str]) -> Tensor:
    """(n, LENGTH) ids."""
    rows = tokenizer(captions, padding="max_length", max_length=LENGTH, truncation=True)
    return torch.tensor(rows["input_ids"])


class ClipSet:
    """Sprites with their names.

    Args:
        source: where the emoji are.
        kept_out: the 3D drawings that no training shows, instead of all others.
    """

    def __init__(self, source: SpriteSource, kept_out: bool = False) -> None:
        self.classes = trained_classes()
        self.sprites, names = [], []
        for style in ("3d",) if kept_out else STYLES:
            for index, object_class in enumerate(self.classes):
                for emoji in object_class.emoji:
                    if source.is_shown(style, emoji) != kept_out:
                        self.sprites.append(source.sprite(style, emoji))
                        names.append(index)
        self.names = torch.tensor(names)
        self.backgrounds = every_background()

    def captions(self, sprites: Tensor, behind: Tensor, rng: np.random.Generator) -> list[str]:
        """With the object, the background, or both."""
        rows = []
        for name, background in zip(self.names[sprites].tolist(), behind.tolist(), strict=True):
            noun = with_article(self.classes[name].name)
            phrase = self.backgrounds[background].phrase
            opening = str(rng.choice(["a photo of ", "a photo of ", ""]))
            chance = rng.random()
            if chance < 0.35:
                phrase = ""
            elif chance < 0.45:
                noun = "a thing"
            rows.append(f"{opening}{noun} {phrase}".strip())
        return rows


@torch.no_grad()
def retrieval(
    model: CLIPModel,
    tokenizer: CLIPTokenizer,
    pictures: ClipSet,
    collage: Collage,
    names: int = 100,
    count: int = 1000,
) -> float:
    """Share of pictures whose own name is nearest among ``names`` captions "a photo of a ...".

    Args:
        model: the pair, in eval mode.
        tokenizer: of its text tower.
        pictures: which sprite has which name.
        collage: of these sprites.
        names: how many names there are to choose among, the first ones.
        count: number of pictures.
    """
    captions = [f"a photo of {with_article(t.name)}" for t in pictures.classes[:names]]
    text = _unit(model.get_text_features(input_ids=encode(tokenizer, captions)))
    known = (pictures.names < names).nonzero()[:, 0]
    chosen = known[torch.randint(len(known), (count,))]
    images = collage.compose(chosen, torch.randint(len(collage.backgrounds), (count,)))
    image = torch.cat([_unit(model.get_image_features(pixel_values=x)) for x in images.split(128)])
    return ((image @ text.T).argmax(1) == pictures.names[chosen]).float().mean().item()


def _unit(features: object) -> Tensor:
    rows = features if isinstance(features, Tensor) else features.pooler_output
    return functional.normalize(rows.float(), dim=-1)


def train(
    node_modules: Path,
    tokenizer_folder: Path,
    output: Path,
    config: ClipConfig,
    budget: Budget,
    workers: int = 2,
    start_from: Path | None = None,
) -> None:
    """Train until the budget is spent; ``output/clip`` is the pair with tokenizer and processor.

    Args:
        node_modules: where the emoji are.
        tokenizer_folder: the small model's tokenizer.
        output: folder of state, log and result.
        config: shape and training.
        budget: minutes or steps.
        workers: processes that share a batch.
        start_from: folder of a pair to go on from with a new optimizer.
    """
    output.mkdir(parents=True, exist_ok=True)
    source = SpriteSource(node_modules)
    tokenizer = CLIPTokenizer.from_pretrained(tokenizer_folder)
    known, unseen = ClipSet(source), ClipSet(source, kept_out=True)
    dyed = CollageConfig(dye_share=config.dye_share)
    collage = Collage(known.sprites, known.backgrounds, config.seed, dyed)
    few = CollageConfig(per_background=2)
    checks = {
        "retrieval": (known, Collage(known.sprites, known.backgrounds, config.seed + 1, few)),
        "retrieval_kept_out": (
            unseen,
            Collage(unseen.sprites, unseen.backgrounds, config.seed + 2, few),
        ),
    }
    torch.manual_seed(config.seed)
    model = build_clip(config, tokenizer)
    if config.bfloat16:
        model.set_attn_implementation("eager")  # faster than the fused one in bfloat16
    if start_from is not None:
        before = CLIPModel.from_pretrained(start_from, dtype=torch.float32)
        model.load_state_dict(before.state_dict())

    phrases = [f"a photo of {with_article(object_class.name)}" for object_class in known.classes]

    def batch_of(step: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        rng = np.random.default_rng((config.seed, step))
        names = torch.from_numpy(rng.integers(len(known.classes), size=config.batch))
        options = [(known.names == name).nonzero()[:, 0] for name in names]
        chosen = torch.stack([at[rng.integers(len(at))] for at in options])
        behind = torch.from_numpy(rng.integers(len(known.backgrounds), size=config.batch))
        captions = known.captions(chosen, behind, rng)
        number = {caption: index for index, caption in enumerate(dict.fromkeys(captions))}
        same = torch.tensor([number[caption] for caption in captions])
        return collage.compose(chosen, behind), encode(tokenizer, captions), same, names

    def note(average: ExponentialAverage) -> None:
        final = build_clip(config, tokenizer)
        final.load_state_dict({**model.state_dict(), **average.shadow})
        final.eval()
        torch.manual_seed(config.seed + 1)
        found = {
            name: round(retrieval(final, tokenizer, pictures, check), 4)
            for name, (pictures, check) in checks.items()
        }
        final.half().save_pretrained(output / "clip")
        shutil.copytree(tokenizer_folder, output / "clip", dirs_exist_ok=True)
        processor = CLIPImageProcessorPil(
            size={"shortest_edge": 64},
            crop_size={"height": 64, "width": 64},
            image_mean=[0.5] * 3,
            image_std=[0.5] * 3,
        )
        processor.save_pretrained(output / "clip")
        record = {"config": asdict(config), "steps": budget.step, "seconds": round(budget.elapsed)}
        record["held_out_names"] = list(HELD_OUT_NAMES)
        write_json_atomic(output / "clip.json", {**record, **found})
        print(json.dumps(found), flush=True)

    optimise(
        output,
        dict(model.named_parameters()),
        partial(clip_loss, model, config, encode(tokenizer, phrases)),
        batch_of,
        config,
        budget,
        note,
        workers=workers,
        report_every=25,
        muon=config.muon,
    )


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cache", type=Path, required=True, help="folder filled by mini.fetch")
    parser.add_argument("--tokenizer", type=Path, required=True, help="the small model's")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=20)
    parser.add_argument("--steps", type=int, help="end after so many steps instead")
    parser.add_argument("--workers", type=int, default=2, help="processes")
    parser.add_argument("--start-from", type=Path, help="folder of a pair to go on from")
    parser.add_argument("--config", type=Path, help="JSON of a ClipConfig")
    args = parser.parse_args()
    values = json.loads(args.config.read_text(encoding="utf-8")) if args.config else {}
    keep_freed_memory()
    modules, budget = args.cache / "node_modules", Budget(args.minutes, args.steps)
    config = ClipConfig(**values)
    train(modules, args.tokenizer, args.output, config, budget, args.workers, args.start_from)


if __name__ == "__main__":
    main()
