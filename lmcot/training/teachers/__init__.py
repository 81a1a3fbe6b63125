"""The teachers: each makes rationales for training questions, one module each."""
