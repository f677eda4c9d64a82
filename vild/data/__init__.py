"""Data sets, loaders and mappers, proposals and their provenance."""
