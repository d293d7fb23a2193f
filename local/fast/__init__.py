"""Fast formulas for ConvTasNetStereo."""
