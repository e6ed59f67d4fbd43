import numpy as np
import pytest
from reference.checks import assert_close, check_layer, to_numpy
from reference.maths import rotate, sinusoids
from reference.weights import arrays, normal, randomize

from kerasllm.layers import LearnedPositionEmbedding, RotaryEmbedding, SinusoidalPositionEncoding

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


class TestRotary:
    @pytest.mark.parametrize("arguments", [{}, {"max_wavelength": 50.0}])
    def test_matches_complex_rotation(self, arguments):
        layer, x = RotaryEmbedding(6, **arguments), normal(2, 5, 3, 6)
        assert_close(layer(x, POSITIONS), rotated(x, POSITIONS, **arguments), tolerance=1e-4)

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

    @pytest.mark.parametrize("head_dim", [-2, 7])
    def test_refuses_odd_widths(self, head_dim):
        with pytest.raises(ValueError, match=f"`head_dim` must be a .* even .*head_dim={head_dim}"):
            RotaryEmbedding(head_dim)
