"""What peft itself can initialise, as methods: the baselines, and runs to compare with.

The records stand here; the modules that compute are imported when a method is used, so that the
registry can be read without torch.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

from cntlora_core.methods.base import Method


def later(module: str, function: str, *options: str) -> Callable[..., Any]:
    """A function of a module beside this one, which is imported when it is called."""

    def call(*arguments: Any) -> Any:
        found = getattr(import_module(f"cntlora_core.methods.{module}"), function)
        return found(*arguments, *options)

    return call


def pissa_with_iterations(iterations: int) -> Method:
    """PiSSA by a randomised SVD of that many subspace iterations."""
    name = f"pissa_niter_{iterations}"
    return Method(
        name=name,
        description=f"PiSSA by a fast, randomised SVD ({iterations} subspace iterations)",
        paper="arXiv 2404.02948",
        needs="nothing",
        rewrites_base=True,
        b_initialized_to_zero=False,
        image_file="trained minus initial",
        plan=later("from_weights", "plan_from_weights", name, name),
    )


PEFT_METHODS = (
    Method(
        name="lora",
        description="Plain LoRA: random down matrix (Kaiming-uniform), nothing added at first",
        paper="arXiv 2106.09685",
        needs="nothing",
        rewrites_base=False,
        b_initialized_to_zero=True,
        plan=later("from_weights", "plan_lora"),
    ),
    Method(
        name="lora_gaussian",
        description="Plain LoRA with a normal random down matrix, as in diffusers' scripts",
        paper="arXiv 2106.09685",
        needs="nothing",
        rewrites_base=False,
        b_initialized_to_zero=True,
        plan=later("from_weights", "plan_from_weights", "lora_gaussian", "gaussian"),
    ),
    Method(
        name="lora_orthogonal",
        description="Plain LoRA, both matrices random but orthogonal to each other; even ranks",
        paper="https://datta0.github.io/posts/rethink-lora-init/",
        needs="nothing",
        rewrites_base=False,
        b_initialized_to_zero=False,
        plan=later("from_weights", "plan_from_weights", "lora_orthogonal", "orthogonal"),
    ),
    Method(
        name="pissa",
        description="PiSSA: trains the strongest directions of each weight (exact SVD)",
        paper="arXiv 2404.02948",
        needs="nothing",
        rewrites_base=True,
        b_initialized_to_zero=False,
        image_file="trained minus initial",
        plan=later("from_weights", "plan_from_weights", "pissa", "pissa"),
    ),
    pissa_with_iterations(16),
    Method(
        name="olora",
        description="OLoRA: initialised from the QR decomposition of each weight",
        paper="arXiv 2406.01775",
        needs="nothing",
        rewrites_base=True,
        b_initialized_to_zero=False,
        image_file="trained minus initial",
        plan=later("from_weights", "plan_from_weights", "olora", "olora"),
    ),
    Method(
        name="eva",
        description="EVA: reads along the directions your data varies in; shares ranks out by them",
        paper="arXiv 2410.07170",
        needs="activations",
        rewrites_base=False,
        b_initialized_to_zero=True,
        plan=later("eva", "plan_eva"),
    ),
    Method(
        name="corda_ipm",
        description="CorDA, instruction-previewed: trains the directions your data uses most",
        paper="arXiv 2406.05223",
        needs="activations",
        rewrites_base=True,
        b_initialized_to_zero=False,
        image_file="trained minus initial",
        plan=later("corda", "plan_corda", "ipm"),
    ),
    Method(
        name="corda_kpm",
        description="CorDA, knowledge-preserved: trains the directions your data uses least",
        paper="arXiv 2406.05223",
        needs="activations",
        rewrites_base=True,
        b_initialized_to_zero=False,
        image_file="trained minus initial",
        plan=later("corda", "plan_corda", "kpm"),
    ),
    Method(
        name="lora_ga",
        description="LoRA-GA: initialised along the gradient of full fine-tuning on your data",
        paper="arXiv 2407.05000",
        needs="gradients",
        rewrites_base=True,
        b_initialized_to_zero=False,
        image_file="trained minus initial",
        plan=later("lora_ga", "plan_lora_ga"),
    ),
    Method(
        name="loftq",
        description="LoftQ: makes up for what 4-bit quantisation loses (needs bitsandbytes)",
        paper="arXiv 2310.08659",
        needs="nothing",
        rewrites_base=True,
        b_initialized_to_zero=False,
        preserves_output=False,
        image_file=None,
        image_file_note=(
            "the frozen weights become quantised ones, and their difference from the checkpoint "
            "has no low rank that a LoRA file could hold"
        ),
        wrap=later("comparisons", "wrap_loftq"),
    ),
    Method(
        name="dora",
        description="DoRA: plain LoRA that also trains the length of each output's weights",
        paper="arXiv 2402.09353",
        needs="nothing",
        rewrites_base=False,
        b_initialized_to_zero=True,
        image_file=None,
        image_file_note=(
            "loaders read the lengths that a DoRA file adds (dora_scale) differently, or leave "
            "them out: what they load would not be the trained model"
        ),
        wrap=later("comparisons", "wrap_dora"),
    ),
    Method(
        name="adalora",
        description="AdaLoRA: starts wide and prunes ranks while it trains",
        paper="arXiv 2303.10512",
        needs="nothing",
        rewrites_base=False,
        b_initialized_to_zero=False,
        peft_type="ADALORA",
        image_file=None,
        image_file_note="its training loop must prune ranks, which the image trainer does not do",
        wrap=later("comparisons", "wrap_adalora"),
    ),
    Method(
        name="vera",
        description="VeRA: random matrices shared by all layers; trains two vectors for each",
        paper="arXiv 2310.11454",
        needs="nothing",
        rewrites_base=False,
        b_initialized_to_zero=False,
        peft_type="VERA",
        image_file=None,
        image_file_note="image tools know no shared matrices, and the image trainer trains none",
        wrap=later("comparisons", "wrap_vera"),
    ),
    Method(
        name="bitfit",
        description="BitFit: trains the model's biases alone, without an adapter",
        paper="arXiv 2106.10199",
        needs="nothing",
        rewrites_base=False,
        b_initialized_to_zero=True,
        peft_type=None,
        image_file=None,
        image_file_note="it changes biases, and leaves a checkpoint, not a LoRA",
        wrap=later("comparisons", "wrap_bitfit"),
    ),
    Method(
        name="full",
        description="Full fine-tuning: trains every weight of the model, without an adapter",
        paper="",
        needs="nothing",
        rewrites_base=False,
        b_initialized_to_zero=True,
        peft_type=None,
        image_file=None,
        image_file_note="it changes whole weights, and leaves a checkpoint, not a LoRA",
        wrap=later("comparisons", "wrap_full"),
    ),
)
