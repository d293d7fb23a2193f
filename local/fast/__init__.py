"""The fast path: the numbers of ConvTasNetStereo by other formulas, in less time and memory.

local/tasnet.py is the definition. equal.py checks that the fast path equals a model, and without
this folder everything works as well, but slower. rows.py has the layers of inference; training.py
the forward pass of training, whose blocks are in block.py and their layers in layers.py.
recompute.py saves memory for any model, and choose.py decides what training uses.
"""
