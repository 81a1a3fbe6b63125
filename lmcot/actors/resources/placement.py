"""Reserves room for a role's actors in a Ray placement group, new or this process's own."""

from __future__ import annotations

import copy
from collections import Counter
from typing import Any

import ray
from ray.util import get_current_placement_group
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from lmcot.actors.resources.packing import amounts, bundle
from lmcot.config import RoleSettings


def captured_in() -> PlacementGroup | None:
    """The placement group that captures this process's actors, as in a trial of Ray Tune."""
    group = get_current_placement_group()
    if group is None:
        return None
    context = ray.get_runtime_context()
    return group if context.should_capture_child_tasks_in_placement_group else None


class Placement:
    """Room for the actors of one role, reserved for all of them or for none.

    If this process's placement group captures its actors, no other group is made: its owner has
    settled what they may take, and where.
    """

    def __init__(
        self, role: str, settings: RoleSettings, *, guest: RoleSettings | None = None
    ) -> None:
        """Requests the room; `wait` waits for it.

        Args:
            role: its name below ``actors``.
            guest: a role of which each actor is to have room beside one of this role's, on the
                same GPU where both take a share of one (`for_guest`).
        """
        self._role = role
        self._settings = settings
        self._group: PlacementGroup | None = None
        self._owns = True
        if captured_in() is None:
            one = Counter(bundle(settings)) + Counter(bundle(guest) if guest else {})
            # Ray counts in shares of a ten-thousandth: a sum of floats may lie beside one.
            room = {name: round(amount, 4) for name, amount in one.items()}
            bundles = [dict(room) for _ in range(settings.count)]
            self._group = placement_group(bundles, strategy=settings.placement)

    def for_guest(self, role: str, settings: RoleSettings) -> Placement:
        """The room of the guests; it is given back with this one."""
        guest = copy.copy(self)
        guest._role, guest._settings, guest._owns = role, settings, False
        return guest

    def options(self, number: int) -> dict[str, Any]:
        """Keyword arguments for ``options`` of the actor class.

        Args:
            number: index of the actor within the role, from 0.
        """
        options: dict[str, Any] = {
            "num_cpus": self._settings.cpus,
            "num_gpus": self._settings.gpus,
            "resources": dict(self._settings.resources),
        }
        if self._group is not None:
            options["scheduling_strategy"] = PlacementGroupSchedulingStrategy(
                self._group, placement_group_bundle_index=number
            )
        return options

    def wait(self, limit_s: float) -> None:
        """Waits until there is room for all actors.

        Raises:
            TimeoutError: naming the role, what it takes and its strategy.
        """
        if self._group is None or self._group.wait(limit_s):
            return
        settings = self._settings
        raise TimeoutError(
            f"waited {limit_s:.0f} s for the placement of {settings.count} {self._role} actor(s) "
            f"with {amounts(bundle(settings))} each (strategy {settings.placement}): check that "
            f"the nodes have them free, or change actors.{self._role}"
        )

    def remove(self) -> None:
        """Gives the room back, and ends the actors still in it; may be called again.

        A guest's room stays.
        """
        if self._group is not None and self._owns:
            remove_placement_group(self._group)
        self._group = None
