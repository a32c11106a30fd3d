"""A run on one of several processes: python -m torch.distributed.run --nproc_per_node 2 ...

many_processes.py ENCODER OUTPUT METHOD
"""

from __future__ import annotations

import sys

from cntlora_core.tasks.recipes import TextSettings
from cntlora_core.tasks.text import train_text

SENTENCES = ("the cat sat on the mat", "a big dog ran", "it is not good", "the red dog saw it")


def rows(count: int) -> list[dict]:
    return [
        {"sentence1": SENTENCES[i % 4], "sentence2": SENTENCES[i % 3], "label": i % 2}
        for i in range(count)
    ]


if __name__ == "__main__":
    encoder, output, method = sys.argv[1:]
    train_text(
        TextSettings(
            task="rte",
            model=encoder,
            output=output,
            method=method,
            rank=2,
            steps=3,
            batch_size=4,
            learning_rate=0.01,
            log_every=1,
            dropout=0.0,
            device="cpu",
        ),
        data={"train": rows(12), "validation": rows(8)},
    )
