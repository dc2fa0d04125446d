"""How LoRA's A and B start, one file for each initialisation.

Those that are drawn fill ``A: (r, in)`` and ``B: (out, r)`` in place. The others compute both from the base weight
(out, in), some with a statistic of the training data. None changes the base weight: where ``B A`` is not zero at the
start, the layer subtracts that product (residual.py). No torch here.
"""
