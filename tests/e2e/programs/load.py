"""Creates users one after the other while it follows the feed, until a file `/tmp/stop` is there; then it judges.

The last line is the verdict, in JSON: how many users were created, which calls failed, and which events were missing,
doubled or out of order at the subscriber. Exit code 0 if none was.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
from pathlib import Path
from typing import Any

from tidings.client import ApiError, MemoryCursor, User, UserFeed, Users, connect

_STOP = Path("/tmp/stop")
_PAUSE = 0.02
_CATCH_UP = 60.0


async def _watch(channel: Any, seen: list[tuple[int, str]]) -> None:
    async for batch in UserFeed(channel, cursor=MemoryCursor(), start="earliest"):
        seen += [(event.position, event.user.username) for event in batch.events]


async def _create(users: Users, prefix: str, created: list[str], failed: list[str]) -> None:
    number = 0
    while not _STOP.exists():
        number += 1
        name = f"{prefix}-{number}"
        try:
            await users.create(User(username=name, email=f"{name}@example.com"))
        except ApiError as error:
            failed.append(f"{name}: {error}")
        else:
            created.append(name)
        await asyncio.sleep(_PAUSE)


async def main(prefix: str) -> int:
    """Returns the exit code."""
    seen: list[tuple[int, str]] = []
    created: list[str] = []
    failed: list[str] = []
    access = {"token_file": os.environ["TIDINGS_CLIENT_TOKEN_FILE"], "ca": os.environ["TIDINGS_CLIENT_CA_FILE"]}
    address = os.environ["TIDINGS_CLIENT_USERS_ADDRESS"]
    async with connect(address, **access) as calls, connect(address, **access) as feed:
        watching = asyncio.create_task(_watch(feed, seen))
        print(json.dumps({"begun": prefix}), flush=True)
        await _create(Users(calls), prefix, created, failed)
        deadline = asyncio.get_running_loop().time() + _CATCH_UP
        while not set(created) <= {name for _, name in seen}:
            if watching.done() or asyncio.get_running_loop().time() > deadline:
                break
            await asyncio.sleep(0.1)
        ended = repr(watching.exception()) if watching.done() else ""
        watching.cancel()
    positions = [position for position, _ in seen]
    names = [name for _, name in seen]
    verdict = {
        "created": len(created),
        "failed": failed,
        "events": len(seen),
        "missing": sorted(set(created) - set(names)),
        "doubled": sorted({name for name in created if names.count(name) > 1}),
        "dense": positions == list(range(1, len(positions) + 1)),
        "feed_ended": ended,
    }
    print(json.dumps(verdict), flush=True)
    sound = not (verdict["missing"] or verdict["doubled"] or ended) and verdict["dense"]
    return 0 if sound and created else 1


if __name__ == "__main__":
    sys.exit(asyncio.run(main(sys.argv[1])))
