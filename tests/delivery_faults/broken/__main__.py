"""Breaks one thing, then runs the service."""

from __future__ import annotations

import sys

from notification_service.__main__ import main
from tests.delivery_faults.broken import SWITCHES

if __name__ == "__main__":
    switch = sys.argv.pop(1)
    SWITCHES[switch].apply()
    sys.exit(main())
