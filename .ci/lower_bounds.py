"""Prints pyproject.toml's dependencies at their lower bounds, as requirements for pip.

Only the newest releases of torch have small builds for the CPU: it stays as constraints.txt has it.
"""

import re
from pathlib import Path

root = Path(__file__).parents[1]
pinned = dict(re.findall(r"(?m)^(\w+)==(\S+)", (root / "constraints.txt").read_text("utf-8")))
text = (root / "pyproject.toml").read_text("utf-8").partition("\ndependencies = [")[2]
for name, bound in re.findall(r'"(\w+)>=([\d.]+)"', text.partition("\n]")[0]):
    print(f"{name}=={pinned[name] if name == 'torch' else bound}")
