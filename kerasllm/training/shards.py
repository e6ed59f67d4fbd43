"""Optimizers of which each replica keeps a part of the state only."""

import math

import keras
import numpy as np
import tensorflow as tf


class Sharded:
    """Lets the replicas of a strategy share the state of an optimizer.

    A mixin, before a Keras optimizer whose update of an element looks at nothing but that element.

    Rajbhandari et al.: "ZeRO" (2020), stage 1: with N replicas each keeps an N-th of the state of every
    weight, updates an N-th of the weight, and gathers the rest from the others. Besides, it holds a copy
    of the part that it updates. The weights are those that an optimizer that is not sharded gives.

    Args:
        shard_state: Whether replicas share the state; what is saved is whole, so that a training may be
            resumed with another number of replicas, and with or without this. The averages of the weights
            (`use_ema`) are not shared.
        **kwargs: Of the optimizer.

    Raises:
        ValueError: If the backend is not TensorFlow.
    """

    def __init__(self, *, shard_state: bool = False, **kwargs):
        if shard_state and keras.backend.backend() != "tensorflow":
            raise ValueError(
                '`shard_state` is for TensorFlow; on JAX use `make_distribution(shard="optimizer")`. '
                f"Received: shard_state={shard_state}"
            )
        super().__init__(**kwargs)
        self.shard_state = shard_state

    @property
    def _shards(self) -> int:
        return self._distribution_strategy.num_replicas_in_sync if self.shard_state else 1

    def build(self, variables):
        """Makes the variables of the optimizer; Keras calls it."""
        if self.built:
            return
        super().build(variables)
        if self._shards == 1:
            return
        # Keras's update of a weight is given the part of it that is this replica's. Its name says whether
        # it is decayed.
        self._parts = [_make_part(variable, self._shards, variable.name) for variable in variables]
        for number, part in enumerate(self._parts):
            self._trainable_variables_indices[self._var_key(part)] = number

    def add_variable_from_reference(self, reference_variable, name=None, initializer="zeros"):
        """Makes what is kept of a weight; Keras calls it."""
        if self._shards == 1 or name == "average":
            return super().add_variable_from_reference(reference_variable, name, initializer)
        path = f"{reference_variable.path.replace('/', '_')}_{name}"
        with keras.name_scope(self.name, caller=self):
            variable = ShardedVariable(reference_variable, self._distribution_strategy, path)
        self._track_variable(variable)
        return variable

    def _backend_update_step(self, grads, trainable_variables, learning_rate):
        if self._shards == 1:
            super()._backend_update_step(grads, trainable_variables, learning_rate)
            return
        context = tf.distribute.get_replica_context()
        variables = [getattr(variable, "value", variable) for variable in trainable_variables]
        parts = [self._parts[self._get_variable_index(variable)] for variable in variables]
        summed = self._all_reduce_sum_gradients(list(zip(grads, variables, strict=True)))
        pairs = []
        for (gradient, variable), part in zip(summed, parts, strict=True):
            part.assign(_take_part(variable, context))
            pairs.append((_take_part(gradient, context), part))
        outside, strategy = tf.__internal__.distribute.interim.maybe_merge_call, self._distribution_strategy
        outside(self._distributed_tf_update_step, strategy, pairs, learning_rate)
        wholes = context.all_gather([part.read_value() for part in parts], axis=0)
        outside(_assign_all, strategy, variables, wholes)

    def get_config(self):
        return {**super().get_config(), "shard_state": self.shard_state}


class ShardedVariable(keras.Variable):
    """A variable of zeros at the beginning of which each replica keeps a part.

    In a replica `value` is that part, flat and filled up with zeros. Outside it has the shape of a weight
    and is read and assigned as a whole, which on several workers all of them have to do at once.

    Args:
        reference: The weight.
        strategy: Whose replicas share it.
        name: Its name.
    """

    def __init__(self, reference: keras.Variable, strategy: tf.distribute.Strategy, name: str):
        part = _make_part(reference, strategy.num_replicas_in_sync, name)
        super().__init__(part, dtype=reference.dtype, trainable=False, name=name)
        self._strategy = strategy
        self._shape = tuple(reference.shape)

    def numpy(self) -> np.ndarray:
        """Gathers all of it."""
        parts = self._strategy.run(self.value.read_value)
        flat = self._strategy.gather(parts, axis=0)
        return flat.numpy()[: math.prod(self._shape)].reshape(self._shape)

    def assign(self, value):
        """Takes all of it."""
        value = tf.ensure_shape(tf.cast(value, self.dtype), self._shape)

        @tf.autograph.experimental.do_not_convert
        def assign():
            self.value.assign(_take_part(value, tf.distribute.get_replica_context()))

        self._strategy.run(assign)
        return value


def is_sharded(optimizer: keras.optimizers.Optimizer) -> bool:
    """Returns whether replicas share the state of an optimizer."""
    return any(isinstance(variable, ShardedVariable) for variable in optimizer.variables)


def _part_size(shape, shards: int) -> int:
    return -(-math.prod(shape) // shards)


def _make_part(variable: keras.Variable, shards: int, name: str) -> tf.Variable:
    return tf.Variable(
        lambda: tf.zeros([_part_size(variable.shape, shards)], variable.dtype),
        name=name,
        trainable=False,
        synchronization=tf.VariableSynchronization.ON_READ,
        aggregation=tf.VariableAggregation.SUM,
    )


def _take_part(value, context: tf.distribute.ReplicaContext):
    """The part of this replica: flat, and filled up with zeros."""
    shards = context.num_replicas_in_sync
    size = _part_size(value.shape, shards)
    flat = tf.reshape(value, [-1])
    flat = tf.pad(flat, [[0, size * shards - flat.shape[0]]])
    return tf.slice(flat, [tf.cast(context.replica_id_in_sync_group, tf.int32) * size], [size])


def _assign_all(strategy, variables, wholes):
    def assign(variable, flat):
        variable.assign(tf.reshape(flat[: math.prod(variable.shape)], variable.shape))

    for variable, flat in zip(variables, wholes, strict=True):
        strategy.extended.update(variable, assign, args=(flat,), group=False)
