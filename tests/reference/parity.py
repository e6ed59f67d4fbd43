"""Models of transformers with random weights, and their tensors in ours; imports torch."""

import numpy as np
import torch


def randomize_torch(model, seed=0, scale=0.5):
    """Draws all weights, the gains of norms around 1, the biases included.

    Args:
        model: A model of transformers.
        seed: Of the random numbers.
        scale: Standard deviation of all but the gains.

    Returns:
        The model, with dropout off.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            is_gain = name.lower().endswith("norm.weight") or "norm" in name.lower().split(".")[-2]
            if is_gain and not name.endswith("bias"):
                parameter.copy_(1 + 0.3 * noise)
            else:
                parameter.copy_(scale * noise)
    return model.eval()


def load_into(model, torch_state_dict):
    """Fills a model from the tensors of transformers; every weight must be there, and nothing else.

    Args:
        model: A `LanguageModel`.
        torch_state_dict: What `state_dict()` of the same architecture gives.

    Returns:
        The model.
    """
    names = model.checkpoint_names(torch_state_dict)
    table, variables = model.weight_map(), model.variables_by_path()
    assert set(names.values()) == set(table)
    for theirs, ours in names.items():
        paths, transform = table[ours]
        arrays = transform.to_variables(torch_state_dict[theirs].detach().numpy())
        for path, array in zip(paths, arrays, strict=True):
            variables[path].assign(np.asarray(array))
    return model
