"""A cluster's resources: the resource plan, placement, and joining or starting Ray."""
