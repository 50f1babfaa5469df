"""Structured logs: JSON for machines, readable lines on a terminal; trace and span ids where there is a span, and the
caller where there is a call.

No line names a user: what looks like an address or like a value in an error of Postgres is masked, wherever it stands.
"""

from __future__ import annotations

import logging
import re
import sys
from contextvars import ContextVar
from typing import Any, cast

import structlog
from opentelemetry import trace
from structlog.typing import EventDict, FilteringBoundLogger, WrappedLogger

from servicekit.settings import LogSettings

# Who calls, while a call is served.
caller: ContextVar[str] = ContextVar("caller", default="")

_ADDRESS = re.compile(r"[^\s@<>\"'(),;:=\[\]{}]+@(?=[\w.-]*\w)")
# `DETAIL:  Key (username)=(ada) already exists.` and `Failing row contains (...)`.
_VALUES = re.compile(r"(Key \([^)]*\)=|Failing row contains )\(.*\)")


def _masked(value: Any) -> Any:
    if isinstance(value, str):
        return _ADDRESS.sub("***@", _VALUES.sub(r"\1(***)", value))
    if isinstance(value, list | tuple):
        return [_masked(one) for one in value]
    if isinstance(value, dict):
        return {key: _masked(one) for key, one in value.items()}
    return value


def _mask(_: WrappedLogger, __: str, event: EventDict) -> EventDict:
    return {key: _masked(value) for key, value in event.items()}


def _add_caller(_: WrappedLogger, __: str, event: EventDict) -> EventDict:
    if name := caller.get():
        event["caller"] = name
    return event


def _add_trace(_: WrappedLogger, __: str, event: EventDict) -> EventDict:
    context = trace.get_current_span().get_span_context()
    if context.is_valid:
        event["trace_id"] = format(context.trace_id, "032x")
        event["span_id"] = format(context.span_id, "016x")
    return event


def configure(settings: LogSettings, service: str) -> None:
    """Sets up structlog and routes the standard library's loggers through it. Call once, first."""
    as_json = settings.format == "json" or (settings.format == "auto" and not sys.stderr.isatty())
    shared: list[structlog.typing.Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        _add_trace,
        _add_caller,
    ]
    # Colours are asked for by whoever reads the lines, which need not be this process's own terminal.
    readable = structlog.dev.ConsoleRenderer(
        colors=sys.stderr.isatty(), exception_formatter=structlog.dev.plain_traceback
    )
    tail: list[structlog.typing.Processor] = [
        structlog.processors.format_exc_info,
        _mask,
        structlog.processors.JSONRenderer() if as_json else readable,
    ]
    level = logging.getLevelNamesMapping()[settings.level]
    structlog.configure(
        processors=[*shared, structlog.processors.StackInfoRenderer(), *tail],
        wrapper_class=structlog.make_filtering_bound_logger(level),
        logger_factory=structlog.WriteLoggerFactory(file=sys.stderr),
        cache_logger_on_first_use=True,
    )
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=shared,
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *tail],
        )
    )
    logging.basicConfig(level=max(level, logging.WARNING), handlers=[handler], force=True)
    structlog.contextvars.bind_contextvars(service=service)


def get(name: str) -> FilteringBoundLogger:
    """A logger; `name` says which module speaks."""
    return cast("FilteringBoundLogger", structlog.get_logger(module=name))
