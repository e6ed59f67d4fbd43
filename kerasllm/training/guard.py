"""Updates that are left out: of gradients that are not finite, or far larger than those before."""

import tensorflow as tf
from keras import ops


class Guarded:
    """Lets an optimizer leave out updates that would harm; a mixin, before a Keras optimizer.

    The norm of all gradients together, before they are clipped, is compared with those of the batches
    before; Chowdhery et al.: "PaLM" (2022) got over their spikes of the loss by leaving out the batches
    around them. An update that is left out changes neither the weights nor the state of the optimizer nor
    its count of updates, as in `keras.optimizers.LossScaleOptimizer`, inside of which this works too.

    Args:
        skip_above: An update is left out if the norm is not finite, or above this times the median of the
            last norms. `math.inf`: only if it is not finite; None: never.
        skip_window: Number of the last norms. As long as there are fewer, only what is not finite is left
            out.
        **kwargs: Of the optimizer.

    Attributes:
        gradient_norm: With `skip_above`, the last norm, before clipping: a variable.
        skipped_updates: With `skip_above`, the number of updates that were left out: a variable.

    Raises:
        ValueError: If an argument is out of range, or the optimizer accumulates gradients.
    """

    def __init__(self, *, skip_above: float | None = None, skip_window: int = 100, **kwargs):
        if skip_above is not None and not skip_above > 1:
            raise ValueError(f"`skip_above` must be None or above 1. Received: skip_above={skip_above}")
        if skip_window < 1:
            raise ValueError(f"`skip_window` must be at least 1. Received: skip_window={skip_window}")
        if skip_above is not None and kwargs.get("gradient_accumulation_steps"):
            raise ValueError(
                "With `skip_above` gradients are accumulated by `compile(microbatches=...)`. Received: "
                f"gradient_accumulation_steps={kwargs['gradient_accumulation_steps']}"
            )
        super().__init__(**kwargs)
        self.skip_above = skip_above
        self.skip_window = skip_window

    def build(self, variables):
        """Makes the variables of the optimizer; Keras calls it."""
        if self.built:
            return
        super().build(variables)
        if self.skip_above is None:
            return
        # As the optimizer's count of updates: the same on all replicas.
        shared = {"aggregation": "only_first_replica"}
        self.gradient_norm = self.add_variable((), dtype="float32", name="gradient_norm", **shared)
        self.skipped_updates = self.add_variable((), dtype="int", name="skipped_updates", **shared)
        self._norms = self.add_variable((self.skip_window,), dtype="float32", name="norms", **shared)
        self._norm_count = self.add_variable((), dtype="int", name="norm_count", **shared)

    def apply(self, grads, trainable_variables=None):
        """Updates the variables, or leaves it; see `keras.optimizers.Optimizer.apply`."""
        update = super().apply
        if self.skip_above is None:
            update(grads, trainable_variables)
            return
        if not self.built:
            self.build(list(trainable_variables))
        if tf.__internal__.distribute.strategy_supports_no_merge_call():
            is_good = self._judge(self._measure(grads))
            ops.cond(is_good, lambda: update(grads, trainable_variables), lambda: None)
            return

        # The update of a replica calls `merge_call`, which is not allowed in a branch there; so the branch
        # is taken outside of the replicas.
        def apply_everywhere(strategy, grads, trainable_variables):
            norms = strategy.extended.call_for_each_replica(self._measure, args=(grads,))
            # The gradients are sums over the replicas, so all have the same norm.
            is_good = self._judge(strategy.experimental_local_results(norms)[0])

            def apply():
                strategy.extended.call_for_each_replica(update, args=(grads, trainable_variables))

            ops.cond(is_good, apply, lambda: None)

        tf.distribute.get_replica_context().merge_call(apply_everywhere, args=(grads, trainable_variables))

    def _measure(self, gradients):
        """The norm of all gradients together."""
        gradients = [tf.convert_to_tensor(each) for each in gradients if each is not None]
        squares = [tf.reduce_sum(tf.square(tf.cast(each, "float32"))) for each in gradients]
        return tf.sqrt(tf.add_n(squares)) / (self.loss_scale_factor or 1.0)

    def _judge(self, norm):
        """Takes note of a norm and returns whether to update."""
        is_finite = tf.math.is_finite(norm)
        norms, count = tf.convert_to_tensor(self._norms.value), tf.convert_to_tensor(self._norm_count.value)
        median = tf.sort(norms)[self.skip_window // 2]
        is_spike = (count >= self.skip_window) & (norm > self.skip_above * median)
        is_good = is_finite & ~is_spike
        # Spikes count too, or a training whose gradients have grown for good would never go on.
        is_oldest = tf.range(self.skip_window, dtype=count.dtype) == count % self.skip_window
        self._norms.assign(tf.where(is_finite & is_oldest, norm, norms))
        self._norm_count.assign_add(tf.cast(is_finite, count.dtype))
        self.gradient_norm.assign(norm)
        self.skipped_updates.assign_add(tf.cast(~is_good, count.dtype))
        return is_good

    def get_config(self):
        return {**super().get_config(), "skip_above": self.skip_above, "skip_window": self.skip_window}
