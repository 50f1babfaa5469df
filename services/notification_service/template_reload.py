"""Follows the operator's folder of templates: a background loop that uses its files when they change."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

from notification_service.templates import Need, Templates
from servicekit import logs, tasks
from servicekit.configfile import InvalidConfigError

log = logs.get(__name__)

INTERVAL = 2.0  # seconds


async def follow(templates: Templates, needs: Callable[[], Sequence[Need]], interval: float = INTERVAL) -> None:
    """Looks at the files every so many seconds. Files that lack what the rules need change nothing, and the log says
    why, once.
    """
    said = ""
    while True:
        tasks.beat()
        await asyncio.sleep(interval)
        try:
            changed = await asyncio.to_thread(templates.reload, needs(), again=False)
        except InvalidConfigError as error:
            if str(error) != said:
                said = str(error)
                log.error("changed templates cannot be used; those before stay in use", error=said)
            continue
        said = ""
        if changed:
            log.info("changed templates are used", version=templates.current.version)
