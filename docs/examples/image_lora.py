"""An image LoRA on the embedded small model: photos in, a LoRA file and an image out.

python docs/examples/image_lora.py        # a few minutes on two CPU cores
"""

from __future__ import annotations

from pathlib import Path

from cntlora_core import mini
from cntlora_core.diffusion import (
    AdapterSettings,
    JobSettings,
    OutputSettings,
    PriorSettings,
    SamplingSettings,
    SubjectSettings,
    TrainingSettings,
    personalise,
    sample,
)


def main(
    output: Path = Path("penguin"), steps: int = 300, class_images: int = 20, sampling: int = 20
) -> Path:
    """Train, generate one image, and return the path of the LoRA file."""
    penguin = mini.subject("penguin")
    settings = JobSettings(
        model=str(mini.model_path()),
        subject=SubjectSettings(str(penguin.photos), penguin.token, penguin.class_name),
        output=OutputSettings(str(output)),
        prior=PriorSettings(
            num_class_images=class_images, class_steps=sampling, class_guidance=2.5
        ),
        adapter=AdapterSettings(method="cross", rank=16, alpha=32),
        training=TrainingSettings(steps=steps, device="cpu"),
    )
    result = personalise(settings, overwrite=True)
    prompt = f"a photo of {penguin.token} {penguin.class_name} in the snow"
    sampling_settings = SamplingSettings(steps=sampling, guidance=2.5)
    images = sample(settings.model, [prompt], loras=[result.lora], settings=sampling_settings)
    images[0].save(output / "snow.png")
    return Path(result.lora)


if __name__ == "__main__":
    print(main())
