import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import ops

from kerasllm import GPT2, CausalLM, GPT2Config
from kerasllm.layers.dropout import Dropout
from kerasllm.training import AdamW, next_token_loss
from kerasllm.training.dropout import dropout_by_row

CONFIG = {"vocabulary_size": 30, "context_length": 12, "num_layers": 1, "num_heads": 2, "dim": 16}


def make_model(seed=0, dtype=None, **changes):
    keras.utils.set_random_seed(seed)
    model = CausalLM(GPT2(GPT2Config(**{**CONFIG, "dropout": 0.0, **changes}), dtype=dtype))
    for weight in model.weights:
        weight.assign(weight + 0.3 * keras.random.normal(weight.shape))
    return model


def make_batches(rows=8, batch_size=4, seed=0):
    rng = np.random.default_rng(seed)
    ids = rng.integers(0, 5, (rows, 13)).astype("int32")  # few different ids: repeated rows of the table
    weights = (np.arange(12) < rng.integers(1, 13, (rows, 1))).astype("float32")
    return tf.data.Dataset.from_tensor_slices((ids[:, :-1], ids[:, 1:], weights)).batch(batch_size)


def values(model):
    return [ops.convert_to_numpy(weight) for weight in model.trainable_weights]


@pytest.mark.parametrize("tie_embeddings", [True, False])
def test_one_step_is_the_gradient_of_the_mean_over_tokens(tie_embeddings):
    model, reference = make_model(tie_embeddings=tie_embeddings), make_model(tie_embeddings=tie_embeddings)
    batches = make_batches(rows=4)
    variables = [weight.value for weight in reference.trainable_weights]
    ids, labels, weights = next(iter(batches))
    with tf.GradientTape() as tape:
        log_probabilities = tf.nn.log_softmax(reference(ids))
        losses = -tf.gather(log_probabilities, labels, batch_dims=2)
        loss = tf.reduce_sum(losses * weights) / tf.reduce_sum(weights)
    gradients = tape.gradient(loss, variables)
    wanted = [v - 0.1 * tf.convert_to_tensor(g) for v, g in zip(variables, gradients, strict=True)]

    model.compile(keras.optimizers.SGD(0.1))
    history = model.fit(batches, verbose=0)
    np.testing.assert_allclose(history.history["loss"][0], loss, rtol=1e-5)
    for got, want in zip(values(model), wanted, strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)


def test_repeated_rows_of_an_untied_table_are_merged_before_adam_squares_them():
    model, reference = make_model(tie_embeddings=False), make_model(tie_embeddings=False)
    batches = make_batches(rows=4)
    ids, labels, weights = next(iter(batches))
    variables = [weight.value for weight in reference.trainable_weights]
    with tf.GradientTape() as tape:
        total, count = next_token_loss(reference(ids), labels, weights)
        loss = total / count
    dense = [tf.convert_to_tensor(g).numpy() for g in tape.gradient(loss, variables)]
    model.compile(AdamW(1e-3, global_clipnorm=None))
    model.fit(batches, verbose=0)
    # After one step Adam's second moment is (1 - beta_2) times the squared gradient.
    moments = {v.path: ops.convert_to_numpy(v) for v in model.optimizer.variables}
    table = next(i for i, w in enumerate(model.trainable_weights) if "token_embedding" in w.path)
    moment = next(m for path, m in moments.items() if "token_embedding" in path and "velocity" in path)
    np.testing.assert_allclose(moment, 0.05 * dense[table] ** 2, rtol=1e-4, atol=1e-12)


def test_evaluation_counts_every_token_once():
    model = make_model()
    batches = make_batches(rows=10, batch_size=4)  # the last batch is short, and padding differs
    total, count = 0.0, 0.0
    for ids, labels, weights in batches:
        loss, number = next_token_loss(model(ids), labels, weights)
        total, count = total + float(loss), count + float(number)
    results = model.evaluate(batches, verbose=0)
    np.testing.assert_allclose(results["loss"], total / count, rtol=1e-5)
    np.testing.assert_allclose(results["perplexity"], np.exp(total / count), rtol=1e-5)
    assert model.evaluate(batches, verbose=0, return_dict=False) == pytest.approx(
        [results["loss"], results["perplexity"], results["token_accuracy"]]
    )


def test_weights_may_be_small():
    model = make_model()
    batches = make_batches(rows=4)
    small = batches.map(lambda ids, labels, weights: (ids, labels, 0.01 * weights))
    nothing = batches.map(lambda ids, labels, weights: (ids, labels, 0.0 * weights))
    results = model.evaluate(batches, verbose=0)
    assert model.evaluate(small, verbose=0)["loss"] == pytest.approx(results["loss"], rel=1e-5)
    assert model.evaluate(nothing, verbose=0)["loss"] == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda ids, labels, weights: (ids + 30, labels, weights), "An id must be in the vocabulary"),
        (lambda ids, labels, weights: (ids, labels - 9, weights), "A label must be in the vocabulary"),
        (lambda *batch: tuple(tf.tile(part, [1, 2]) for part in batch), "must fit into the context"),
    ],
)
def test_batches_that_xla_would_misread_are_refused(change, message):
    model = make_model()
    model.compile(jit_compile=True)
    with pytest.raises((ValueError, tf.errors.InvalidArgumentError), match=message):
        model.fit(make_batches().map(change), verbose=0)
    with pytest.raises(ValueError, match="Received: 2 elements"):
        model.fit(make_batches().map(lambda ids, labels, weights: (ids, labels)), verbose=0)


@pytest.mark.grappler
def test_compiled_equals_eager():
    finals = []
    for settings in ({"run_eagerly": True}, {"jit_compile": False}, {"jit_compile": True}):
        model = make_model()
        # Not Adam: it blows up the rounding of gradients that are zero, as those of key biases are.
        model.compile(keras.optimizers.SGD(0.1, momentum=0.9), metrics=["accuracy"], **settings)
        history = model.fit(make_batches(), epochs=2, verbose=0)
        assert set(history.history) == {"accuracy", "loss", "perplexity", "token_accuracy"}
        finals.append((history.history["loss"], values(model)))
    for losses, weights in finals[1:]:
        np.testing.assert_allclose(losses, finals[0][0], rtol=1e-5)
        for got, want in zip(weights, finals[0][1], strict=True):
            np.testing.assert_allclose(got, want, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("dtype", ["mixed_bfloat16", "mixed_float16"])
def test_mixed_precision_learns(dtype):
    model = make_model(dtype=dtype)
    model.compile(AdamW(1e-2))
    scaled = isinstance(model.optimizer, keras.optimizers.LossScaleOptimizer)
    assert scaled == (dtype == "mixed_float16")  # without it small gradients are lost
    losses = model.fit(make_batches(), epochs=6, verbose=0).history["loss"]
    assert losses[-1] < losses[0] - 0.5
    assert all(weight.dtype == "float32" for weight in model.trainable_weights)


def test_training_goes_on_from_a_keras_file(tmp_path):
    straight, stopped = make_model(), make_model()
    for model in (straight, stopped):
        model.compile(AdamW(1e-2, not_decayed=["scale"]))
        model.fit(make_batches(), epochs=2, verbose=0)
    stopped.save(tmp_path / "model.keras")
    resumed = CausalLM.load(tmp_path / "model.keras")
    assert resumed.optimizer.not_decayed == ("scale",)
    for model in (straight, resumed):
        model.fit(make_batches(seed=1), epochs=2, verbose=0)
    for got, want in zip(values(resumed), values(straight), strict=True):
        np.testing.assert_array_equal(got, want)


def test_what_does_not_work_is_refused():
    model = make_model()
    with pytest.raises(ValueError, match="brings its own loss"):
        model.compile(loss="mse")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"microbatches": 0}, "`microbatches` must be an integer from 1 on"),
        ({"seed": -1}, "`seed` must be an integer from 0"),
        ({"label_smoothing": 1.0}, "`label_smoothing` must be from 0 to below 1"),
        ({"z_loss": -1.0}, "`z_loss` must not be negative"),
        (
            {"optimizer": keras.optimizers.SGD(0.1, gradient_accumulation_steps=2)},
            "accumulated by `compile",
        ),
    ],
)
def test_arguments_that_do_not_fit_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        make_model().compile(**arguments)


@pytest.fixture(scope="module")
def without_microbatches():
    model = make_model(dropout=0.3)
    model.compile(keras.optimizers.SGD(0.5), run_eagerly=True)
    return model.fit(make_batches(), epochs=2, verbose=0).history, values(model)


@pytest.mark.parametrize(
    ("microbatches", "jit_compile"),
    [
        (2, True),
        (3, False),
        *(
            pytest.param(*each, marks=pytest.mark.slow)
            for each in ((1, False), (1, True), (2, False), (3, True))
        ),
    ],
)
def test_microbatches_change_nothing(microbatches, jit_compile, without_microbatches):
    """Nor do the dropout masks, which are of the row; 3 does not divide the rows."""
    model = make_model(dropout=0.3)
    model.compile(
        keras.optimizers.SGD(0.5),
        microbatches=microbatches,
        jit_compile=jit_compile,
        weighted_metrics=["accuracy"] if microbatches == 2 else None,
    )
    got = model.fit(make_batches(), epochs=2, verbose=0).history
    want, weights = without_microbatches
    for name in want:
        np.testing.assert_allclose(got[name], want[name], rtol=2e-5)
    if microbatches == 2:
        np.testing.assert_allclose(got["accuracy"], got["token_accuracy"], rtol=1e-5)
    for ours, theirs in zip(values(model), weights, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-3, atol=1e-5)


def test_dropout_masks_differ_between_rows_layers_steps_and_seeds():
    layers = [Dropout(0.5), Dropout(0.5)]

    def masks(seed=0, step=0, first_row=0, rows=4, width=6):
        with dropout_by_row(seed, step, first_row, rows):
            return [layer(tf.ones([rows, width]), training=True).numpy() for layer in layers]

    whole = masks()
    assert set(np.unique(whole)) == {0.0, 2.0}
    rows = {tuple(row) for mask in [*whole, *masks(seed=1), *masks(step=1)] for row in mask}
    assert len(rows) > 20  # of 24, of which few may be equal by chance
    for ours, theirs in zip(masks(first_row=1, rows=2), whole, strict=True):
        np.testing.assert_array_equal(ours, theirs[1:3])
    many = masks(rows=1000, width=50)[0]
    assert (
        abs(many.mean() - 1) < 0.01 and abs(np.corrcoef(many[:-1].ravel(), many[1:].ravel())[0, 1]) < 0.01
    )


def test_smoothing_and_z_loss_are_for_training_only():
    model, plain = make_model(), make_model()
    model.compile(AdamW(1e-2), label_smoothing=0.1, z_loss=0.01)
    plain.compile(AdamW(1e-2))
    assert model.evaluate(make_batches(), verbose=0) == plain.evaluate(make_batches(), verbose=0)
    ours, theirs = (each.fit(make_batches(), verbose=0).history for each in (model, plain))
    assert ours["loss"][0] > theirs["loss"][0] + 0.05
    assert ours["perplexity"][0] == pytest.approx(theirs["perplexity"][0], rel=0.02)


def test_options_survive_a_keras_file(tmp_path):
    model = make_model(dropout=0.2)
    model.compile(AdamW(1e-2), microbatches=2, seed=5, label_smoothing=0.1, jit_compile=False)
    model.save(tmp_path / "model.keras")
    loaded = CausalLM.load(tmp_path / "model.keras")
    assert loaded.get_compile_config()["microbatches"] == 2
    ours, theirs = (each.fit(make_batches(), verbose=0).history for each in (loaded, model))
    assert ours == {name: pytest.approx(value, rel=1e-5) for name, value in theirs.items()}
