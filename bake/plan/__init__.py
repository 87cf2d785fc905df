"""Decides everything: what goes where, with which scale, in which file. Pure; no torch."""
