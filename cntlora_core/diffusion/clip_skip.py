"""Text states of an earlier layer of the text encoders."""

from __future__ import annotations

import functools
from typing import Any

from cntlora_core.diffusion.family import UNET, Networks, text_layers


def skip_last_layers(networks: Networks, clip_skip: int) -> None:
    """Let text states be those of an earlier layer.

    Pipelines of diffusers have an argument of that name, which leaves negative prompts as they are.
    A text encoder with a projection keeps its layers, since the pooled embedding is that of the
    last one; of any other encoder the layers behind are taken away.

    Args:
        networks: With the text encoders, which are changed in place.
        clip_skip: Which layer is read in place of the one that usually is, counted from that
            towards the first; 1 changes nothing.

    Raises:
        ValueError: No layer would be left.
    """
    skipped = clip_skip - 1
    for text_encoder in (network for name, network in networks.items() if name != UNET):
        path, layers = text_layers(text_encoder)
        if skipped >= len(layers):
            raise ValueError(
                f"clip_skip={clip_skip} leaves no layer of the text encoder's {len(layers)}: "
                f"use at most {len(layers)}"
            )
        if hasattr(text_encoder, "text_projection"):
            if skipped:
                text_encoder.register_forward_hook(functools.partial(_without_last, skipped))
            continue
        kept = len(layers) - skipped
        text_encoder.get_submodule(path.rpartition(".")[0]).layers = layers[:kept]
        text_encoder.config.num_hidden_layers = kept


def _without_last(count: int, _module: Any, _inputs: Any, output: Any) -> Any:
    if output.hidden_states is not None:
        output.hidden_states = output.hidden_states[:-count]
    return output
