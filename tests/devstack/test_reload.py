"""`devstack reload` from a copy of the sources, as in a container of `skaffold dev`."""

from __future__ import annotations

import asyncio
import os
import sys
from pathlib import Path

from tests.harness import Services, until


async def test_a_changed_source_is_run_and_a_broken_one_is_waited_for(services: Services, tmp_path: Path) -> None:
    copied = await asyncio.create_subprocess_exec(sys.executable, "-m", "devstack", "copy-sources", str(tmp_path))
    assert await copied.wait() == 0
    module = tmp_path / "servicekit" / "told.py"
    body = "import signal\nprint('{}', flush=True)\nsignal.pause()\n"
    module.write_text(body.format("first"))
    process = services.process(
        "devstack", "reload", "servicekit.told", environment={"PYTHONPATH": str(tmp_path), "PATH": os.environ["PATH"]}
    )
    await process.launch()
    await until(lambda: "first" in process.lines)

    module.write_text(body.format("second"))
    await until(lambda: "second" in process.lines)
    record = await process.wait_log("sources have changed")
    assert record["files"] == ["servicekit/told.py"]

    module.write_text("raise SystemExit(3)\n")
    await process.wait_log("ended; waiting for a change of its sources", code=3)
    module.write_text(
        "import signal, sys\nsignal.signal(signal.SIGTERM, lambda *_: sys.exit(7))\n" + body.format("third")
    )
    await until(lambda: "third" in process.lines)
    assert process.alive
    # Its end is that of the module.
    assert await process.stop() == 7
