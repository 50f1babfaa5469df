"""What a revision tells the linter of its SQL. squawk reads the comments; `squawk.toml` has what holds for all."""

from __future__ import annotations

from alembic import context, op


def accept(*rules: str) -> None:
    """Lets the next statement break these rules of squawk. Say why where it is called."""
    if context.is_offline_mode():
        # Not by `static_output`: squawk wants no empty line between the comment and the statement.
        output = op.get_context().impl.output_buffer
        assert output is not None  # noqa: S101 - offline mode has one
        output.write(f"-- squawk-ignore {', '.join(rules)}\n")
