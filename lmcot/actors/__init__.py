"""Ray: the fleets and their work ledger, what one actor does, weights, the resource plan."""

import os

# Threads that wait for each other spin for long by default: two processes of two threads on two
# cores then hold each other up many times over. Spinning briefly before they sleep, each takes
# twice as long as alone, and one by itself is as fast as before. The OpenMP runtime reads it when
# torch is imported, which the modules of this package do.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")
