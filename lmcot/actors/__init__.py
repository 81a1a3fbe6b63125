"""Ray: the fleets and their work ledger, what one actor does, weights, the resource plan."""

import os

# Threads that wait for each other spin for milliseconds by default: two processes of two threads on
# two cores then get through a seventh of their work. Spinning for about a microsecond before they
# sleep, they get through all of it, and one process by itself is as fast as before. The OpenMP
# runtime reads it when torch is imported, which the modules of this package do.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")
