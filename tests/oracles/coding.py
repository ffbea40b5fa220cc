"""CacheGen's anchors and bins for one head's rows, one number at a time, from section 5.2 of the paper."""

import numpy as np


def decoded(rows_CH, size: float, group: int):
    """(what the decoder gives for these rows, the largest error that a number may have there). Rows of zeros are no rows."""
    rows_CH = np.asarray(rows_CH, np.float64)
    there = [c for c in range(len(rows_CH)) if (rows_CH[c] != 0).any()]
    out, bound = np.zeros(rows_CH.shape), np.zeros(rows_CH.shape)
    for h in range(rows_CH.shape[1]):
        x = rows_CH[there, h]
        step = size * x.std() if x.std() > 0 else 1.0
        first = x[::group] if group else []
        unit = (max(first) - min(first)) / 255 if group and max(first) > min(first) else 1.0
        for i, c in enumerate(there):
            if group and i % group == 0:
                out[c, h], bound[c, h] = min(first) + unit * round((x[i] - min(first)) / unit), unit / 2
                continue
            base = out[there[i - i % group], h] if group else x.mean()
            out[c, h], bound[c, h] = base + step * round((x[i] - base) / step), step / 2
    return out, bound
