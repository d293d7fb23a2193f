"""Lets museval run with numpy 2.4 and later.

museval 0.4.1 names np.linalg.linalg.LinAlgError where a matrix is singular; numpy 2.4 removed
np.linalg.linalg, whose names np.linalg has itself.
"""

import numpy as np


def import_museval():
    """Return the module museval. Importing it fails where ffmpeg is not on the PATH."""
    if not hasattr(np.linalg, "linalg"):
        np.linalg.linalg = np.linalg
    import museval

    return museval
