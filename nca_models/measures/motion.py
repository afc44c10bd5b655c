"""How much a film moves: optical flow between its frames, by OpenCV."""

from itertools import pairwise

import numpy as np


def flow(film: np.ndarray) -> np.ndarray:
    """Return the optical flow from each frame to the next, `[frames - 1, height, width, 2]`.

    By dense inverse search (Kroeger et al., ECCV 2016), in pixels, x first.

    Args:
        film: `[frames, height, width, 3]` uint8.

    Raises:
        ImportError: OpenCV is not installed.
    """
    try:
        import cv2
    except ImportError as error:
        raise ImportError(
            "optical flow needs OpenCV: run `pip install opencv-python-headless`"
        ) from error
    search = cv2.DISOpticalFlow.create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)
    grey = [cv2.cvtColor(np.ascontiguousarray(frame), cv2.COLOR_RGB2GRAY) for frame in film]
    flows = [search.calc(a, b, np.zeros((*a.shape, 2), np.float32)) for a, b in pairwise(grey)]
    return np.stack(flows)


def strength(film: np.ndarray) -> float:
    """Return the mean length of the flow in a film, in pixels a frame."""
    return float(np.linalg.norm(flow(film), axis=-1).mean())
