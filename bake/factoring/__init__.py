"""Matrices as products of two thin ones: the maths of extracting, resizing and combining LoRAs."""
