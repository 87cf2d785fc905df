"""Bytes: which tensors a file holds, where they lie, and how an output replaces another."""
