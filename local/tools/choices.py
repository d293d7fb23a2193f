"""What several flags and functions let one choose from."""

# How a song is separated: see local/inference.py.
METHODS = ("overlap-add", "full", "stream")
SEGMENT = 6.0  # seconds of a window
OVERLAP = 0.1  # seconds of a crossfade
# Whether to use the fast formulas: where they equal the model; or fail; never.
FAST = ("auto", "yes", "no")
# How much of the forward pass the backward pass computes again: see local/fast/recompute.py.
MEMORY = ("none", "some", "most")
SCORERS = ("bsseval", "museval")
SUFFIXES = ("wav", "flac")  # of the files of a data set
