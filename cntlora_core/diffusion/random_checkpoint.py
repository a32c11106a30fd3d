"""A full-size Stable Diffusion 1.5 checkpoint with random weights, to measure and test with.

    python -m cntlora_core.diffusion.random_checkpoint OUT [--layout single|diffusers|both]
        [--dtype float16|float32] [--seed 0]

writes ``OUT.safetensors`` (single-file layout), the folder ``OUT`` (diffusers layout), or both. It
draws noise; all else about it (names, shapes, sizes, speed, memory) is that of the real model.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

import torch

from cntlora_core.diffusion.family import SD15, family_of
from cntlora_core.diffusion.pipeline import StableDiffusionParts, assemble, build_model
from cntlora_core.diffusion.single_file import save_single_file

Layout = Literal["single", "diffusers", "both"]


def random_parts(configs: Path = SD15.configs, *, seed: int = 0) -> StableDiffusionParts:
    """The parts that a folder of configurations describes, float32, freshly initialised.

    The modules' own initialisation is used under the seed; the global random state is left as it
    was. No weight matrix starts at zero, and the activations stay within float16's range.
    """
    family = family_of(configs)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        models = {part: build_model(part, configs, family) for part in family.parts}
    return assemble(
        models,
        configs,
        family,
        source=f"random weights, seed {seed}",
        fingerprint=f"random-{seed}",
    )


def save_diffusers_folder(parts: StableDiffusionParts, configs: Path, folder: Path) -> None:
    """Writes a diffusers folder: the files of ``configs``, with the parts' weights beside them.

    The tokenizer's files are copied, so that every version of transformers can read them. The
    folder appears complete or not at all.

    Raises:
        FileExistsError: ``folder`` exists.
    """
    if folder.exists():
        raise FileExistsError(f"{folder} exists: delete it or choose another name")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as scratch:
        new = Path(scratch) / folder.name
        shutil.copytree(configs, new, copy_function=shutil.copyfile)
        for part, model in {**parts.networks, "vae": parts.vae}.items():
            model.save_pretrained(new / part, safe_serialization=True)
        for file in new.rglob("*.safetensors"):  # safetensors 0.8 leaves 0600 whatever the umask
            file.chmod((new / "model_index.json").stat().st_mode)
        new.rename(folder)


def write_random_checkpoint(
    out: str | Path,
    *,
    layout: Layout = "both",
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    configs: Path = SD15.configs,
    report: Callable[[str], None] = lambda line: None,
) -> list[Path]:
    """Writes a checkpoint with random weights and returns the paths written.

    Args:
        out: path without suffix; ``.safetensors`` is added for the single file.
        layout: ``single``, ``diffusers`` or ``both``.
        dtype: of the stored weights; they are drawn in float32, so both precisions agree.
        seed: of the weights.
        configs: folder of configurations to build from.
        report: receives one line for each step.

    Raises:
        FileExistsError: an output exists.
    """
    base = Path(out).expanduser()
    base = base.with_suffix("") if base.suffix == ".safetensors" else base
    single, folder = base.with_name(base.name + ".safetensors"), base
    wanted = {"single": [single], "diffusers": [folder], "both": [single, folder]}[layout]
    for path in wanted:
        if path.exists():
            raise FileExistsError(f"{path} exists: delete it or choose another name")
    report(f"drawing weights, seed {seed}")
    parts = random_parts(configs, seed=seed)
    for model in (*parts.networks.values(), parts.vae):  # diffusers' own `to` warns at every cast
        torch.nn.Module.to(model, dtype=dtype)
    for path in wanted:
        report(f"writing {path}")
        if path == single:
            save_single_file(parts, path)
        else:
            save_diffusers_folder(parts, configs, path)
    return wanted


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line of this module; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m cntlora_core.diffusion.random_checkpoint",
        description="Write a full-size SD1.5 checkpoint with random weights.",
    )
    parser.add_argument("out", help="path without suffix")
    parser.add_argument("--layout", choices=["single", "diffusers", "both"], default="both")
    parser.add_argument("--dtype", choices=["float16", "float32"], default="float32")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    start = time.perf_counter()

    def report(line: str) -> None:
        print(f"{time.perf_counter() - start:6.1f} s  {line}", flush=True)

    try:
        write_random_checkpoint(
            options.out,
            layout=options.layout,
            dtype=getattr(torch, options.dtype),
            seed=options.seed,
            report=report,
        )
    except OSError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    report("done")
    return 0


if __name__ == "__main__":
    sys.exit(main())
