"""Plain sums of 16-bit weights on the processor, by NumPy alone, in processes of their own.

This is what most bakes are, and importing torch would take longer than they do. What is written is defined to the
last bit (docs/numerics.md), so it is what torch would write; whatever is in any way special is left to torch.
"""
