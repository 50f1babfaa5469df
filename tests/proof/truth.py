"""The promises that compare streams with the world: Honest, Fair, Snapshot."""

from __future__ import annotations

from tests.proof.history import History, Stream
from tests.proof.records import Event, State
from tests.proof.selection import selects_user
from tests.proof.verdict import Verdict


def honest(history: History) -> Verdict:
    """Only committed changes are sent, to all alike; every acknowledged change is sent; the tables say the same."""
    verdict = Verdict("Honest")
    for contradiction in history.contradictions:
        verdict.breaks(contradiction)
    _check_events(history, verdict)
    if not history.unseen:
        _check_answers(history, verdict)
        _check_tables(history, verdict)
    return verdict


def _check_events(history: History, verdict: Verdict) -> None:
    for position, event in history.log.items():
        verdict.checked += 1
        before = history.before.get(position)
        if event.previous is not None and before is not None and event.previous != before.digest:
            verdict.breaks(f"position {position}: `previous` is not the user's state before")
    for position in history.unexplained:
        event = history.log[position]
        verdict.breaks(f"position {position}: nobody asked for {event.type} {event.user.tag!r} of {event.user.id}")
    for op, positions in history.made.items():
        change = history.changes[op]
        if change.stores_nothing:
            verdict.breaks(f"{op} was refused, but is at position {positions[0]}")
        if len(positions) > max(len(change.intent.tags), 1):
            verdict.breaks(f"{op} happened more often than it was asked for, at {positions}")


def _check_answers(history: History, verdict: Verdict) -> None:
    sent = {(event.user.id, event.user.version): event.user for event in history.log.values()}
    for op, change in history.changes.items():
        done = change.done
        if done is None or not change.intent.stores:
            continue
        for user in done.users:
            verdict.checked += 1
            if sent.get((user.id, user.version)) != user:
                verdict.breaks(f"{op} was acknowledged with version {user.version} of {user.id}, which was not sent so")
        for _, outcome in change.attempts:
            if outcome is not None and outcome.result == "done" and outcome.users != done.users:
                verdict.breaks(f"{op} was answered in two ways")


def _check_tables(history: History, verdict: Verdict) -> None:
    last: dict[str, State] = {}
    for position in sorted(history.log):
        last[history.log[position].user.id] = history.log[position].user
    for user_id, user in last.items():
        verdict.checked += 1
        stored = history.rows.get(user_id)
        # Who was deleted is purged by and by.
        if stored != user and (stored is not None or user.living):
            verdict.breaks(f"user {user_id}: the last event says {user}, the table {stored}")
    for user_id in history.rows.keys() - last.keys():
        verdict.breaks(f"user {user_id} is in the table and in no event")


def fair(history: History) -> Verdict:
    """A subscriber that stops reading costs bounded memory and delays no one."""
    verdict = Verdict("Fair")
    for one in history.stuck:
        verdict.checked += one.events * one.witnesses
        if one.received < one.events * one.witnesses:
            verdict.breaks(
                f"replica {one.replica}: while {one.streams} streams did not read, others got {one.received} of"
                f" {one.events * one.witnesses} events"
            )
        if one.grown > one.allowed:
            verdict.breaks(
                f"replica {one.replica}: {one.streams} streams that did not read cost {one.grown >> 20} MiB,"
                f" allowed are {one.allowed >> 20} MiB"
            )
    return verdict


def snapshot(history: History) -> Verdict:
    """A snapshot names every selected user once; the copy made of it and the events after it equals the table."""
    verdict = Verdict("Snapshot")
    for name, streams in history.sessions.items():
        if streams[0].opened.start == "snapshot":
            _check_copy(history, name, streams, verdict)
    return verdict


def _check_copy(history: History, name: str, streams: list[Stream], verdict: Verdict) -> None:
    selection = streams[0].opened.selection or {}
    copy: dict[str, State] = {}
    named: set[str] = set()
    at: int | None = None
    copied = False
    for stream in streams:
        if stream.opened.start == "snapshot":
            copy, named, at, copied = {}, set(), None, False
        for message in stream.messages:
            if message.mark == "snapshot_begin":
                at = message.mark_position
            for event in message.events:
                if event.type != "SNAPSHOT":
                    _apply(copy, event)
                    continue
                verdict.checked += 1
                if event.user.id in named:
                    verdict.breaks(f"{stream.opened.stream}: user {event.user.id} is named twice")
                if event.position != at or copied:
                    verdict.breaks(f"{stream.opened.stream}: a state at {event.position}, the snapshot is of {at}")
                named.add(event.user.id)
                _apply(copy, event)
            if message.mark == "snapshot_end" and at is not None:
                copied = True
                copy = {user_id: user for user_id, user in copy.items() if user_id in named}
                _check_named(history, stream, at, named, verdict)
    closed = streams[-1].closed
    if not copied or closed is None or closed.reason != "finished":
        return
    living = {user_id: user for user_id, user in copy.items() if user.living}
    table = {user_id: user for user_id, user in history.rows.items() if user.living and selects_user(selection, user)}
    verdict.checked += len(table)
    for user_id in table.keys() | living.keys():
        if living.get(user_id) != table.get(user_id):
            verdict.breaks(f"{name}: the copy has {living.get(user_id)}, the table {table.get(user_id)}")


def _apply(copy: dict[str, State], event: Event) -> None:
    known = copy.get(event.user.id)
    if known is None or event.user.version > known.version:
        # Who left the filter is kept as not living: an older state must not bring it back.
        copy[event.user.id] = event.user._replace(living=False) if event.left_filter else event.user


def _check_named(history: History, stream: Stream, at: int, named: set[str], verdict: Verdict) -> None:
    """Who was living and selected at the snapshot's position and from then on must have been named."""
    if history.unseen:
        return
    for user_id, since in history.selected_since(stream.opened.selection).items():
        if since <= at and user_id not in named:
            verdict.breaks(f"{stream.opened.stream}: user {user_id} was living at {at} and is not named")
