"""AdamW and the learning-rate schedule with the settings usual for language models."""

from collections.abc import Sequence

import keras


@keras.saving.register_keras_serializable(package="kerasllm")
class AdamW(keras.optimizers.AdamW):
    """Keras's AdamW that decays matrices and embeddings, but not biases and norm gains.

    Loshchilov, Hutter: "Decoupled Weight Decay Regularization" (2019). Unlike a list set by
    `exclude_from_weight_decay`, the exclusions survive saving.

    Args:
        learning_rate: Step size or schedule.
        weight_decay: Fraction of a weight, times the learning rate, taken off per step.
        beta_1: Decay of the mean of the gradients.
        beta_2: Decay of the mean of their squares.
        epsilon: Added to the root of the latter.
        global_clipnorm: Largest norm of all gradients together; None does not clip.
        not_decayed: Regular expressions; a weight in whose name one of them is found is not decayed.
        **kwargs: As in Keras.
    """

    def __init__(
        self,
        learning_rate: float | keras.optimizers.schedules.LearningRateSchedule = 3e-4,
        weight_decay: float = 0.1,
        beta_1: float = 0.9,
        beta_2: float = 0.95,
        epsilon: float = 1e-8,
        global_clipnorm: float | None = 1.0,
        not_decayed: Sequence[str] = (r"\bbias\b", r"\bscale\b"),
        **kwargs,
    ):
        super().__init__(
            learning_rate=learning_rate,
            weight_decay=weight_decay,
            beta_1=beta_1,
            beta_2=beta_2,
            epsilon=epsilon,
            global_clipnorm=global_clipnorm,
            **kwargs,
        )
        self.not_decayed = tuple(not_decayed)
        self.exclude_from_weight_decay(var_names=list(self.not_decayed))

    def get_config(self):
        return {**super().get_config(), "not_decayed": list(self.not_decayed)}


def cosine_schedule(
    peak: float, total_steps: int, warmup_steps: int | None = None, final_fraction: float = 0.1
) -> keras.optimizers.schedules.CosineDecay:
    """Makes a linear warm-up followed by half a cosine.

    Args:
        peak: The highest learning rate.
        total_steps: Steps of the whole training; afterwards the rate stays at its final value.
        warmup_steps: Steps until the peak. None: 10 % of the total, at most 1,000.
        final_fraction: Final rate as a fraction of the peak.

    Returns:
        The schedule.

    Raises:
        ValueError: If the warm-up does not leave a step.
    """
    if warmup_steps is None:
        warmup_steps = min(1000, total_steps // 10)
    if not 0 <= warmup_steps < total_steps:
        raise ValueError(
            "`warmup_steps` must be at least 0 and below `total_steps`. "
            f"Received: warmup_steps={warmup_steps}, total_steps={total_steps}"
        )
    if not warmup_steps:
        return keras.optimizers.schedules.CosineDecay(peak, total_steps, alpha=final_fraction)
    return keras.optimizers.schedules.CosineDecay(
        peak / (warmup_steps + 1),  # the first step learns already
        total_steps - warmup_steps,
        alpha=final_fraction,
        warmup_target=peak,
        warmup_steps=warmup_steps,
    )
