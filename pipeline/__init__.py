"""Batch work over Ray, and the command line."""

import os

# Ray forks this process, and runs Python in the child before its daemons begin. gRPC's own handlers
# of a fork crash there while channels are open; the daemon is gone, and Ray waits for it in vain.
# Read by gRPC when it starts, so it must be said before.
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "false")
