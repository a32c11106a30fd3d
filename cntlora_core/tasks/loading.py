"""Pre-trained models, tokenizers and processors, by hub id or folder."""

from __future__ import annotations

from typing import Any

import torch
import transformers

from cntlora_core.methods import get_method
from cntlora_core.runtime.hub import why_not_fetched
from cntlora_core.runtime.reading import user_path
from cntlora_core.runtime.seeds import torch_seed
from cntlora_core.tasks.settings import Plan


def load_model(kind: Any, plan: Plan, **options: Any) -> Any:
    """A pre-trained model in the data type of the settings, in float32 for methods without an
    adapter; new layers depend on the seed alone.

    Args:
        kind: A class of transformers', such as ``AutoModelForCausalLM``.
        plan: Says which model.
        options: Passed on.

    Raises:
        FileNotFoundError: if there is no such model.
    """
    torch.manual_seed(torch_seed(plan.settings.seed))
    dtype = getattr(torch, plan.preset.base_precision)
    if get_method(plan.preset.method).peft_type is None:
        dtype = torch.float32  # its own weights are trained: fewer bits would round steps away
    return load_part(kind, plan.preset.model, "a model of transformers", dtype=dtype, **options)


def load_part(kind: Any, source: str, what: str, **options: Any) -> Any:
    """What ``kind.from_pretrained`` gives.

    Raises:
        FileNotFoundError: if there is no such thing, in words.
    """
    path = user_path(source)
    try:
        return kind.from_pretrained(str(path) if path.is_dir() else source, **options)
    except OSError as error:
        if path.is_dir():
            raise FileNotFoundError(f"{source} is not {what}: {error}") from error
        raise FileNotFoundError(f"{source}: {why_not_fetched(error, what)}") from error


def pillow_processors() -> dict[str, Any]:
    """What ``from_pretrained`` of an image processor takes for the Pillow form."""
    old = int(transformers.__version__.partition(".")[0]) < 5
    return {"use_fast": False} if old else {"backend": "pil"}
