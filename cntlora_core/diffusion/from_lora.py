"""The LoRA file that a training goes on from: which one, what is in it, and where that belongs."""

from __future__ import annotations

from pathlib import Path

from cntlora_core.diffusion.family import Family, Networks
from cntlora_core.diffusion.fingerprint import fingerprint_files
from cntlora_core.diffusion.presets import PAPER
from cntlora_core.diffusion.settings import AdapterSettings
from cntlora_core.layers.attachment import AttachmentPoint, attachment_point
from cntlora_core.lora_file.families import UNET
from cntlora_core.lora_file.find_lora import find_lora
from cntlora_core.lora_file.names import TEXT_MODEL
from cntlora_core.lora_file.reading import (
    PEFT_CONFIG,
    LoRALayers,
    parts_of_folder,
    read_lora_file,
)
from cntlora_core.runtime.reading import user_path


def fingerprint_from_lora(settings: AdapterSettings) -> str | None:
    """16 hex digits that identify the content of the LoRA that is gone on from; None without one.

    Raises:
        FileNotFoundError: nothing is there.
        ValueError: as :func:`layers_to_go_on_from`.
    """
    if settings.from_lora is None:
        return None
    layers_to_go_on_from(settings)
    path = _place(settings.from_lora)
    if not path.is_dir():
        return fingerprint_files([path])
    weights = parts_of_folder(path).values()
    return fingerprint_files([f for w in weights for f in (w, w.with_name(PEFT_CONFIG))])


def layers_to_go_on_from(settings: AdapterSettings) -> LoRALayers:
    """The layers of the LoRA that is gone on from, by canonical names.

    Raises:
        FileNotFoundError: nothing is there.
        ValueError: it is no plain LoRA; has no layer of the UNet; has a layer that is
            switched off, which no training can move; has layers of the text encoder, and these
            are not to be trained; or was to have another rank.
    """
    assert settings.from_lora is not None
    path = _place(settings.from_lora)
    layers = read_lora_file(path).layers
    if not any(name.startswith(f"{UNET}.") for name in layers):
        raise ValueError(f"{path} changes nothing of the UNet: a training cannot go on from it")
    texts = [name for name in layers if not name.startswith(f"{UNET}.")]
    if texts and not settings.train_text_encoder:
        raise ValueError(
            f"{path} changes {len(texts)} layers of the text encoder, which would be lost: leave "
            "train_text_encoder on (--train-text-encoder)"
        )
    for name, layer in layers.items():
        if not layer.scaling > 0:
            raise ValueError(
                f"{path}: {name} has alpha {layer.alpha:g}; a positive one is needed to go on"
            )
    ranks = sorted({layer.rank for layer in layers.values()})
    asked = settings.rank not in (AdapterSettings.rank, PAPER["adapter"]["rank"])
    if asked and ranks != [settings.rank]:
        raise ValueError(
            f"rank={settings.rank}, but the layers of {path} have "
            f"{f'rank {ranks[0]}' if len(ranks) == 1 else f'ranks {ranks[0]} to {ranks[-1]}'}, "
            "which stay as they are: leave rank out"
        )
    return layers


def require_family(settings: AdapterSettings, family: Family) -> None:
    """Refuse to go on from a LoRA of another family of models, before any work.

    Raises:
        ValueError: it is one.
    """
    if settings.from_lora is None:
        return
    path = _place(settings.from_lora)
    files = read_lora_file(path).family
    if files != family.files:
        raise ValueError(
            f"{path} is a LoRA for {files.title}, and the model is a {family.files.title}: "
            "go on from one for this model"
        )


def points_of_layers(
    networks: Networks, family: Family, layers: LoRALayers, source: str
) -> tuple[list[AttachmentPoint], LoRALayers]:
    """Where each layer of a LoRA belongs: attachment points of the networks, layers by their names.

    Args:
        networks: Denoiser and text encoders.
        family: What they are.
        layers: By canonical names.
        source: What messages call the LoRA.

    Returns:
        The points, and the layers by their names. A layer that the models lack and that changes
        nothing, as one behind the text encoder's last under clip_skip, is left away, and so is
        one of a module that nothing reads.

    Raises:
        ValueError: for any other layer that the models lack.
    """
    modules = {
        f"{component}.{name.removeprefix(TEXT_MODEL)}": (f"{component}.{name}", module)
        for component, network in networks.items()
        for name, module in network.named_modules()
    }
    missing = [n for n, layer in layers.items() if n not in modules and layer.up.any()]
    if missing:
        raise ValueError(
            f"{source} changes {len(missing)} layers that this model has not, as {missing[0]}: is "
            "it for another model, or another clip_skip?"
        )
    unread = family.unread(networks)
    found = {  # in the models' own order
        name: place
        for name, place in modules.items()
        if name in layers and not place[0].startswith(unread)
    }
    points = [attachment_point(spelled, module) for spelled, module in found.values()]
    return points, {found[name][0]: layers[name] for name in found}


def _place(given: str) -> Path:
    """The file or peft's folder; a run's folder stands for its LoRA."""
    return find_lora(user_path(given))[0]
