"""The users of locust, who ask for guided answers one after the other."""

from __future__ import annotations

import itertools
import os
import random

from locust import HttpUser, task

_NUMBERS = itertools.count()
CONTEXT = [
    {
        "title": "Elko, Nevada",
        "text": "Elko is the largest city of Elko County, Nevada, United States. It straddles the "
        "Humboldt River. The city was founded in 1868 as the east end of a railway.",
    },
    {
        "title": "Humboldt River",
        "text": "The Humboldt River is an extensive river drainage system in north-central Nevada.",
    },
]


class Asking(HttpUser):
    """A user who asks a new question each time, so that no answer comes from a cache."""

    @task
    def answer(self) -> None:
        """Asks for one answer."""
        body = {
            "question": f"Which river does Elko straddle, number {next(_NUMBERS)}?",
            "context": CONTEXT,
            "max_tokens": int(os.environ.get("LOAD_MAX_TOKENS", "24")),
            "temperature": 1.0,
            "seed": random.randrange(2**31),
        }
        with self.client.post("/v1/answer", json=body, catch_response=True) as reply:
            if reply.status_code == 503 and reply.headers.get("retry-after"):
                reply.failure("503")
            elif reply.status_code != 200:
                reply.failure(f"status {reply.status_code}")
            elif "answer" not in reply.json():
                reply.failure("no answer")
