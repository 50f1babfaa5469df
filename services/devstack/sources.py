"""Where the sources of this installation are, and a copy of them elsewhere.

A container cannot write to its image. What a developer changes is put into a copy, which comes first on PYTHONPATH.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

PACKAGES = ("console", "devstack", "notification_service", "servicekit", "tidings", "user_service")

ROOT = Path(__file__).resolve().parents[1]


def modules(root: Path) -> Iterator[Path]:
    """Every Python file of our packages below a folder."""
    for package in PACKAGES:
        yield from (root / package).rglob("*.py")


def copy(target: Path) -> None:
    """Copies our packages into a folder that is there; what is there of them is replaced."""
    for package in PACKAGES:
        shutil.rmtree(target / package, ignore_errors=True)
        # Compiled files of the image have its sources' times; those of the copy are the copy's.
        shutil.copytree(ROOT / package, target / package, ignore=shutil.ignore_patterns("__pycache__"))
