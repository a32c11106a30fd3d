"""Print the lowest versions that pyproject.toml asks for, as pip's constraints."""

import sys
from pathlib import Path

from packaging.requirements import Requirement

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

TEXT = (Path(__file__).parents[1] / "pyproject.toml").read_text("utf-8")
PROJECT = tomllib.loads(TEXT)["project"]
# pyarrow does not say which NumPy it needs: its version must go with NumPy's.
for requirement in map(
    Requirement, [*PROJECT["dependencies"], *PROJECT["optional-dependencies"]["tasks"]]
):
    (bound,) = requirement.specifier
    if bound.operator != ">=":
        sys.exit(f"{requirement} is no lower bound")
    # torch is tested at the version of constraints.txt: its other builds are gigabytes.
    if requirement.name != "torch":
        marker = f" ; {requirement.marker}" if requirement.marker else ""
        print(f"{requirement.name}=={bound.version}{marker}")
