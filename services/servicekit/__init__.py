"""Plumbing that every service shares and that knows no business word: settings, logs, telemetry, gRPC, Postgres."""
