"""Tests against real Postgres and real processes; `harness` holds what they share."""

import os

# Tests start processes while gRPC's threads run: its fork handlers may crash the child before it becomes its program.
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "false")
