"""Tests against real Postgres and real processes; `harness` holds what they share."""
