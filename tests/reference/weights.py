"""Random weights in which every operation matters, and their arrays by path."""

import numpy as np


def randomize(layer, seed=0):
    """Draws all weights at scale 0.5, the gains of norms around 1, the biases included.

    With the small values and the ones and zeros that layers start from, a missing bias, gain or scaling
    would hardly show.

    Returns:
        The layer.
    """
    rng = np.random.default_rng(seed)
    for weight in layer.weights:
        noise = rng.standard_normal(weight.shape)
        weight.assign(1 + 0.3 * noise if weight.name == "scale" else 0.5 * noise)
    return layer


def widen_columns(model, seed=0):
    """Makes a few columns of activations 64 times as wide, as trained models have them.

    The weights behind them become as much smaller, so what the model gives stays the same.
    """
    from kerasllm.export import smooth  # not with every backend

    rng = np.random.default_rng(seed)
    for link in smooth._links(model):
        factors = link.widest(np.ones(link.matrices[0].kernel.shape[0], "float32"))
        factors[rng.permutation(len(factors))[:3]] = 2.0**-6
        link.divide(factors)


def arrays(layer):
    """The weights in float64 by their paths below the layer."""
    return {weight.path.partition("/")[2]: weight.numpy().astype("float64") for weight in layer.weights}


def normal(*shape, seed=1):
    """Standard normal float32 inputs."""
    return np.random.default_rng(seed).standard_normal(shape).astype("float32")
