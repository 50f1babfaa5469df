"""All tests. They import gRPC and start processes: its fork handlers, which run in between, may crash the child."""

import os

os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "false")
