"""Learning-rate schedules: a linear warm-up, and what comes after it."""

import math

import keras
from keras import ops

# Those that end at `final_fraction` of the peak.
_ENDING = ("cosine", "linear", "wsd")
_NAMES = (*_ENDING, "inverse_sqrt", "constant")
_DECAYS = ("linear", "sqrt")


@keras.saving.register_keras_serializable(package="kerasllm")
class Schedule(keras.optimizers.schedules.LearningRateSchedule):
    """A linear warm-up to the peak, and then one of several shapes; `make_schedule` makes it.

    With the step `s` counted from 0, `w` steps of warm-up, `n` steps in all and the fraction `f` at the
    end, the rate is the peak times:

    ```
    (s + 1) / (w + 1)                        in the warm-up: the first step learns already
    f + (1 - f) * (1 + cos(pi * p)) / 2      "cosine", where p = (s - w) / (n - w)
    1 - (1 - f) * p                          "linear"
    1, at the end 1 - (1 - f) * q            "wsd", where q goes from 0 to 1 in the last `decay_steps` steps
    1, at the end 1 - (1 - f) * sqrt(q)      "wsd" with the decay "sqrt"
    sqrt((w + 1) / (s + 1))                  "inverse_sqrt"
    1                                        "constant"
    ```

    From step `n` on it stays.

    Args:
        name: The shape.
        peak: The highest learning rate.
        total_steps: Steps of the whole training.
        warmup_steps: Steps until the peak.
        final_fraction: Final rate as a fraction of the peak.
        decay_steps: Steps of the decay of "wsd".
        decay: Its shape: "linear" or "sqrt".
    """

    def __init__(
        self,
        name: str,
        peak: float,
        total_steps: int,
        warmup_steps: int,
        final_fraction: float,
        decay_steps: int,
        decay: str,
    ):
        super().__init__()
        self.name = name
        self.peak = peak
        self.total_steps = total_steps
        self.warmup_steps = warmup_steps
        self.final_fraction = final_fraction
        self.decay_steps = decay_steps
        self.decay = decay

    def __call__(self, step):
        """Returns the learning rate of a step, counted from 0: a float32."""
        step = ops.cast(step, "float32")
        last = ops.minimum(step, float(self.total_steps))
        warmup = (step + 1.0) / (self.warmup_steps + 1.0)
        fraction = ops.where(step < self.warmup_steps, warmup, self._after_warmup(last))
        return self.peak * fraction

    def _after_warmup(self, step):
        drop = 1.0 - self.final_fraction
        progress = (step - self.warmup_steps) / (self.total_steps - self.warmup_steps)
        if self.name == "cosine":
            return self.final_fraction + drop * 0.5 * (1.0 + ops.cos(math.pi * progress))
        if self.name == "linear":
            return 1.0 - drop * progress
        if self.name == "wsd":
            part = (step - (self.total_steps - self.decay_steps)) / self.decay_steps
            part = ops.maximum(part, 0.0)
            return 1.0 - drop * (ops.sqrt(part) if self.decay == "sqrt" else part)
        if self.name == "inverse_sqrt":
            return ops.sqrt((self.warmup_steps + 1.0) / (step + 1.0))
        return ops.ones_like(step)

    def get_config(self):
        return {
            "name": self.name,
            "peak": self.peak,
            "total_steps": self.total_steps,
            "warmup_steps": self.warmup_steps,
            "final_fraction": self.final_fraction,
            "decay_steps": self.decay_steps,
            "decay": self.decay,
        }


def make_schedule(
    name: str,
    peak: float,
    total_steps: int,
    warmup_steps: int | None = None,
    final_fraction: float = 0.1,
    decay_steps: int | None = None,
    decay: str = "linear",
) -> Schedule:
    """Makes a learning-rate schedule: a linear warm-up to the peak, and then

    * "cosine": half a cosine; Loshchilov, Hutter: "SGDR" (2017), without restarts;
    * "linear": a straight line;
    * "wsd": the peak, and a decay at the end ("warm-up, stable, decay"); Hu et al.: "MiniCPM" (2024). The
      training may go on from before the decay, with more steps. `decay="sqrt"` is 1 minus the root;
      Hägele et al.: "Scaling Laws and Compute-Optimal Training Beyond Fixed Training Durations" (2024),
      who go down to 0;
    * "inverse_sqrt": one over the root of the step; Raffel et al.: "Exploring the Limits of Transfer
      Learning with a Unified Text-to-Text Transformer" (2020), who stay at the peak instead of warming up;
    * "constant": the peak.

    Args:
        name: One of these.
        peak: The highest learning rate.
        total_steps: Steps of the whole training; afterwards the rate stays at its final value.
        warmup_steps: Steps until the peak. None: 10 % of the total, at most 1,000.
        final_fraction: Final rate as a fraction of the peak; of "cosine", "linear" and "wsd".
        decay_steps: Steps of the decay of "wsd". None: 10 % of the total, at least 1.
        decay: The shape of the decay of "wsd": "linear" or "sqrt".

    Returns:
        The schedule.

    Raises:
        ValueError: If there is no such schedule, or a number is out of range.
    """
    if name not in _NAMES:
        raise ValueError(f"`name` must be one of {list(_NAMES)}. Received: name={name!r}")
    if decay not in _DECAYS:
        raise ValueError(f"`decay` must be one of {list(_DECAYS)}. Received: decay={decay!r}")
    if warmup_steps is None:
        warmup_steps = min(1000, total_steps // 10)
    if not 0 <= warmup_steps < total_steps:
        raise ValueError(
            "`warmup_steps` must be at least 0 and below `total_steps`. "
            f"Received: warmup_steps={warmup_steps}, total_steps={total_steps}"
        )
    if not 0 <= final_fraction <= 1:
        raise ValueError(f"`final_fraction` must be from 0 to 1. Received: final_fraction={final_fraction}")
    if decay_steps is None:
        decay_steps = max(1, total_steps // 10)
    if name == "wsd" and not 1 <= decay_steps <= total_steps - warmup_steps:
        raise ValueError(
            "`decay_steps` must be at least 1 and fit in after the warm-up. Received: "
            f"decay_steps={decay_steps}, warmup_steps={warmup_steps}, total_steps={total_steps}"
        )
    return Schedule(name, peak, total_steps, warmup_steps, final_fraction, decay_steps, decay)


def cosine_schedule(
    peak: float, total_steps: int, warmup_steps: int | None = None, final_fraction: float = 0.1
) -> Schedule:
    """Makes a linear warm-up followed by half a cosine; see `make_schedule`."""
    return make_schedule("cosine", peak, total_steps, warmup_steps, final_fraction)
