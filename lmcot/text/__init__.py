"""What a text says: its sentences, the answer in it, whether two answers are the same."""
