"""What is done to a saved graph after TensorFlow has written it."""

import os
import pathlib
from collections.abc import Collection, Mapping

from tensorflow.core.framework import function_pb2
from tensorflow.core.protobuf import meta_graph_pb2, saved_model_pb2

_COMPILED = "_XlaMustCompile"
_LOWERED = "_lower_using_switch_merge"


# Where signatures are that only the embedded server knows.
HIDDEN_SIGNATURES = "kerasllm_signatures"


def finish_graph(
    folder: str | os.PathLike, methods: Mapping[str, str], hidden: Collection[str] = ()
) -> None:
    """Names the methods of signatures, keeps loops for XLA, and makes the functions smaller.

    Args:
        folder: The SavedModel.
        methods: By the names of signatures, which call of TensorFlow Serving they answer; those that are
            left out answer Predict.
        hidden: Names of signatures that stock TensorFlow Serving shall not offer.
    """
    file = pathlib.Path(folder) / "saved_model.pb"
    saved_model = saved_model_pb2.SavedModel.FromString(file.read_bytes())
    for meta_graph in saved_model.meta_graphs:
        for name, method in methods.items():
            meta_graph.signature_def[name].method_name = method
        if hidden:
            hide_signatures(meta_graph, hidden)
        library = meta_graph.graph_def.library.function
        functions = {function.signature.name: function for function in library}
        keep_loops_for_xla(functions)
        for function in functions.values():
            make_smaller(function)
    file.write_bytes(saved_model.SerializeToString(deterministic=True))
    (file.parent / "fingerprint.pb").unlink(missing_ok=True)  # of the file as it was


def hide_signatures(meta_graph: meta_graph_pb2.MetaGraphDef, names: Collection[str]) -> None:
    """Moves signatures into a collection of the graph, where a session finds the same tensors.

    Args:
        meta_graph: The graph; changed.
        names: The signatures.
    """
    hidden = meta_graph_pb2.MetaGraphDef()
    for name in names:
        hidden.signature_def[name].CopyFrom(meta_graph.signature_def[name])
        del meta_graph.signature_def[name]
    content = hidden.SerializeToString(deterministic=True)
    meta_graph.collection_def[HIDDEN_SIGNATURES].bytes_list.value.append(content)
    nodes = meta_graph.object_graph_def.nodes
    (signatures,) = (child.node_id for child in nodes[0].children if child.local_name == "signatures")
    for child in [child for child in nodes[signatures].children if child.local_name in names]:
        nodes[signatures].children.remove(child)


def keep_loops_for_xla(functions: Mapping[str, function_pb2.FunctionDef]) -> None:
    """Leaves loops and branches as they are in all that XLA compiles.

    A session turns them into nodes that XLA does not know, in functions that a compiled one calls, too.

    Args:
        functions: The functions of a graph by their names; changed.
    """
    # To read a key of such a map that is not there would make it.
    waiting = [name for name, f in functions.items() if _COMPILED in f.attr and f.attr[_COMPILED].b]
    seen = set()
    while waiting:
        name = waiting.pop()
        if name in seen:
            continue
        seen.add(name)
        for node in functions[name].node_def:
            if _LOWERED in node.attr:
                node.attr[_LOWERED].b = False
            called = [value.func.name for value in node.attr.values() if value.HasField("func")]
            called += [part.name for value in node.attr.values() for part in value.list.func]
            waiting += [other for other in called if other in functions]


def make_smaller(function: function_pb2.FunctionDef) -> None:
    """Leaves out constants that are there twice, and what nothing that the function does depends on.

    A graph that Python has made is nearly twice as large as it has to be. Whoever runs it pays for that in
    time to load it and in memory, though not in the time of a call.

    Args:
        function: The function; changed.
    """
    same: dict[tuple[str, bytes], str] = {}
    names: dict[str, str] = {}
    for node in function.node_def:
        if node.op == "Const" and not node.input:
            content = node.attr["value"].SerializeToString(deterministic=True)
            names[node.name] = same.setdefault((node.device, content), node.name)
    nodes = {node.name: node for node in function.node_def}
    for node in nodes.values():
        inputs = [_renamed(name, names) for name in node.input]
        del node.input[:]
        node.input.extend(inputs)
    for key, name in function.ret.items():
        function.ret[key] = _renamed(name, names)
    for key, name in function.control_ret.items():
        function.control_ret[key] = _renamed(name, names)

    needed: set[str] = set()
    waiting = [*function.ret.values(), *function.control_ret.values()]
    while waiting:
        name = _node_of(waiting.pop())
        if name not in nodes or name in needed:
            continue
        needed.add(name)
        waiting += nodes[name].input
        if "_class" in nodes[name].attr:  # beside which nodes it has to be
            places = nodes[name].attr["_class"].list.s
            waiting += [place.decode().removeprefix("loc:@") for place in places]
    kept = [node.SerializeToString() for name, node in nodes.items() if name in needed]
    del function.node_def[:]
    for node in kept:
        function.node_def.add().ParseFromString(node)


def _node_of(name: str) -> str:
    """The node that an input is an output of: "^node", "node", "node:output:0"."""
    return name.removeprefix("^").partition(":")[0]


def _renamed(name: str, names: Mapping[str, str]) -> str:
    node = _node_of(name)
    return name.replace(node, names[node], 1) if node in names else name
