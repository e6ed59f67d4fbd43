"""All tokens of a vocabulary that a text holds, at every place, in TensorFlow core ops."""

from collections.abc import Iterable

import numpy as np
import tensorflow as tf

from kerasllm.tokenizers.ragged import empty_like, row_ids

_CODE_POINT_COUNT = 0x110000
_NO_NODE = -1


class Trie:
    """A prefix tree of tokens, walked from every place of many texts at once.

    Args:
        tokens: Tokens, none empty, and their ids.
    """

    root = 0

    def __init__(self, tokens: Iterable[tuple[str, int]]):
        children = {-1: _NO_NODE}  # An entry so that there is always one to look at.
        ids = [_NO_NODE]
        for token, token_id in tokens:
            node = self.root
            for character in token:
                edge = node * _CODE_POINT_COUNT + ord(character)
                node = children.setdefault(edge, len(ids))
                if node == len(ids):
                    ids.append(_NO_NODE)
            ids[node] = token_id
        edges = np.fromiter(children, np.int64, len(children))
        nodes = np.fromiter(children.values(), np.int64, len(children))
        order = np.argsort(edges)
        self._ids = tf.constant(ids, tf.int32)
        self._edges, self._nodes = tf.constant(edges[order]), tf.constant(nodes[order])

    def node_of(self, prefix: str) -> int:
        """The node that a prefix leads to, where tokens can be looked for without the prefix."""
        node = tf.constant([self.root], tf.int64)
        for character in prefix:
            node = self._follow(node, tf.constant([ord(character)], tf.int64))
        return int(node[0])

    def _follow(self, nodes: tf.Tensor, codes: tf.Tensor) -> tf.Tensor:
        """`[n]` int64 nodes and code points -> `[n]` int64 next nodes or _NO_NODE."""
        edges = nodes * _CODE_POINT_COUNT + codes
        place = tf.minimum(tf.searchsorted(self._edges, edges), tf.size(self._edges) - 1)
        return tf.where(tf.gather(self._edges, place) == edges, tf.gather(self._nodes, place), _NO_NODE)

    def matches(self, codes: tf.RaggedTensor, nodes: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
        """Finds every token at every place.

        Args:
            codes: `[rows, None]` int32 code points.
            nodes: `[places]` int64, for each code point the node to begin with there.

        Returns:
            `[matches]` int64 places in `codes.values`; `[matches]` int64 lengths in characters, in
            ascending order; `[matches]` int32 ids.
        """
        ends = tf.gather(codes.row_splits, row_ids(codes) + 1)
        places = tf.range(tf.size(codes.values, out_type=tf.int64))

        def one_character_on(length, places, nodes, *matches):
            codes_there = tf.gather(codes.values, places + length)
            nodes = self._follow(nodes, tf.cast(codes_there, tf.int64))
            found = tf.where(nodes != _NO_NODE)[:, 0]
            nodes, places = tf.gather(nodes, found), tf.gather(places, found)
            length += 1

            ids = tf.gather(self._ids, nodes)
            matching = tf.where(ids != _NO_NODE)[:, 0]
            new_matches = (
                tf.gather(places, matching),
                tf.fill(tf.shape(matching), length),
                tf.gather(ids, matching),
            )
            matches = [tf.concat(pair, 0) for pair in zip(matches, new_matches, strict=True)]
            going_on = tf.where(places + length < tf.gather(ends, places))[:, 0]
            return length, tf.gather(places, going_on), tf.gather(nodes, going_on), *matches

        nothing = empty_like(places, tf.int64)
        _, _, _, starts, lengths, ids = tf.while_loop(
            lambda length, places, *_: tf.size(places) > 0,
            one_character_on,
            (tf.constant(0, tf.int64), places, nodes, nothing, nothing, empty_like(places, tf.int32)),
            shape_invariants=(tf.TensorShape([]), *[tf.TensorShape([None])] * 5),
        )
        return starts, lengths, ids
