"""The trained pair at work: the small LM's guidance, the frozen LM's answer. No Ray, no HTTP."""
