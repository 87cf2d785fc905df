"""LoRA, LoHa, LoKr and DoRA in 16-bit weights on the processor, by NumPy alone, in processes of their own.

This is what most bakes are, and importing torch would take longer than they do. What is written is what torch would
write: sums of LoRAs are defined to the last bit (docs/numerics.md), the others are made in float64 and rounded once.
Whatever is in any way special is left to torch.
"""
