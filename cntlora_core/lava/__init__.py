"""LAVA: adapters that keep a convolution's dimensions, as a peft method.

Importing this package makes the method known to peft: do so before an adapter is loaded.

    from peft import get_peft_model
    from cntlora_core.lava import LavaConfig, orthogonality_loss

    model = get_peft_model(base, LavaConfig(r=4, target_modules=["conv1", "conv2"]))
    loss = task_loss(model, batch) + orthogonality_loss(model)
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from cntlora_core.lava.registration import register

register()

from cntlora_core.lava.config import LavaConfig  # noqa: E402
from cntlora_core.lava.layer import LavaLayer  # noqa: E402
from cntlora_core.lava.model import LavaModel  # noqa: E402
from cntlora_core.runtime.lazy import lazy_names  # noqa: E402

if TYPE_CHECKING:
    from cntlora_core.lava.initialize import get_lava_model
    from cntlora_core.lava.mixed import MixedLavaModel, get_mixed_model
    from cntlora_core.lava.orthogonality import OrthogonalityLoss, orthogonality_loss
    from cntlora_core.lava.trainer import with_orthogonality

__all__ = [
    "LavaConfig",
    "LavaLayer",
    "LavaModel",
    "MixedLavaModel",
    "OrthogonalityLoss",
    "get_lava_model",
    "get_mixed_model",
    "orthogonality_loss",
    "save_converted",  # pyright: ignore[reportUnsupportedDunderAll]
    "with_orthogonality",
]

_MODULES = {
    "MixedLavaModel": "lava.mixed",
    "OrthogonalityLoss": "lava.orthogonality",
    "get_lava_model": "lava.initialize",
    "get_mixed_model": "lava.mixed",
    "orthogonality_loss": "lava.orthogonality",
    "save_converted": "saving.conversion",
    "with_orthogonality": "lava.trainer",
}

__getattr__ = lazy_names(__name__, _MODULES)
