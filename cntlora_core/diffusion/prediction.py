"""What a model predicts, and under which noise schedule: what it says itself, or a person for it.

A diffusers folder has its scheduler's settings. A single file has its family's, changed by the
marks that it may carry: ``v_pred`` and ``ztsnr``, empty tensors that ComfyUI reads too, and
``modelspec.prediction_type`` in its header.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cntlora_core.diffusion.checkpoint import CheckpointError, read_json, read_whole_header
from cntlora_core.diffusion.settings import PredictionType

_MODELSPEC = {"epsilon": "epsilon", "v": "v_prediction", "v_prediction": "v_prediction"}
_EDM = ("edm_mean", "edm_std", "edm_vpred.sigma_max")
_ZERO_SNR = "rescale_betas_zero_snr"


def scheduler_config(
    path: Path, configs: Path, prediction_type: PredictionType | None = None
) -> dict[str, Any]:
    """The scheduler's settings of a model.

    Args:
        path: The single file or the diffusers folder.
        configs: The folder with ``scheduler/scheduler_config.json``: the model's own or its
            family's.
        prediction_type: What the model predicts; None for what it says.

    Raises:
        CheckpointError: A file is missing or damaged, or has the marks of an EDM model.
    """
    config = read_json(configs / "scheduler" / "scheduler_config.json")
    if not path.is_dir():
        config |= _marked(path, config)
    if prediction_type is not None:
        config["prediction_type"] = prediction_type
        if prediction_type == "epsilon":  # noise alone tells nothing where there is no signal
            config[_ZERO_SNR] = False
    return config


def fingerprint_suffix(config: Mapping[str, Any]) -> str:
    """What a scheduler's settings add to the fingerprint of the weights; empty for epsilon."""
    predicts = config.get("prediction_type", "epsilon")
    zero_snr = "-zero-snr" if config.get(_ZERO_SNR) else ""
    return zero_snr if predicts == "epsilon" else f"-{predicts}{zero_snr}"


def _marked(path: Path, config: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that a single file's marks change."""
    keys, texts = read_whole_header(path)
    if found := [key for key in _EDM if key in keys]:
        raise CheckpointError(
            path,
            f"this is an EDM model (it has {found[0]}), whose noise schedule is continuous: models "
            "that predict epsilon or v_prediction under a discrete one can be trained.",
        )
    said = texts.get("modelspec.prediction_type", "").strip().lower()
    predicts = "v_prediction" if "v_pred" in keys else _MODELSPEC.get(said)
    if predicts is None:
        return {}
    if predicts == "epsilon" or "ztsnr" not in keys:
        return {"prediction_type": predicts}
    changes = {"prediction_type": predicts, _ZERO_SNR: True, "timestep_spacing": "trailing"}
    if config["_class_name"] == "PNDMScheduler":  # has no zero terminal SNR
        changes["_class_name"] = "DDIMScheduler"
    return changes
