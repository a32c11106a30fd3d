"""A grid file: settings and axes in TOML, expanded to the runs that it asks for."""

from __future__ import annotations

import dataclasses
import itertools
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cntlora_core.benchmark.convergence.controls import CONTROLS
from cntlora_core.config import CNTLoRAConfig
from cntlora_core.diffusion.adapter_settings import LAVA_ONLY
from cntlora_core.diffusion.settings import (
    AdapterSettings,
    PriorSettings,
    SamplingSettings,
    TrainingSettings,
)
from cntlora_core.methods import get_method
from cntlora_core.metrics.encoders import CLIP, DINO, SMALL
from cntlora_core.runtime.reading import reading, user_path

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # pyright: ignore[reportMissingImports]

ALL_SUBJECTS = "all"
_OWN = ("subject", "photos", "control_of", "resolution", "flip")


def _names(kind: type, *without: str) -> tuple[str, ...]:
    return tuple(f.name for f in dataclasses.fields(kind) if f.name not in without)


_ADAPTER = _names(AdapterSettings, "cntlora", "method")
_CNTLORA = _names(CNTLoRAConfig, "constraint", "seed")
_PRIOR = _names(PriorSettings, "class_images", "cache")
_TRAINING = tuple(
    name
    for name in _names(TrainingSettings, "device", "save_every")
    if not name.startswith("sample_")
)
SETTINGS = ("method", *_OWN, *_ADAPTER, *_CNTLORA, *_PRIOR, *_TRAINING)
"""All that a run can vary in; each may be an axis of a grid."""


@dataclass(frozen=True)
class MeasureSettings:
    """What is measured, and when.

    Attributes:
        steps: Steps after which loss and drift are measured; 0, after the initialisation, and the
            last step of a run always are.
        pictures_at: Steps after which images are generated too; the last always is one.
        loss_passes: Timesteps at which each held-out photo is read.
        drift_images: Class images that the drift is measured on.
        drift_passes: Timesteps at which each of them is read.
        prompts: Templates of the generated images, with {} where "token class" goes; empty for the
            subject's own.
        per_prompt: Images for each prompt.
        sampling_steps: Sampling steps of an image.
        guidance: Classifier-free guidance scale.
        scheduler: The sampler; default: the model's own.
        batch_size: Images generated, or noised latents read, at once.
        dino: Vision transformer by hub id or folder; default: facebook/dino-vits16, and the one
            that comes along for the small model.
        clip: CLIP model likewise; default: openai/clip-vit-large-patch14.
    """

    steps: tuple[int, ...] = (25, 50, 100, 200, 300, 500, 700, 1000)
    pictures_at: tuple[int, ...] = (100, 300, 1000)
    loss_passes: int = 4
    drift_images: int = 12
    drift_passes: int = 1
    prompts: tuple[str, ...] = ()
    per_prompt: int = 4
    sampling_steps: int = 30
    guidance: float = 7.5
    scheduler: str | None = None
    batch_size: int = 8
    dino: str | None = None
    clip: str | None = None

    def __post_init__(self) -> None:
        for name in ("loss_passes", "drift_images", "drift_passes", "per_prompt"):
            if getattr(self, name) < 1:
                raise ValueError(f"measure.{name} must be at least 1, got {getattr(self, name)}")
        for name in ("steps", "pictures_at"):
            if any(type(step) is not int or step < 0 for step in getattr(self, name)):
                raise ValueError(f"measure.{name} must be steps of at least 0")
        for prompt in self.prompts:
            if prompt.count("{}") != 1:
                raise ValueError(f"the prompt {prompt!r} needs one {{}}, for token and class")
        self.sampling()  # checks the rest

    def at(self, total: int) -> tuple[int, ...]:
        """The steps, from 0, after which a run of ``total`` steps is measured."""
        wanted = {0, total, *self.steps, *self.pictures_at}
        return tuple(sorted(step for step in wanted if step <= total))

    def has_pictures(self, step: int, total: int) -> bool:
        return step == total or step in self.pictures_at

    def sampling(self) -> SamplingSettings:
        return SamplingSettings(
            steps=self.sampling_steps,
            guidance=self.guidance,
            scheduler=self.scheduler,  # pyright: ignore[reportArgumentType]
            batch_size=self.batch_size,
        )


@dataclass(frozen=True)
class Run:
    """One training.

    Attributes:
        subject: Name of the subject.
        photos: How many of its photos are trained on; None for all.
        method: As the grid names it: a method of the registry, or a control.
        adapter: The adapter; for a control, of the initialisation that it is made from.
        training: The training loop.
        prior: The class images.
        resolution: Side of the images in pixels; None for the model's own.
        flip: Whether mirrored photos are trained on too.
    """

    subject: str
    method: str
    adapter: AdapterSettings
    training: TrainingSettings
    prior: PriorSettings
    photos: int | None = None
    resolution: int | None = None
    flip: bool = False

    @property
    def control(self) -> bool:
        return self.method in CONTROLS

    def values(self) -> dict[str, Any]:
        """All settings that have an effect, flat, as JSON values."""
        adapter, training, prior = self.adapter, self.training, self.prior
        found: dict[str, Any] = {name: getattr(self, name) for name in ("method", "subject")}
        found |= {name: getattr(self, name) for name in ("photos", "resolution", "flip")}
        if self.control:
            found["control_of"] = adapter.method
        lava = adapter.adapter == "lava"
        found |= {n: getattr(adapter, n) for n in _ADAPTER if lava or n not in LAVA_ONLY}
        found["alpha"] = adapter.lora_alpha
        if get_method(adapter.method).family == "cntlora":
            found |= {name: getattr(adapter.cntlora, name) for name in _CNTLORA}
        found |= {name: getattr(prior, name) for name in _PRIOR}
        found |= {name: getattr(training, name) for name in _TRAINING}
        return {name: _plain(value) for name, value in found.items()}

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Run:
        """The run of a flat table of settings.

        Raises:
            ValueError, TypeError: for an unknown setting, or one whose value makes no sense.
        """
        unknown = sorted(set(values) - set(SETTINGS))
        if unknown:
            raise ValueError(f"unknown settings {unknown}; known: {', '.join(sorted(SETTINGS))}")
        if not isinstance(values.get("subject"), str):
            raise ValueError("a run needs a subject: give its name, or a list of names")
        values = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
        method, control_of = values.get("method", "cross"), values.get("control_of")
        if control_of is not None and method not in CONTROLS:
            raise ValueError(f"control_of belongs to {', '.join(CONTROLS)}, not to {method!r}")

        def of(names: tuple[str, ...]) -> dict[str, Any]:
            return {name: values[name] for name in names if name in values}

        lava = values.get("adapter") == "lava"  # an axis of kinds shares the settings of one
        photos = values.get("photos")
        if photos is not None and (type(photos) is not int or photos < 1):
            raise ValueError(f"photos must be a number of at least 1, got {photos!r}")
        return cls(
            subject=values["subject"],
            method=method,
            photos=photos,
            resolution=values.get("resolution"),
            flip=values.get("flip", False),
            adapter=AdapterSettings(
                method=(control_of or "cross") if method in CONTROLS else method,
                cntlora=CNTLoRAConfig(**of(_CNTLORA)),
                **of(tuple(n for n in _ADAPTER if lava or n not in LAVA_ONLY)),
            ),
            training=TrainingSettings(**{"precision": "float32", **of(_TRAINING)}),
            prior=PriorSettings(**of(_PRIOR)),
        )


@dataclass(frozen=True)
class Bench:
    """What all runs of a grid share.

    Attributes:
        model: Stable Diffusion 1.5 as a file, a diffusers folder or a hub id; small: the embedded
            model.
        dreambooth: Folder of DreamBooth's data set; None for the embedded subjects.
        token: The word that stands for a subject of DreamBooth's data set.
        held_out: How many photos of a subject of DreamBooth's data set, the last, are kept from
            training for measuring; the published protocol keeps none.
        cache: Folder for class images and encoded photos, which several output folders may share;
            default: the output folder's own.
        device: Where to train; default: CUDA, then MPS, then the CPU.
        save_every: Steps between states from which a run that was killed goes on.
        measure: What is measured.
    """

    model: str = SMALL
    dreambooth: str | None = None
    token: str = "sks"
    held_out: int = 0
    cache: str | None = None
    device: str | None = None
    save_every: int = 100
    measure: MeasureSettings = field(default_factory=MeasureSettings)

    def __post_init__(self) -> None:
        if self.held_out < 0 or self.save_every < 1:
            raise ValueError("held_out must be at least 0, and save_every at least 1")
        if self.dreambooth is None and self.held_out:
            raise ValueError("held_out belongs to dreambooth: embedded subjects have their own")

    @property
    def small(self) -> bool:
        """Whether the model is the embedded one."""
        return self.model == SMALL

    @property
    def encoders(self) -> tuple[str, str]:
        """What is looked at the images with: DINO and CLIP, by hub id or folder."""
        dino, clip = (SMALL, SMALL) if self.small else (DINO, CLIP)
        return self.measure.dino or dino, self.measure.clip or clip


SubjectsOf = Callable[[Bench], Sequence[str]]


@dataclass(frozen=True)
class Grid:
    """A grid file.

    Attributes:
        bench: What all runs share.
        runs: All different runs, in the file's order.
    """

    bench: Bench
    runs: tuple[Run, ...]


def read_grid(path: Path, subjects_of: SubjectsOf | None = None) -> Grid:
    """Read a grid file; relative paths in it count from its folder.

    Args:
        path: The TOML file.
        subjects_of: Gives the names of all subjects of a :class:`Bench`, for ``subject = "all"``.

    Raises:
        ValueError: if the file is no TOML, or a setting in it is unknown or makes no sense.
        FileNotFoundError: if there is no such file.
    """
    with reading(path, "a grid in TOML", "docs/experiments/convergence.md describes one."):
        content = tomllib.loads(path.read_text("utf-8"))
    base, blocks = content.pop("base", {}), content.pop("grid", [{}])
    measure = content.pop("measure", {})
    for name in ("model", "dreambooth"):
        if name in content:
            content[name] = _place(content[name], path.parent)
    if "cache" in content:
        content["cache"] = str((path.parent / user_path(content["cache"])).resolve())
    for name in ("dino", "clip"):
        if name in measure:
            measure[name] = _place(measure[name], path.parent)
    bench = _built(Bench, content | {"measure": _built(MeasureSettings, measure)})
    runs: dict[str, Run] = {}
    for number, block in enumerate(blocks, 1):
        for values in expand({**base, **block}):
            try:
                for run in _by_subject(values, bench, subjects_of):
                    runs.setdefault(json.dumps(run.values(), sort_keys=True), run)
            except (ValueError, TypeError) as error:
                raise ValueError(f"{path}, grid {number}: {error}") from error
    return Grid(bench, tuple(runs.values()))


def expand(table: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """All combinations of a table's axes: the values that are lists."""
    axes = [value if isinstance(value, list) else [value] for value in table.values()]
    for values in itertools.product(*axes):
        yield dict(zip(table, values, strict=True))


def _by_subject(
    values: dict[str, Any], bench: Bench, subjects_of: SubjectsOf | None
) -> Iterator[Run]:
    if values.get("subject") == ALL_SUBJECTS and subjects_of is not None:
        for name in subjects_of(bench):
            yield Run.of(values | {"subject": name})
    else:
        yield Run.of(values)


def _plain(value: Any) -> Any:
    """As JSON gives it back; 8.0 and 8 are one value."""
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _place(given: str, folder: Path) -> str:
    """A path in a grid file; what does not exist there stays as it is: a hub id, or a name."""
    there = folder / user_path(given)
    return str(there.resolve()) if there.exists() else given


def _built(kind: Any, values: Mapping[str, Any]) -> Any:
    unknown = sorted(set(values) - set(_names(kind)))
    if unknown:
        raise ValueError(
            f"unknown keys {unknown} in the grid file; known: {', '.join(_names(kind))}, and the "
            "tables base, measure and grid"
        )
    return kind(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})
