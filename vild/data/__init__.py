"""Data sets, the built-in world, and the mapper that keeps boxes and embeddings together."""
