"""How LoRA's A and B start.

start.py has the starts that need no data: drawn, or computed from the base weight. Each of the others has its own
file, and config.py has the settings. None changes the base weight: where ``B A`` is not zero at the start, the layer
subtracts that product (residual.py). No torch here.
"""
