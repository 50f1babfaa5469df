"""FileCursor: an old token or a new one, never less."""

from __future__ import annotations

import asyncio
import os
import stat
from pathlib import Path

import pytest

from tidings.client import FileCursor


async def test_what_is_saved_is_loaded(tmp_path: Path) -> None:
    cursor = FileCursor(tmp_path / "cursor")
    assert await cursor.load() is None
    await cursor.save("one")
    await cursor.save("two")
    assert await cursor.load() == "two"
    assert await FileCursor(tmp_path / "cursor").load() == "two"
    assert [path.name for path in tmp_path.iterdir()] == ["cursor"]


async def test_an_empty_file_is_no_token(tmp_path: Path) -> None:
    (tmp_path / "cursor").touch()
    assert await FileCursor(tmp_path / "cursor").load() is None


@pytest.mark.parametrize("step", ["fsync", "replace"])
async def test_a_failure_leaves_the_old_token(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str) -> None:
    cursor = FileCursor(tmp_path / "cursor")
    await cursor.save("old")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(*{"fsync": (os, "fsync", full), "replace": (Path, "replace", full)}[step])
    with pytest.raises(OSError, match="No space left"):
        await cursor.save("new")
    monkeypatch.undo()
    assert await cursor.load() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["cursor"]


async def test_the_file_is_flushed_before_it_gets_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[str] = []
    fsync, replace = os.fsync, Path.replace

    def spied_fsync(descriptor: int) -> None:
        steps.append("flush directory" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else "flush file")
        fsync(descriptor)

    def spied_replace(path: Path, target: Path) -> Path:
        steps.append("replace")
        return replace(path, target)

    monkeypatch.setattr(os, "fsync", spied_fsync)
    monkeypatch.setattr(Path, "replace", spied_replace)
    await FileCursor(tmp_path / "cursor").save("token")
    assert steps == ["flush file", "replace", "flush directory"]


async def test_a_save_that_is_cancelled_is_a_whole_one(tmp_path: Path) -> None:
    cursor = FileCursor(tmp_path / "cursor")
    saving = asyncio.create_task(cursor.save("token"))
    await asyncio.sleep(0)
    saving.cancel()
    with pytest.raises(asyncio.CancelledError):
        await saving
    async with asyncio.timeout(2):
        while await cursor.load() is None:
            await asyncio.sleep(0.01)
    assert await cursor.load() == "token"
