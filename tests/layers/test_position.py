import keras
import numpy as np
import pytest
import tensorflow as tf
from reference.checks import (
    assert_close,
    check_config,
    check_gradients,
    check_layer,
    check_precision,
    check_rows_are_independent,
    to_numpy,
)
from reference.maths import relative_bias, rotate, sinusoids
from reference.weights import arrays, normal, randomize

from kerasllm.layers import (
    LearnedPositionEmbedding,
    RelativePositionBias,
    RotaryEmbedding,
    SinusoidalPositionEncoding,
)

# One row counts from 0, the other is somewhere else: a position is data, not a column.
POSITIONS = np.array([[0, 1, 2, 3, 4], [7, 3, 900, 12, 5]], "int32")


def rotated(x, positions, **arguments):
    return np.stack(
        [
            [
                [rotate(head, place, **arguments) for head in token]
                for token, place in zip(row, places, strict=True)
            ]
            for row, places in zip(x, positions, strict=True)
        ]
    )


class TestLearned:
    def build(self):
        layer = LearnedPositionEmbedding(1000, 6)
        layer.build()
        return randomize(layer)

    def test_looks_up_rows_of_the_table(self):
        layer = self.build()
        assert_close(layer(POSITIONS), arrays(layer)["embeddings"][POSITIONS], tolerance=0)
        assert_close(layer(POSITIONS[0]), arrays(layer)["embeddings"][POSITIONS[0]], tolerance=0)

    def test_generic(self):
        layer = self.build()
        assert layer.compute_output_shape((2, None)) == (2, None, 6)
        check_layer(layer, POSITIONS)

    def test_starts_at_the_given_scale(self):
        layer = LearnedPositionEmbedding(500, 20, initializer_range=0.3)
        layer.build()
        np.testing.assert_allclose(np.std(layer.embeddings), 0.3, rtol=0.05)

    @pytest.mark.parametrize("arguments, name", [((0, 6), "max_length=0"), ((4, 0), "dim=0")])
    def test_refuses_empty_tables(self, arguments, name):
        with pytest.raises(ValueError, match=f"must be at least 1. Received: {name}"):
            LearnedPositionEmbedding(*arguments)


class TestSinusoidal:
    @pytest.mark.parametrize("arguments", [{}, {"max_wavelength": 50.0}])
    def test_matches_the_paper(self, arguments):
        expected = np.array([[sinusoids(p, 8, **arguments) for p in row] for row in POSITIONS])
        layer = SinusoidalPositionEncoding(8, **arguments)
        # Float32 angles near 1000 radians are good to 1e-4 at best.
        assert_close(layer(POSITIONS), expected, tolerance=1e-4)
        assert_close(layer(POSITIONS[0]), expected[0])

    def test_generic(self):
        layer = SinusoidalPositionEncoding(8)
        assert layer.compute_output_shape((2, None)) == (2, None, 8)
        check_layer(layer, POSITIONS)

    @pytest.mark.parametrize("dim", [0, 5])
    def test_refuses_odd_widths(self, dim):
        with pytest.raises(ValueError, match=f"`dim` must be a positive even number. Received: dim={dim}"):
            SinusoidalPositionEncoding(dim)


LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
SCALINGS = {
    "linear": {"rope_type": "linear", "factor": 4.0},
    "llama3": {**LLAMA3, "original_max_position_embeddings": 64},
    "yarn": YARN,
    "yarn without rounding": {**YARN, "truncate": False, "beta_fast": 4.0, "beta_slow": 0.5},
    "yarn with a factor": {**YARN, "attention_factor": 1.5},
    "yarn with weights": {**YARN, "mscale": 0.7, "mscale_all_dim": 2.0},
    "yarn of one step": {**YARN, "original_max_position_embeddings": 6, "beta_fast": 1.0},
}


class TestRotary:
    @pytest.mark.parametrize("arguments", [{}, {"max_wavelength": 50.0}])
    def test_matches_complex_rotation(self, arguments):
        layer, x = RotaryEmbedding(6, **arguments), normal(2, 5, 3, 6)
        assert_close(layer(x, POSITIONS), rotated(x, POSITIONS, **arguments), tolerance=1e-4)

    @pytest.mark.parametrize("fraction", [1.0, 0.75])
    @pytest.mark.parametrize("scaling", SCALINGS.values(), ids=SCALINGS)
    def test_scaling_matches_complex_rotation(self, scaling, fraction):
        layer, x = RotaryEmbedding(16, 50.0, scaling, fraction), normal(2, 5, 3, 16)
        arguments = {"max_wavelength": 50.0, "fraction": fraction}
        right = rotated(x, POSITIONS, scaling=scaling, **arguments)
        assert np.abs(right - rotated(x, POSITIONS, **arguments)).max() > 0.1
        assert_close(layer(x, POSITIONS), right, tolerance=1e-4)

    @pytest.mark.parametrize(
        "scaling, message",
        [
            ({"rope_type": "longrope"}, "`rope_type` .*'linear', 'llama3', 'yarn'.*Received: 'longrope'"),
            ({"factor": 2.0}, "`rope_type` .* must be one of .* Received: None"),
            ({"rope_type": "linear"}, r"'linear' needs \['factor'\] and may have \[\]"),
            ({"rope_type": "linear", "factor": 2.0, "beta_fast": 1.0}, "Received: .*'beta_fast': 1.0"),
            ({"rope_type": "llama3", "factor": 2.0}, "needs .*'high_freq_factor', 'low_freq_factor'"),
            ({"rope_type": "yarn", "factor": 2.0}, "needs .*'original_max_position_embeddings'"),
            ({"rope_type": "linear", "factor": 0.0}, "`factor` must be a positive number. .*factor=0.0"),
            ({"rope_type": "linear", "factor": -2.0}, "`factor` must be a positive number. .*factor=-2.0"),
            ({"rope_type": "linear", "factor": float("nan")}, "`factor` must be a positive number"),
            ({**SCALINGS["yarn"], "attention_factor": float("nan")}, "must give finite angles"),
        ],
    )
    def test_refuses_other_scalings(self, scaling, message):
        with pytest.raises(ValueError, match=message):
            RotaryEmbedding(6, scaling=scaling)

    @pytest.mark.parametrize("wavelength", [0.0, -1.0, float("inf")])
    def test_refuses_wavelengths_that_are_not_positive(self, wavelength):
        message = f"`max_wavelength` must be a positive number. Received: max_wavelength={wavelength}"
        with pytest.raises(ValueError, match=message):
            RotaryEmbedding(6, wavelength)

    @pytest.mark.parametrize("fraction", [0.0, 1.5])
    def test_refuses_other_fractions(self, fraction):
        with pytest.raises(ValueError, match=rf"`fraction` must be in \(0, 1\].*fraction={fraction}"):
            RotaryEmbedding(6, fraction=fraction)

    def test_refuses_a_fraction_of_odd_width(self):
        with pytest.raises(ValueError, match=r"`head_dim \* fraction` must be .* even .*fraction=3"):
            RotaryEmbedding(6, fraction=0.5)

    def test_one_list_of_positions_serves_all_rows(self):
        layer, x = RotaryEmbedding(6), normal(2, 5, 3, 6)
        assert_close(layer(x, POSITIONS[0]), rotated(x, POSITIONS[[0, 0]]))

    def test_products_depend_on_the_distance_only(self):
        layer, query, key = RotaryEmbedding(6, 50.0), normal(1, 5, 1, 6), normal(1, 5, 1, 6, seed=2)

        def products(first):
            places = np.arange(5) + first
            turned = [to_numpy(layer(x, places))[0, :, 0] for x in (query, key)]
            return turned[0] @ turned[1].T

        np.testing.assert_allclose(products(0), products(40), atol=1e-4)
        shifted = to_numpy(layer(key, np.arange(5) + 1))
        assert np.abs(shifted - to_numpy(layer(key, np.arange(5)))).max() > 0.1

    def test_keeps_lengths_and_position_zero(self):
        layer, x = RotaryEmbedding(6), normal(2, 5, 3, 6)
        turned = to_numpy(layer(x, POSITIONS))
        np.testing.assert_array_equal(turned[0, 0], x[0, 0])
        np.testing.assert_allclose((turned**2).sum(-1), (x**2).sum(-1), rtol=1e-5)

    def test_generic(self):
        layer = RotaryEmbedding(6)
        assert layer.compute_output_shape((2, None, 3, 6), (2, None)) == (2, None, 3, 6)
        check_layer(layer, normal(2, 5, 3, 6), POSITIONS)
        check_layer(RotaryEmbedding(6, 50.0, SCALINGS["yarn"], 0.67), normal(2, 5, 3, 6), POSITIONS)

    @pytest.mark.parametrize("head_dim", [-2, 7])
    def test_refuses_odd_widths(self, head_dim):
        with pytest.raises(ValueError, match=f"`head_dim` must be a .* even .*head_dim={head_dim}"):
            RotaryEmbedding(head_dim)


class TestRelativeBias:
    # Each direction, and buckets that end at, before and behind powers of two.
    VARIANTS = pytest.mark.parametrize(
        "arguments",
        [
            {},
            {"bidirectional": False},
            {"num_buckets": 8, "max_distance": 20},
            {"num_buckets": 7, "max_distance": 5, "bidirectional": False},
        ],
        ids=["both", "causal", "few", "odd"],
    )

    def build(self, **arguments):
        layer = RelativePositionBias(3, **arguments)
        layer.build()
        return randomize(layer)

    def expected(self, layer, positions, length):
        table = arrays(layer)["embeddings"]
        return relative_bias(
            table, positions, length, layer.num_buckets, layer.max_distance, layer.bidirectional
        )

    @VARIANTS
    def test_matches_the_published_buckets(self, arguments):
        layer = self.build(**arguments)
        places = np.array([[0, 1, 2, 5, 299], [16, 150, 7, 32, 64]])
        assert_close(layer(places, key_length=300), self.expected(layer, places, 300), tolerance=1e-6)
        assert layer(places[0], key_length=300).shape == (1, 3, 5, 300)
        assert_close(
            layer(places[0], key_length=300), self.expected(layer, places[:1], 300), tolerance=1e-6
        )

    def test_generic(self):
        class Square(RelativePositionBias):
            """With as many keys as queries, for the checks pass tensors only, and the heads last."""

            def call(self, places):
                bias = super().call(places, keras.ops.shape(places)[1])
                return keras.ops.transpose(bias, (0, 2, 3, 1))

        layer = Square(3, num_buckets=8, max_distance=20)
        layer.build()
        randomize(layer)
        check_rows_are_independent(layer, POSITIONS)
        check_gradients(layer, POSITIONS)
        check_config(layer, POSITIONS)
        check_precision(layer, "mixed_bfloat16", 1e-2, POSITIONS)
        compiled = tf.function(layer, jit_compile=True, autograph=False)
        assert_close(compiled(tf.constant(POSITIONS)), to_numpy(layer(POSITIONS)))

    def test_starts_at_the_given_scale(self):
        layer = RelativePositionBias(50, initializer_range=0.3)
        layer.build()
        np.testing.assert_allclose(np.std(layer.embeddings), 0.3, rtol=0.05)

    @pytest.mark.parametrize(
        "arguments, message",
        [
            ({"num_heads": 0}, "`num_heads` must be at least 1. Received: num_heads=0"),
            ({"num_heads": 2, "num_buckets": 3}, "`num_buckets` must leave .* num_buckets=3"),
            ({"num_heads": 2, "max_distance": 8}, "`max_distance` must lie .* max_distance=8"),
        ],
    )
    def test_refuses_buckets_that_hold_nothing(self, arguments, message):
        with pytest.raises(ValueError, match=message):
            RelativePositionBias(**arguments)
