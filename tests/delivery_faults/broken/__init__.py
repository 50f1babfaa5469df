"""The notification service, broken on purpose: `python -m tests.delivery_faults.broken SWITCH serve`.

Each switch replaces one thing of the shipped service when the process starts, and most err only now and then. They show
that each check can fail, and that an ordinary run finds what it is there to find. Nothing of this is shipped.
"""

from tests.delivery_faults.broken.switches import SWITCHES

__all__ = ["SWITCHES"]
