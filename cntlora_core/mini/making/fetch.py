"""Fetch the emoji packages with npm and check them: ``python -m cntlora_core.mini.making.fetch``.

``manifest.json`` beside this module lists versions, licences and checksums of what the shipped
weights were made from; ``--write-manifest`` renews it.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import subprocess
from pathlib import Path

from cntlora_core.mini.making.object_classes import HELD_OUT_NAMES, OBJECT_CLASSES
from cntlora_core.mini.making.sprites import SpriteSource
from cntlora_core.runtime.files import write_json_atomic

__all__ = ["MANIFEST", "PACKAGES", "check", "describe", "fetch"]

MANIFEST = Path(__file__).resolve().with_name("manifest.json")

# name -> version, licence of the package, of the pictures, their maker.
PACKAGES: dict[str, tuple[str, str, str, str]] = {
    "emoji-datasource-google": ("16.0.0", "MIT", "Apache-2.0", "Google, Noto Emoji"),
    "emoji-datasource-twitter": ("16.0.0", "MIT", "CC-BY-4.0", "Twitter and others, Twemoji"),
    "@lobehub/fluent-emoji-3d": ("1.1.0", "MIT", "MIT", "Microsoft, Fluent Emoji"),
}
_STYLES = {
    "google": "emoji-datasource-google",
    "twitter": "emoji-datasource-twitter",
    "3d": "@lobehub/fluent-emoji-3d",
}


def fetch(cache: Path) -> None:
    """Install the packages below ``cache/node_modules``.

    Raises:
        RuntimeError: npm is missing, or fails; the message ends with what it said.
    """
    cache.mkdir(parents=True, exist_ok=True)
    npm = shutil.which("npm")
    if npm is None:
        raise RuntimeError("npm was not found; install Node.js, or fill node_modules otherwise")
    wanted = [f"{name}@{version}" for name, (version, *_) in PACKAGES.items()]
    command = [npm, "install", "--no-save", "--ignore-scripts", "--no-audit", *wanted]
    done = subprocess.run(command, cwd=cache, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"npm install failed: {done.stderr.strip()[-800:]}")


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def describe(cache: Path) -> dict:
    """What the manifest says of the packages below ``cache``."""
    root = cache / "node_modules"
    source = SpriteSource(root)
    packages = {}
    for name, (_, licence, pictures, maker) in PACKAGES.items():
        own = json.loads((root / name / "package.json").read_text(encoding="utf-8"))
        packages[name] = {
            "version": own["version"],
            "package_licence": licence,
            "picture_licence": pictures,
            "pictures_by": maker,
        }
    files = {}
    for style, package in _STYLES.items():
        folder = root / package
        whole = hashlib.sha256()
        for path in sorted(p for p in folder.rglob("*") if p.suffix in (".png", ".webp")):
            if "sheet" not in path.name:
                whole.update(f"{path.relative_to(folder).as_posix()} {_digest(path)}\n".encode())
        packages[package]["all_pictures_sha256"] = whole.hexdigest()
        files[style] = {
            emoji: _digest(source.path(style, emoji))
            for object_class in OBJECT_CLASSES
            for emoji in object_class.emoji
        }
    names = {
        object_class.name: {"kind": object_class.kind, "emoji": list(object_class.emoji)}
        for object_class in OBJECT_CLASSES
    }
    return {
        "packages": packages,
        "names": names,
        "held_out_names": list(HELD_OUT_NAMES),
        "sha256": files,
    }


def check(cache: Path) -> list[str]:
    """Differences between ``cache`` and the manifest, in words; empty if there are none."""
    wanted, found = json.loads(MANIFEST.read_text(encoding="utf-8")), describe(cache)
    problems = []
    for package, row in wanted["packages"].items():
        for key, value in row.items():
            now = found["packages"][package][key]
            if now != value:
                problems.append(f"{package}: {key} is {now}, not {value}")
    for style, digests in wanted["sha256"].items():
        for emoji, digest in digests.items():
            if found["sha256"][style].get(emoji) != digest:
                problems.append(f"{style}: the picture of {emoji} differs")
    return problems


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cache", type=Path, required=True, help="folder for node_modules")
    parser.add_argument("--write-manifest", action="store_true", help="renew manifest.json")
    args = parser.parse_args()
    if not (args.cache / "node_modules" / "emoji-datasource-google").is_dir():
        fetch(args.cache)
    if args.write_manifest:
        write_json_atomic(MANIFEST, describe(args.cache))
    problems = check(args.cache)
    if problems:
        raise SystemExit("\n".join(problems))
    print(f"{len(PACKAGES)} packages agree with {MANIFEST.name}")


if __name__ == "__main__":
    main()
