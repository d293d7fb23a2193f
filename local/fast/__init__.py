"""Fast formulas for ConvTasNetStereo: guests, used only for a model that they are shown to equal.

local/tasnet.py is the definition; nothing here is needed for a result. equal.py decides, rows.py
has the formulas of inference, training.py those of training.
"""
