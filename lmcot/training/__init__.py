"""Annotation, distillation and refinement: the loops, and what they are made of."""
