"""What a cluster has room for: the resource plan, placement, and joining or starting Ray."""
