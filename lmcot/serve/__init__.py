"""The trained pair at work: in a program (`Guide`), or behind an HTTP endpoint on Ray Serve."""
