"""Becomes the JavaScript client: `python -m tests.js ARGUMENT...`, for the harness starts modules of Python."""

from __future__ import annotations

import os
import sys
from pathlib import Path

if __name__ == "__main__":
    os.execvp("node", ["node", str(Path(__file__).with_name("main.mjs")), *sys.argv[1:]])
