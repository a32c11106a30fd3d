"""Conversations about images, to batches whose labels are the answers alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from cntlora_core.tasks.answers import IGNORED, use_padding
from cntlora_core.tasks.images import open_picture
from cntlora_core.tasks.loading import load_part, pillow_processors

LLAVA_TEMPLATE = (
    "{% for message in messages %}{{ message['role'].upper() + ': ' }}"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}{{ '<image>\n' }}"
    "{% endif %}{% endfor %}{% for part in message['content'] %}{% if part['type'] == 'text' %}"
    "{{ part['text'] + ' ' }}{% endif %}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
"""LLaVA-1.5's, for a processor that has no template."""

Turn = tuple[str, str]
"""A prompt and its answer."""


@dataclass(frozen=True)
class Conversation:
    """An image, or none, and what is said of it.

    Attributes:
        image: A path, a Pillow image, or what a data set holds of one; None for none.
        turns: Prompts and answers, in order.
    """

    image: Any
    turns: tuple[Turn, ...]


@dataclass(frozen=True)
class Chat:
    """A processor as the recipes need it.

    Attributes:
        processor: A processor of transformers' with image processor, tokenizer and chat template.
    """

    processor: Any

    @property
    def tokenizer(self) -> Any:
        return self.processor.tokenizer

    def __call__(self, samples: list[Conversation]) -> Mapping[str, Any]:
        """A batch: what the model reads, with labels of the answers alone."""
        texts, spans = zip(*(self._written(sample) for sample in samples), strict=True)
        images = [[] if s.image is None else [open_picture(s.image)] for s in samples]
        special = not texts[0].startswith(self.tokenizer.bos_token or "\0")
        options: dict[str, Any] = {"add_special_tokens": special}
        if any(images):
            options["images"] = images
        batch = dict(self.processor(text=list(texts), padding=True, return_tensors="pt", **options))
        batch["labels"] = torch.stack(
            [
                self._labels(text, found, ids, mask, special)
                for text, found, ids, mask in zip(
                    texts, spans, batch["input_ids"], batch["attention_mask"], strict=True
                )
            ]
        )
        return batch

    def _written(self, sample: Conversation) -> tuple[str, list[tuple[int, int]]]:
        """A conversation as text, and where the answers stand in it."""
        messages: list[dict[str, Any]] = []
        spans = []
        end = self._end
        for i, (prompt, answer) in enumerate(sample.turns):
            shown = [{"type": "image"}] if i == 0 and sample.image is not None else []
            content = [*shown, {"type": "text", "text": prompt}]
            messages.append({"role": "user", "content": content})
            before = self._render(messages, True)
            said = {"type": "text", "text": answer + end}
            messages.append({"role": "assistant", "content": [said]})
            after = self._render(messages, False).rstrip()
            if not after.startswith(before):
                raise ValueError(
                    "the chat template does not write a conversation as a continuation of its "
                    f"prompt, so that the answers cannot be told from it: {before[-40:]!r}"
                )
            spans.append((len(before), len(after)))
        return self._render(messages, False).rstrip(), spans

    @property
    def _end(self) -> str:
        """What ends an answer, where the template itself does not."""
        said = {"role": "assistant", "content": [{"type": "text", "text": "yes"}]}
        asked = {"role": "user", "content": [{"type": "text", "text": "no"}]}
        written = self._render([asked, said], False).rstrip()
        return self.tokenizer.eos_token if written.endswith("yes") else ""

    def _render(self, messages: list[dict[str, Any]], prompt: bool) -> str:
        return self.processor.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=prompt
        )

    def _labels(
        self,
        text: str,
        spans: Sequence[tuple[int, int]],
        ids: Tensor,
        mask: Tensor,
        special: bool,
    ) -> Tensor:
        """The labels of one row; images take many tokens, all of them before the first answer."""
        plain = self.tokenizer(text, add_special_tokens=special, return_offsets_mapping=True)
        labels = torch.full_like(ids, IGNORED)
        own = mask.nonzero()[:, 0]  # where the row is not padding
        more = len(own) - len(plain["input_ids"])
        for i, (first, last) in enumerate(plain["offset_mapping"]):
            if any(first < end and last > begin for begin, end in spans):
                where = own[i + more]
                if int(ids[where]) != plain["input_ids"][i]:
                    raise ValueError(
                        "the processor's tokens after the image are not those of its tokenizer: "
                        f"{self.tokenizer.decode(ids[where])!r} stands for {text[first:last]!r}"
                    )
                labels[where] = ids[where]
        return labels


@dataclass(frozen=True)
class Pair:
    """An image processor and a tokenizer in the place of a processor.

    For models whose chat template writes the tokens of an image itself, as GLM-Edge-V's does.
    """

    image_processor: Any
    tokenizer: Any

    def apply_chat_template(self, messages: list[dict[str, Any]], **options: Any) -> str:
        return self.tokenizer.apply_chat_template(messages, **options)

    def __call__(self, text: list[str], images: Any = None, **options: Any) -> Mapping[str, Any]:
        batch = dict(self.tokenizer(text, **options))
        if images is not None:
            flat = [image for row in images for image in row]
            found = self.image_processor(flat, return_tensors="pt")
            batch["pixel_values"] = found["pixel_values"]
        return batch


def load_chat(source: str, trust_remote_code: bool = False) -> Chat:
    """The processor of a vision-language model.

    Raises:
        FileNotFoundError: if there is none.
    """
    import transformers

    options: dict[str, Any] = {"trust_remote_code": trust_remote_code} if trust_remote_code else {}
    processor = load_part(
        transformers.AutoProcessor, source, "a model with a processor", **_without_torchvision(),
        **options,
    )  # fmt: skip
    if not hasattr(processor, "image_processor"):  # the tokenizer alone
        images = load_part(
            transformers.AutoImageProcessor, source, "a model with an image processor", **options
        )
        processor = Pair(images, processor)
    return chat_of(processor)


def chat_of(processor: Any) -> Chat:
    """A processor with what it may lack: a padding token, and LLaVA's chat template."""
    use_padding(processor.tokenizer)
    owner = processor if getattr(processor, "chat_template", None) else processor.tokenizer
    if getattr(owner, "chat_template", None) is None:
        if "<image>" not in processor.tokenizer.get_vocab():
            raise ValueError("the processor has no chat template: set processor.chat_template")
        processor.chat_template = LLAVA_TEMPLATE
    return Chat(processor)


def _without_torchvision() -> dict[str, Any]:
    from importlib.util import find_spec

    return {} if find_spec("torchvision") else pillow_processors()


class SentenceEncoder:
    """Sentences to features: the mean of an encoder's token states, of length 1.

    Args:
        source: Hub id or folder of a transformers encoder that was trained for this, such as
            ``sentence-transformers/all-MiniLM-L6-v2``.
        device: Where it works.
    """

    def __init__(self, source: str, device: str | torch.device = "cpu") -> None:
        from transformers import AutoModel, AutoTokenizer

        what = "an encoder of sentences"
        self.tokenizer = load_part(AutoTokenizer, source, what)
        self.model = load_part(AutoModel, source, what, dtype=torch.float32).to(device).eval()

    @torch.no_grad()
    def __call__(self, sentences: Sequence[str]) -> Tensor:
        """Features, float32 (n, d)."""
        tokens = self.tokenizer(
            list(sentences), padding=True, truncation=True, return_tensors="pt"
        ).to(self.model.device)
        states = self.model(**tokens)[0].float()
        mask = tokens["attention_mask"][:, :, None].float()
        return nn.functional.normalize((states * mask).sum(1) / mask.sum(1), dim=1).cpu()
