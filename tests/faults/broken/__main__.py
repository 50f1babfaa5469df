"""Breaks one thing, then runs the service."""

from __future__ import annotations

import sys

from tests.faults.broken import SWITCHES
from user_service.__main__ import main

if __name__ == "__main__":
    switch = sys.argv.pop(1)
    SWITCHES[switch].apply()
    sys.exit(main())
