"""Subjects to measure on: the embedded ones, or those of DreamBooth's public data set."""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cntlora_core import mini
from cntlora_core.benchmark.convergence.grid import Bench, Run
from cntlora_core.data.photos import PhotoSet, load_photos
from cntlora_core.diffusion.settings import SubjectSettings
from cntlora_core.diffusion.stages import Subject, read_subject
from cntlora_core.runtime.reading import reading, user_path

PROMPTS_NAME = "prompts_and_classes.txt"
LIVE_CLASSES = ("cat", "dog")
"""The data set's live subjects are its cats and dogs; all others are objects."""

_PROMPT = re.compile(r"""^\s*(['"])(.*)\1\.format\(unique_token, class_token\)""")


@dataclass(frozen=True, eq=False)
class BenchSubject:
    """A subject, and what it is measured with.

    Attributes:
        name: As grids name it.
        subject: Photos to train on, and prompts.
        held_out: Photos kept for measuring; None where all are trained on.
        templates: Prompts of generated images, with {} where "token class" goes.
    """

    name: str
    subject: Subject
    held_out: PhotoSet | None
    templates: tuple[str, ...]

    @property
    def references(self) -> PhotoSet:
        """The photos that generated images are compared with."""
        return self.held_out or self.subject.photos

    @property
    def spoken(self) -> str:
        """Token and class name."""
        prompts = self.subject.prompts
        return f"{prompts.token} {prompts.class_name}"

    def identity(self) -> dict[str, Any]:
        """What tells this subject from another, by content, as JSON values."""
        held_out = self.held_out.photos if self.held_out else ()
        return self.subject.identity() | {
            "spoken": self.spoken,
            "held_out": [photo.digest for photo in held_out],
            "templates": list(self.templates),
        }


@dataclass(frozen=True)
class DreamBoothSubject:
    """A subject of DreamBooth's data set.

    Attributes:
        name: Its folder.
        class_name: The noun for it.
        templates: Its 25 prompts, with {} where "token class" goes.
    """

    name: str
    class_name: str
    templates: tuple[str, ...]


def parse_prompts_and_classes(text: str) -> dict[str, DreamBoothSubject]:
    """The subjects of DreamBooth's data set, with their prompts, from its own file.

    Args:
        text: Content of ``prompts_and_classes.txt``: a table of names and classes, and two lists of
            prompts, for objects and for live subjects.

    Raises:
        ValueError: naming what is missing.
    """
    classes: dict[str, str] = {}
    prompts: dict[str, list[str]] = {"object": [], "live": []}
    section = None
    for line in text.splitlines():
        title = line.strip().lower()
        if title == "subject_name,class":
            section = "classes"
        elif title.endswith("prompts"):
            kind = title.removesuffix("prompts").split()
            section = "live" if "live" in kind else "object" if "object" in kind else None
        elif section == "classes" and line.count(",") == 1:
            name, noun = (part.strip() for part in line.split(","))
            classes[name] = noun
        elif section in prompts and (found := _PROMPT.match(line)):
            prompts[section].append(_template(found[2]))
    missing = [kind for kind, found in prompts.items() if not found]
    if missing or not classes:
        what = [f"{kind} prompts" for kind in missing] + ([] if classes else ["classes"])
        raise ValueError(f"there are no {' and no '.join(what)}")
    return {
        name: DreamBoothSubject(
            name, noun, tuple(prompts["live" if noun in LIVE_CLASSES else "object"])
        )
        for name, noun in classes.items()
    }


def _template(prompt: str) -> str:
    template = prompt.replace("{0} {1}", "{}")
    if template.count("{}") != 1:
        raise ValueError(f"the prompt {prompt!r} does not hold '{{0}} {{1}}' once")
    return template


def dreambooth_subjects(folder: str | Path) -> dict[str, DreamBoothSubject]:
    """The subjects whose photos are in the folder, by name.

    Raises:
        FileNotFoundError: if the folder has no prompts_and_classes.txt.
        ValueError: if that file holds something else, or no subject's folder is there.
    """
    place = user_path(str(folder))
    path = place / PROMPTS_NAME
    if not path.is_file():
        raise FileNotFoundError(
            f"there is no {path}: give the folder of DreamBooth's data set, which has that file "
            "beside a folder of photos for each subject"
        )
    with reading(path, "the prompts and classes of DreamBooth's data set", ""):
        known = parse_prompts_and_classes(path.read_text("utf-8"))
    there = {name: own for name, own in known.items() if (place / name).is_dir()}
    if not there:
        raise ValueError(
            f"{place} holds no folder of a subject; there should be {', '.join(known)}"
        )
    return there


def subject_names(bench: Bench) -> list[str]:
    """Names of all subjects of a grid's source."""
    if bench.dreambooth is None:
        return mini.subjects()
    return list(dreambooth_subjects(bench.dreambooth))


def bench_subject(bench: Bench, run: Run) -> BenchSubject:
    """The subject of a run, read and checked.

    Raises:
        ValueError: for a name that is not there, or fewer photos than asked for.
    """
    if bench.dreambooth is None:
        own = mini.subject(run.subject)
        folder, token, noun, templates = own.photos, own.token, own.class_name, own.prompts
        photos, held_out = load_photos(folder), load_photos(own.held_out, read_captions=False)
    else:
        there = dreambooth_subjects(bench.dreambooth)
        if run.subject not in there:
            raise ValueError(f"no subject {run.subject!r}; there are: {', '.join(there)}")
        found = there[run.subject]
        folder, token, noun = (
            user_path(bench.dreambooth) / found.name,
            bench.token,
            found.class_name,
        )
        templates = found.templates
        photos, held_out = _split(load_photos(folder), bench.held_out)
    photos = _first(photos, run.photos)
    settings = SubjectSettings(
        images=str(folder),
        token=token,
        class_name=noun,
        resolution=run.resolution,
        flip=run.flip,
        crop=True,  # as the held-out photos are
        unmasked_weight=1.0,
    )
    prompts = bench.measure.prompts or templates
    return BenchSubject(run.subject, read_subject(settings, photos), held_out, prompts)


def _split(photos: PhotoSet, held_out: int) -> tuple[PhotoSet, PhotoSet | None]:
    if not held_out:
        return photos, None
    if held_out >= len(photos.photos):
        raise ValueError(f"held_out={held_out} leaves none of {len(photos.photos)} photos to train")
    first, last = photos.photos[:-held_out], photos.photos[-held_out:]
    return dataclasses.replace(photos, photos=first), dataclasses.replace(photos, photos=last)


def _first(photos: PhotoSet, count: int | None) -> PhotoSet:
    if count is None:
        return photos
    if count > len(photos.photos):
        raise ValueError(f"photos={count}, but there are {len(photos.photos)}")
    return dataclasses.replace(photos, photos=photos.photos[:count])
