"""What is said about the photos: the subject's prompts, caption files, and what a tokenizer keeps.

The words follow DreamBooth (arXiv 2208.12242, section 3.1): "a photo of [token] [class]" for the
subject's photos, "a photo of a [class]" for the class (prior) images.
"""

from __future__ import annotations

import codecs
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CAPTION_SUFFIXES = (".txt", ".caption")
CLIP_LIMIT = 77  # positions of CLIP's text encoder, start and end token included
_UNSET_LIMIT = 100_000  # transformers gives 1e30 where a tokenizer has no length of its own


@dataclass(frozen=True)
class SubjectPrompts:
    """The prompts of one subject.

    Attributes:
        instance_prompt: for the subject's photos, "a photo of sks dog".
        class_prompt: for the class (prior) images, "a photo of a dog".
        token: the word that stands for the subject, "sks"; None where full prompts were given.
        class_name: what the subject is, "dog"; None where full prompts were given.
    """

    instance_prompt: str
    class_prompt: str
    token: str | None
    class_name: str | None


@dataclass(frozen=True)
class CaptionFile:
    """A caption file: `text` is None where it says nothing usable, `problem` what to tell."""

    path: Path
    text: str | None
    problem: str | None


@dataclass(frozen=True)
class TrainingPrompts:
    """One prompt per photo, and what the user should know about them."""

    prompts: tuple[str, ...]
    warnings: tuple[str, ...]


@dataclass(frozen=True)
class PromptLength:
    """How much of a prompt the text encoder reads.

    Attributes:
        n_tokens: tokens of the whole prompt, start and end token included.
        limit: tokens that fit, start and end token included (77 for SD1.5).
        dropped_text: the end of the prompt that does not fit; empty if all of it does.
    """

    n_tokens: int
    limit: int
    dropped_text: str


@dataclass(frozen=True, eq=False)
class EncodedPrompts:
    """Token ids, int64 (n, limit), padded; `messages` says what was cut off which prompt."""

    input_ids: Tensor
    messages: tuple[str, ...]


def subject_prompts(
    token: str | None = None,
    class_name: str | None = None,
    instance_prompt: str | None = None,
    class_prompt: str | None = None,
) -> SubjectPrompts:
    """The subject's prompts from a token and a class name, or from two full prompts.

    White space is tidied and an article before the class name is dropped ("a dog" is "dog").

    Raises:
        ValueError: both ways at once, half of one, a token that shares a word with the class
            name, or a placeholder in a full prompt.
    """
    token, class_name, instance_prompt, class_prompt = (
        _tidy(name, text)
        for name, text in (
            ("token", token),
            ("class name", class_name),
            ("instance prompt", instance_prompt),
            ("class prompt", class_prompt),
        )
    )
    given_words, given_prompts = (token, class_name), (instance_prompt, class_prompt)
    if any(given_words) and any(given_prompts):
        raise ValueError(
            f"token {token!r}, class name {class_name!r} and full prompts {instance_prompt!r}, "
            f"{class_prompt!r} were given together. {_TWO_WAYS}, not a mixture."
        )
    if instance_prompt and class_prompt:
        for text in given_prompts:
            if text and _PLACEHOLDER.search(text):
                raise ValueError(
                    f"the prompt {text!r} has a placeholder, but full prompts come without a token "
                    "and a class name to put there. Write the words out."
                )
        return SubjectPrompts(instance_prompt, class_prompt, None, None)
    if not (token and class_name):
        named = (
            ("a token", token),
            ("a class name", class_name),
            ("an instance prompt", instance_prompt),
            ("a class prompt", class_prompt),
        )
        given = " and ".join(f"{name} ({text!r})" for name, text in named if text) or "nothing"
        raise ValueError(f"the subject has no prompts: {given} was given. {_TWO_WAYS}.")
    class_name = re.sub(r"^(a|an|the) (?=.)", "", class_name, flags=re.IGNORECASE)
    _check_token(token, class_name)
    return SubjectPrompts(
        instance_prompt=f"a photo of {token} {class_name}",
        class_prompt=f"a photo of {with_article(class_name)}",
        token=token,
        class_name=class_name,
    )


def read_caption(image_path: str | Path) -> CaptionFile | None:
    """The caption beside an image: `name.txt`, else `name.caption`, with the image's stem.

    UTF-8 with or without a byte order mark, or UTF-16 with one; lines are joined by spaces.

    Returns:
        None if there is no such file. A file that is empty or cannot be read gives `text` None
        and a `problem`: the photo then takes the instance prompt.
    """
    image_path = Path(image_path)
    beside = [
        image_path.with_name(image_path.stem + suffix)
        for lower in CAPTION_SUFFIXES
        for suffix in (lower, lower.upper())
    ]
    found = [path for path in beside if path.is_file()]
    if not found:
        return None
    path = found[0]
    fallback = f"the instance prompt is used for {image_path.name}"
    try:
        text = " ".join(_decode(path.read_bytes()).split())
    except UnicodeDecodeError as error:
        problem = f"caption file {path.name} is not UTF-8 (byte {error.start}); {fallback}"
        return CaptionFile(path, None, problem + ". Save it as UTF-8.")
    except OSError as error:
        reason = error.strerror or error
        return CaptionFile(
            path, None, f"cannot read caption file {path.name}: {reason}; {fallback}"
        )
    if not text:
        return CaptionFile(path, None, f"caption file {path.name} is empty; {fallback}")
    others = [other for other in found[1:] if other.suffix.lower() != path.suffix.lower()]
    problem = f"{path.name} is used, {others[0].name} is not" if others else None
    return CaptionFile(path, text, problem)


def training_prompts(
    captions: Sequence[str | None], subject: SubjectPrompts, names: Sequence[str] | None = None
) -> TrainingPrompts:
    """The prompt of each photo: its caption with `{token}` and `{class}` filled in, or, without
    a caption, the instance prompt. `names` are the photos' names for the messages.

    Raises:
        ValueError: a placeholder that full prompts leave without a value.
    """
    labels = [f"photo {i + 1}" for i in range(len(captions))] if names is None else names
    prompts: list[str] = []
    warnings: list[str] = []
    for caption, label in zip(captions, labels, strict=True):
        if caption is None or not caption.strip():
            prompts.append(subject.instance_prompt)
            continue
        if _PLACEHOLDER.search(caption) and subject.token is None:
            raise ValueError(
                f"the caption of {label} has a placeholder ({caption!r}), but the subject was "
                "given by full prompts. Give a token and a class name, or write the words out."
            )
        prompt = fill_placeholders(caption, subject)
        if subject.token and not _contains_word(prompt, subject.token):
            warnings.append(
                f"the caption of {label} does not contain the token {subject.token!r}: nothing "
                f"ties this photo to it ({prompt!r})"
            )
        prompts.append(prompt)
    return TrainingPrompts(tuple(prompts), tuple(warnings))


def fill_placeholders(text: str, subject: SubjectPrompts) -> str:
    """The text with the subject's token and class name in place of `{token}` and `{class}`."""
    values = {"{token}": subject.token or "", "{class}": subject.class_name or ""}
    return _PLACEHOLDER.sub(lambda found: values[found[0]], text)


def check_prompt_length(prompt: str, tokenizer: PreTrainedTokenizerBase) -> PromptLength:
    """Counts a prompt's tokens and finds the text that the text encoder would not see."""
    limit, fast = _limit(tokenizer), bool(tokenizer.is_fast)
    kept = limit - tokenizer.num_special_tokens_to_add()
    encoded = tokenizer(
        prompt,
        add_special_tokens=False,
        truncation=False,
        verbose=False,
        return_offsets_mapping=fast,
    )
    ids = list(encoded["input_ids"])
    dropped = ""
    if len(ids) > kept:
        if fast:
            dropped = prompt[encoded["offset_mapping"][kept][0] :].strip()
        else:
            dropped = str(tokenizer.decode(ids[kept:])).strip()
    return PromptLength(len(ids) + limit - kept, limit, dropped)


def encode_prompts(prompts: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> EncodedPrompts:
    """Token ids of the prompts, int64 (n, limit), with start and end token and padding.

    What does not fit is cut at the end, and said in `messages`, one for each such prompt, for the
    caller to show.

    Raises:
        TypeError: one string instead of several, or something that is no string.
    """
    if isinstance(prompts, str) or not all(isinstance(prompt, str) for prompt in prompts):
        raise TypeError(f"prompts must be a sequence of strings, got {prompts!r}")
    limit = _limit(tokenizer)
    if not prompts:
        return EncodedPrompts(torch.empty(0, limit, dtype=torch.int64), ())
    messages: list[str] = []
    for prompt in dict.fromkeys(prompts):
        length = check_prompt_length(prompt, tokenizer)
        if length.n_tokens > limit:
            messages.append(
                f"the prompt {_shortened(prompt)!r} has {length.n_tokens} tokens and the text "
                f"encoder reads {limit}: its end {_shortened(length.dropped_text)!r} is left out"
            )
    ids = tokenizer(
        list(prompts), padding="max_length", max_length=limit, truncation=True, return_tensors="pt"
    )["input_ids"]
    return EncodedPrompts(torch.as_tensor(ids, dtype=torch.int64), tuple(messages))


def token_note(
    token: str, tokenizer: PreTrainedTokenizerBase, *, max_pieces: int = 2
) -> str | None:
    """A note if the tokenizer does not know the token or splits it in more than `max_pieces`."""
    ids = list(tokenizer(token, add_special_tokens=False, verbose=False)["input_ids"])
    if not ids or tokenizer.unk_token_id in ids:
        return f"the tokenizer cannot express the token {token!r}: choose letters such as 'sks'"
    if len(ids) <= max_pieces:
        return None
    pieces = " + ".join(
        piece.removesuffix("</w>") for piece in tokenizer.convert_ids_to_tokens(ids)
    )
    return (
        f"the token {token!r} is read as {len(ids)} pieces ({pieces}): the subject is spread over "
        "all of them. A short rare word such as 'sks' binds better."
    )


def with_article(noun: str) -> str:
    """ "dog" -> "a dog", "apple" -> "an apple", by sound: "an hour", "a unicorn"."""
    plain = unicodedata.normalize("NFKD", noun).casefold()
    consonant = re.match(r"(uni(?![ndm])|use|usu|ute|uti|ura|uku|eu|ewe|one\b|once\b|u\b)", plain)
    vowel = re.match(r"[aeiou]|hour|heir|honest|honou?r|x-?ray", plain)
    return f"an {noun}" if vowel and not consonant else f"a {noun}"


_PLACEHOLDER = re.compile(r"\{token\}|\{class\}")
_TWO_WAYS = (
    "Give a token and a class name (such as 'sks' and 'dog'), or an instance prompt and a class "
    "prompt (such as 'a photo of sks dog' and 'a photo of a dog')"
)


def _tidy(name: str, text: str | None) -> str | None:
    if text is not None and not isinstance(text, str):
        raise TypeError(f"the {name} must be a string, got {type(text).__name__}")
    return " ".join(text.split()) or None if text else None


def _check_token(token: str, class_name: str) -> None:
    shared = _words(token) & _words(class_name)
    if shared:
        raise ValueError(
            f"the token {token!r} and the class name {class_name!r} share the word "
            f"{sorted(shared)[0]!r}: training the token would overwrite what the model knows of "
            "the class. Choose a rare token such as 'sks'."
        )


def _words(text: str) -> set[str]:
    """Words as CLIP's tokenizer splits them: runs of letters, case folded; digits stand apart."""
    text = unicodedata.normalize("NFC", text).casefold()
    letters = "".join(c if unicodedata.category(c)[0] in "LM" else " " for c in text)
    return set(letters.split()) or set(text.split())


def _contains_word(text: str, word: str) -> bool:
    text, word = (unicodedata.normalize("NFC", part).casefold() for part in (text, word))
    return re.search(rf"(?<!\w){re.escape(word)}(?!\w)", text) is not None


def _decode(content: bytes) -> str:
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return content.decode("utf-16")
    return content.decode("utf-8-sig")


def _limit(tokenizer: PreTrainedTokenizerBase) -> int:
    limit = tokenizer.model_max_length
    return int(limit) if limit < _UNSET_LIMIT else CLIP_LIMIT


def _shortened(text: str, length: int = 120) -> str:
    return text if len(text) <= length else f"{text[: length - 4]} ..."
