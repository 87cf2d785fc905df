"""Merges: chunks of every model are read, blended in float64 and rounded once; see `bake.merges.merge`."""
