"""Ray: the fleets and their work ledger, what one actor does, weights, the resource plan."""

import os

# Threads that wait for each other sleep: by default they spin, and two processes of two threads on
# two cores then get through a seventh of their work. The OpenMP runtime reads it when torch is
# imported, which the modules of this package do.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
