"""Weights and pictures that anyone can make again from names and sizes alone (numpy only).

Each array has a random generator of its own, seeded with the CRC-32 of its name, so that none depends on
another. The weights test code, not quality: distances between features made with them mean nothing.
"""
import zlib

import numpy as np

EMBEDDINGS = ("cls_token", "pos_embed", "mask_token", "class_embedding", "positional_embedding")


def _rng(name):
    return np.random.default_rng(zlib.crc32(name.encode()))


def synthetic_state(shapes):
    """{parameter name: shape} -> {parameter name: float32 array}; the step counters are int64 zeros."""
    out = {}
    for name, shape in shapes.items():
        rng, shape, leaf = _rng(name), tuple(shape), name.rsplit(".", 1)[-1]
        if leaf == "num_batches_tracked":
            out[name] = np.zeros(shape, np.int64)
            continue
        if leaf == "running_var":
            value = rng.uniform(0.5, 1.5, shape)
        elif leaf in EMBEDDINGS:
            value = 0.5 * rng.standard_normal(shape)
        elif len(shape) >= 2:                      # fan_in: the product of all axes but the first
            value = rng.standard_normal(shape) * np.sqrt(2.0 / np.prod(shape[1:]))
        else:                                      # scales near 1, biases and running means near 0
            value = 0.1 * rng.standard_normal(shape) + (leaf in ("weight", "gamma"))
        out[name] = np.asarray(value, np.float32)
    return out


def synthetic_images(name, n, h, w, c=3, block=8, noise=16):
    """uint8 (n, h, w, c): random squares of one colour each, with side `block`, and a little noise."""
    rng = _rng(name)
    coarse = rng.integers(0, 256, (n, -(-h // block), -(-w // block), c))
    image = coarse.repeat(block, 1).repeat(block, 2)[:, :h, :w]
    return np.clip(image + rng.integers(-noise, noise + 1, image.shape), 0, 255).astype(np.uint8)
