"""Values that make no sense: refused in words before any work, by every command."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from cntlora_core.runtime.reading import printable

from .conftest import Run, Sound, assert_refused, train_flags
from .test_files import measures, sample_command

NUMBERS = ("nan", "inf", "-1")
COUNTS = ("nan", "-1")
HUGE = "9" * 30
WORDS = ("", "\udcff", "a:b:c", "[bold]", "\x1b[31m")

SAMPLE: dict[str, tuple[str, ...]] = {
    "--steps": (*COUNTS, "0", "1.5", HUGE),
    "--guidance": NUMBERS,
    "--resolution": (*COUNTS, "0", "-64", "7", "33", "100000000", HUGE),
    "--batch-size": (*COUNTS, "0", HUGE),
    "--per-prompt": (*COUNTS, "0", HUGE),
    "--seed": ("nan", "x", "", "1.5"),
    "--scheduler": WORDS,
    "--prediction-type": WORDS,
    "--precision": WORDS,
    "--device": (*WORDS, "meta", "cuda:99", "xla", "privateuseone"),
    "--width": ("33", "0", HUGE),
    "--height": ("-64",),
    "--prompt": ("\udcff",),
    "--negative-prompt": ("\udcff",),
    "--output": ("", " ", "~nosuchuser/x", "\x00", "/proc/1/x", "/dev/null/x", "x" * 300),
    "--model": ("", " ", "~nosuchuser/x", "\x00", "x" * 5000, "\udcff", "no/such/place", "a\nb"),
    "--lora": (
        *("", "~nosuchuser/x.safetensors", "\x00", "x" * 5000, "none.safetensors:0.5"),
        *("{lora}:nan", "{lora}:inf", "{lora}:-inf", "{lora}:x", "{lora}:", "{lora}:1e400"),
        "{lora}:1e300",
    ),
}
TRAIN: dict[str, tuple[str, ...]] = {
    "--resolution": (*COUNTS, "0", "-64", "33", "100000000", HUGE),
    "--rank": (*COUNTS, "0", "100000", HUGE),
    "--alpha": (*NUMBERS, "0", "1e300"),
    "--cntlora.rho": ("1e308", "nan", "0.5", "-1", "inf"),
    "--cntlora.damping": ("nan", "inf", "-1", "x"),
    "--cntlora.shift": ("1e300", "nan", "inf", "0", "x"),
    "--cntlora.split": ("nan", "2", "-1"),
    "--cntlora.min-rank": ("0", "-1", "1.5"),
    "--learning-rate": NUMBERS,
    "--weight-decay": NUMBERS,
    "--max-grad-norm": NUMBERS,
    "--min-snr-gamma": (*NUMBERS, "0"),
    "--prior-weight": NUMBERS,
    "--class-guidance": NUMBERS,
    "--class-steps": (*COUNTS, "0", HUGE),
    "--num-class-images": (*COUNTS, "0", HUGE),
    "--steps": (*COUNTS, "0", HUGE),
    "--batch-size": (*COUNTS, "0", HUGE),
    "--save-every": (*COUNTS, "0"),
    "--sample-steps": ("0", "-1", HUGE),
    "--init-passes": (*COUNTS, "0", HUGE),
    "--init-minutes": (*NUMBERS, "0"),
    "--orthogonality": NUMBERS,
    "--seed": ("nan", "x", "", "1.5"),
    "--method": (*WORDS, "pissa_niter_0", "pissa_niter_99999999999", "pissa_niter_x"),
    "--adapter": WORDS,
    "--prediction-type": WORDS,
    "--layout": WORDS,
    "--device": (*WORDS, "meta", "cuda:99"),
    "--token": ("\udcff", ""),
    "--class-name": ("\udcff", ""),
    "--instance-prompt": ("\udcff",),
    "--sample-prompts": ("\udcff", ""),
    "--name": ("\udcff", ""),
    "--images": ("~nosuchuser/x", "\x00", "x" * 5000, "/dev/null", "/dev"),
    "--class-images": ("~nosuchuser/x", "\x00", "/dev/null"),
    "--cache": ("", "~nosuchuser/x", "\x00", "/proc/1/x", "/dev/null/x"),
    "--output": ("", " ", "~nosuchuser/x", "\x00", "/proc/1/x", "/dev/null/x"),
    "--model": ("~nosuchuser/x", "\x00", "x" * 5000),
}
EVALUATE: dict[str, tuple[str, ...]] = {
    "--subject": ("", "~nosuchuser/x", "\x00", "/dev/null"),
    "--generated": ("", "~nosuchuser/x", "\x00", "/dev/null"),
    "--prompt": ("\udcff", "~nosuchuser/x.txt", "no such file.txt"),
    "--token": ("\udcff",),
    "--dino": ("", "~nosuchuser/x", "\x00", "no/such", "/dev/null"),
    "--clip": ("", "~nosuchuser/x", "\x00", "no/such", "/dev/null"),
    "--device": ("meta", "x"),
    "--guidance": ("nan", "inf"),
    "--per-prompt": ("0", "-1"),
    "--lora": ("{lora}:nan", "~nosuchuser/x.safetensors"),
}
OTHERS: list[list[str]] = [
    ["inspect", "~nosuchuser/x.safetensors"],
    ["inspect", "\x00"],
    ["inspect", "{lora}", "--model", "~nosuchuser/x"],
    ["inspect", "{lora}", "--model", "\x00"],
    ["inspect", "{lora}", "--output", ""],
    ["inspect", "{lora}", "--output", "~nosuchuser/x"],
    ["inspect", "{lora}", "--output", "/dev/null/x"],
    ["demo", "--subject", "no such subject"],
    ["demo", "--subject", "a:b:c"],
    ["demo", "--steps", "0"],
    ["demo", "--method", "no such method"],
    ["demo", "--output", ""],
    ["bench", "init", "--no-such-flag"],
    ["bench", "nothing"],
    ["no such command"],
    ["train", "--model", "m"],
    ["sample", "--model", "m", "--prompt", "a"],
]


def flags(table: dict[str, tuple[str, ...]]) -> pytest.MarkDecorator:
    given = [(flag, value) for flag, values in table.items() for value in values]
    return pytest.mark.parametrize(
        ("flag", "value"), given, ids=[f"{f[2:]}={ascii(v)[:30]}" for f, v in given]
    )


def check(run: Run, arguments: list[str], flag: str, value: str, out: Path | None) -> None:
    """Refused, with a message that has the flag, the setting's name or the value."""
    said = run(arguments)
    word = flag.rpartition(".")[2].lstrip("-")
    names = [word, word.replace("-", "_"), word.replace("-", " ")]
    names += [value, printable(value), repr(value), ascii(value)] if value.strip() else []
    names += [head] if (head := value.rpartition(":")[0]) else []
    squeezed = "".join(said.text.split())
    found = next((name for name in names if "".join(name.split()) in squeezed), word)
    assert_refused(said, found, out)


def given(base: list[str], flag: str, value: str, sound: Sound) -> list[str]:
    value = value.format(lora=sound.lora)
    if flag in base:
        at = base.index(flag)
        return [*base[:at], f"{flag}={value}", *base[at + 2 :]]
    return [*base, f"{flag}={value}"]


@flags(SAMPLE)
def test_sample(sound: Sound, run: Run, tmp_path: Path, flag: str, value: str) -> None:
    os.chdir(tmp_path)
    out = tmp_path / "out"
    check(
        run,
        given(sample_command(sound.model, out), flag, value, sound),
        flag,
        value.format(lora=sound.lora),
        out,
    )


@flags(TRAIN)
def test_train(sound: Sound, run: Run, tmp_path: Path, flag: str, value: str) -> None:
    os.chdir(tmp_path)
    out = tmp_path / "out"
    base = train_flags(sound.model, sound.photos, out)
    if flag.startswith("--cntlora"):
        base[base.index("lora")] = "shift" if "shift" in flag else "cross"
    if flag.startswith(("--class-", "--num-class")) and flag != "--class-name":
        at = base.index("--prior-weight")
        base = [*base[:at], *base[at + 2 :]]
    if flag == "--orthogonality":
        base += ["--adapter", "lava"]
    if flag == "--instance-prompt":
        base += ["--class-prompt", "a dog"]
    check(run, given(base, flag, value, sound), flag, value.format(lora=sound.lora), out)


@flags(EVALUATE)
def test_evaluate(sound: Sound, run: Run, tmp_path: Path, flag: str, value: str) -> None:
    os.chdir(tmp_path)
    out = tmp_path / "out"
    base = measures(sound, out, "--model", str(sound.model))
    base += ["--dino", str(sound.encoders / "vision"), "--clip", str(sound.encoders / "clip")]
    if flag == "--generated":
        base = base[: base.index("--model")] + base[base.index("--dino") :]
    check(run, given(base, flag, value, sound), flag, value.format(lora=sound.lora), out)


@pytest.mark.parametrize("arguments", OTHERS, ids=lambda a: ascii(" ".join(a))[:60])
def test_others(sound: Sound, run: Run, tmp_path: Path, arguments: list[str]) -> None:
    os.chdir(tmp_path)
    filled = [text.format(lora=sound.lora) for text in arguments]
    if arguments[0] == "demo" and "--output" not in arguments:
        filled += ["--output", str(tmp_path / "out")]
    value = filled[-1] if arguments[0] != "demo" else arguments[2]
    check(run, filled, arguments[-2] if len(arguments) > 1 else arguments[0], value, None)
    assert sorted(path.name for path in tmp_path.iterdir()) in ([], ["out"])
