"""Ray: the fleets and their work ledger, what one actor does, weights, the resource plan."""

import ray

from lmcot.process import prepare

# Ray imports an actor's class, and torch with it, before it calls the constructor. A worker
# process of Ray's is prepared here, ahead of that; the process of a user who imports this is not.
if ray._private.worker.global_worker.mode == ray.WORKER_MODE:
    prepare()
