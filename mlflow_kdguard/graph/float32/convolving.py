"""Convolutions of many coefficients: as matrix products, and of single pixels by their places."""

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from mlflow_kdguard.graph.layers import Array, Conv


def convolved(layer: Conv, x: Array) -> Array:
    """The convolution without its bias: N×out×height×width."""
    out, into, height, width = layer.weight.shape
    top, left, bottom, right = layer.pads
    padded = np.pad(x, ((0, 0), (0, 0), (top, bottom), (left, right)))
    reach = tuple((k - 1) * d + 1 for k, d in zip((height, width), layer.dilations, strict=True))
    seen = sliding_window_view(padded, reach, axis=(2, 3))
    seen = seen[:, :, :: layer.strides[0], :: layer.strides[1]]
    seen = seen[..., :: layer.dilations[0], :: layer.dilations[1]].transpose(0, 1, 4, 5, 2, 3)
    columns = seen.reshape(len(x), layer.groups, into * height * width, -1)
    kernel = layer.weight.reshape(layer.groups, out // layer.groups, -1)
    found: Array = np.matmul(kernel, columns).reshape(len(x), *layer.shape)
    return found


def of_pixels(layer: Conv, single: Array) -> Array:
    """What each pixel becomes: B×d×shape, for values that are `single` (B×C×H×W) times a pixel."""
    count, channels, height, width = single.shape
    found = np.zeros((count, channels * height * width, *layer.shape))
    share, into = layer.weight.shape[0] // layer.groups, layer.weight.shape[1]
    down, across = (np.arange(side) for side in layer.shape[1:])
    for i, j in np.ndindex(*layer.weight.shape[2:]):
        y = down * layer.strides[0] + i * layer.dilations[0] - layer.pads[0]
        x = across * layer.strides[1] + j * layer.dilations[1] - layer.pads[1]
        rows, columns = ((y >= 0) & (y < height)), ((x >= 0) & (x < width))
        at, to = np.ix_(y[rows], x[columns]), np.ix_(down[rows], across[columns])
        for channel in range(channels):
            group = channel // into
            outs = slice(group * share, (group + 1) * share)
            weight = layer.weight[outs, channel - group * into, i, j]
            pixel = (channel * height + at[0]) * width + at[1]
            size = np.moveaxis(single[:, channel, at[0], at[1]], 0, -1)
            found[:, pixel, outs, to[0], to[1]] = size[..., None] * weight
    return found
