"""Draws the next questions: a sampler that can stop and resume exactly."""

from __future__ import annotations

import hashlib
import random

from lmcot.errors import UserError


class PromptSampler:
    """Draws indices of ``count`` examples, each once per epoch, in a new order in each epoch.

    The order depends on (seed, epoch) alone, so a position is all there is to remember.
    """

    def __init__(self, count: int, seed: int) -> None:
        if count < 1:
            raise ValueError(f"a sampler needs at least one example, not {count}")
        self._count = count
        self._seed = seed
        self._epoch = 0
        self._position = 0
        self._order = self._permutation()

    @property
    def epoch(self) -> int:
        """Number of the epoch that the next index is of, from 0."""
        return self._epoch + (self._position == self._count)

    def next(self, n: int) -> list[int]:
        """The next ``n`` indices, across epochs if necessary."""
        drawn: list[int] = []
        while len(drawn) < n:
            if self._position == self._count:
                self._epoch, self._position = self._epoch + 1, 0
                self._order = self._permutation()
            take = self._order[self._position : self._position + n - len(drawn)]
            drawn += take
            self._position += len(take)
        return drawn

    def state(self) -> dict[str, int]:
        """The position of the sampler, as plain numbers for `restore`."""
        return {
            "count": self._count,
            "seed": self._seed,
            "epoch": self._epoch,
            "position": self._position,
        }

    def restore(self, state: dict[str, int]) -> None:
        """Resumes from a state.

        Raises:
            UserError: if the state is not of this sampler's examples and seed.
        """
        for key, own in (("count", self._count), ("seed", self._seed)):
            if state.get(key) != own:
                raise UserError(
                    f"the saved sampler has {key} {state.get(key)}, but this run has {own}: "
                    "resume with the data and the seed that the run began with"
                )
        epoch, position = state.get("epoch", -1), state.get("position", -1)
        if epoch < 0 or not 0 <= position <= self._count:
            raise UserError(
                f"the saved sampler's epoch {epoch} and position {position} are not possible: "
                "resume from another checkpoint"
            )
        self._epoch, self._position = epoch, position
        self._order = self._permutation()

    def _permutation(self) -> list[int]:
        # Seeded by text: the same on every machine, and no two (seed, epoch) pairs collide.
        order = list(range(self._count))
        random.Random(f"{self._seed}/{self._epoch}").shuffle(order)
        return order


def sample_seed(*parts: int | str) -> int:
    """A 63-bit seed from what names a sample: (run seed, step, question, k)."""
    digest = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1
