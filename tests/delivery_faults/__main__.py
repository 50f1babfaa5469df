"""`python -m tests.delivery_faults`: breaks what deliveries depend on and prints promise by promise what was checked.

Exit codes: 0 every promise was kept, 1 one was broken, 2 wrong arguments, 3 the run was not exercised enough to tell.
"""

from __future__ import annotations

import asyncio
import sys

from tests.delivery_faults import broken, evidence
from tests.delivery_faults.report import Report, report
from tests.delivery_faults.run import run
from tests.faultrun import command
from tests.faultrun.command import Command, Settings


def _judged(settings: Settings) -> Report:
    found = asyncio.run(run(settings))
    if settings.keep:
        evidence.keep(found, settings.directory / "evidence.json")
    settings.say("judging")
    return report(found, settings.seed, settings.seconds)


_COMMAND = Command(
    "tests.delivery_faults",
    __doc__,
    _judged,
    broken.SWITCHES,
    broken_seconds=15.0,
    replicas=(2, "replicas of the notification service"),
    callers=(4, "callers that change users at the same time"),
    kept="journals and logs",
)

if __name__ == "__main__":
    sys.exit(command.main(_COMMAND))
