"""Teach the text encoder its captions' words first.

``python -m cntlora_core.mini.making.pretrain_text``

From the end token on, every state is to tell which tokens the caption holds. Cross-attention,
which looks at all 77 states alike before it has learnt anything, then sees the caption at once.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from torch.nn import Linear, functional
from transformers import CLIPTextModel, CLIPTokenizer

from cntlora_core.mini.making.train_diffusion import DiffusionConfig, build_text_encoder, tokenize
from cntlora_core.runtime.files import save_safetensors_atomic

__all__ = ["pretrain", "words_loss"]


def words_loss(
    text_encoder: CLIPTextModel, head: torch.nn.Linear, tokens: torch.Tensor, end: int
) -> torch.Tensor:
    """Cross-entropy of the tokens' presence, from eight states at or after the first end token.

    Args:
        text_encoder: stock CLIP text model.
        head: (width) -> (vocabulary).
        tokens: (n, 77) ids, padded with the end token.
        end: id of the end token.

    Returns:
        Scalar.
    """
    states = text_encoder(tokens).last_hidden_state
    present = torch.zeros(len(tokens), head.out_features).scatter_(1, tokens, 1.0)
    first = (tokens == end).int().argmax(1)
    offset = (torch.rand(len(tokens), 7) * (tokens.shape[1] - first)[:, None]).long()
    at = torch.cat([first[:, None], first[:, None] + offset], dim=1)
    chosen = states.gather(1, at[..., None].expand(-1, -1, states.shape[-1]))
    wanted = present[:, None].expand(-1, at.shape[1], -1)
    weight = torch.tensor(20.0)
    return functional.binary_cross_entropy_with_logits(head(chosen), wanted, pos_weight=weight)


def pretrain(
    data: Path,
    output: Path,
    config: DiffusionConfig,
    steps: int = 400,
    batch: int = 32,
    learning_rate: float = 1e-3,
    start: dict[str, torch.Tensor] | None = None,
) -> float:
    """Train and write ``output`` (safetensors, the text encoder's own names).

    Args:
        data: folder made by ``mini.dataset``.
        output: file to write.
        config: shape of the text encoder and the seed.
        steps: steps of AdamW.
        batch: captions a step.
        learning_rate: peak learning rate; it falls to zero in a straight line.
        start: weights to go on from.

    Returns:
        The last loss.
    """
    tokenizer = CLIPTokenizer.from_pretrained(data / "tokenizer")
    captions = (data / "captions.txt").read_text(encoding="utf-8").splitlines()
    captions = list(dict.fromkeys(captions))
    rows = tokenize(tokenizer, captions)
    torch.manual_seed(config.seed)
    text_encoder = build_text_encoder(config, tokenizer)
    if start is not None:
        text_encoder.load_state_dict(start)
    head = Linear(config.text_width, len(tokenizer))
    parameters = [*text_encoder.parameters(), *head.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=0.01)
    rng = np.random.default_rng(config.seed)
    value = float("nan")
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * min(1, (step + 1) / 40) * (1 - step / steps)
        chosen = torch.from_numpy(rng.integers(len(rows), size=batch))
        loss = words_loss(text_encoder, head, rows[chosen].long(), tokenizer.eos_token_id)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        value = loss.item()
        if (step + 1) % 50 == 0:
            print(f"step {step + 1} of {steps} · loss {value:.4f}", flush=True)
    save_safetensors_atomic(text_encoder.state_dict(), output)
    return value


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder made by mini.dataset")
    parser.add_argument("--output", type=Path, required=True, help="file to write")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    pretrain(args.data, args.output, DiffusionConfig(), args.steps)


if __name__ == "__main__":
    main()
