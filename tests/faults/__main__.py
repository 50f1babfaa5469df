"""`python -m tests.faults`: breaks the system on purpose and prints promise by promise what was checked and broken.

Exit codes: 0 every promise was kept, 1 one was broken, 2 wrong arguments, 3 the run was not exercised enough to tell.
"""

from __future__ import annotations

import asyncio
import sys

from tests.faultrun import command
from tests.faultrun.command import Command, Settings
from tests.faults import broken
from tests.faults.report import Report, report
from tests.faults.run import run
from tests.proof.history import gather
from tests.proof.records import read


def _judged(settings: Settings) -> Report:
    notes = asyncio.run(run(settings))
    settings.say("judging")
    return report(gather(read(settings.directory)), settings.seed, settings.seconds, notes)


_COMMAND = Command(
    "tests.faults",
    __doc__,
    _judged,
    broken.SWITCHES,
    broken_seconds=20.0,
    replicas=(3, "replicas of the user service"),
    callers=(16, "callers that write at the same time"),
    kept="the records",
)

if __name__ == "__main__":
    sys.exit(command.main(_COMMAND))
