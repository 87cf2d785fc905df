"""Reads an output back like a stranger's file and recomputes it. Trusts nobody, the engine least of all."""
