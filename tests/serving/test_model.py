"""Which version is served, and what is said of one that does not load."""

import shutil

import numpy as np
import pytest
import tensorflow as tf
from kerasllm_serving.errors import ServingError, StartupError
from kerasllm_serving.model import MANIFEST, ModelOptions, Servable, find_versions, session_config_of
from tensorflow.core.protobuf import config_pb2

from kerasllm.export import extra


@pytest.fixture
def version_folder(saved_model, tmp_path):
    """A copy of the model to damage."""
    return shutil.copytree(saved_model, tmp_path / "1")


def test_the_highest_number_is_the_latest_version(tmp_path):
    for name in ("2", "10", "9.tmp", "latest", "-11", "١٢"):
        (tmp_path / name).mkdir()
    (tmp_path / "11").write_text("a file")
    assert list(find_versions(tmp_path)) == [2, 10]


def test_missing_base_path(tmp_path):
    with pytest.raises(StartupError, match="must be an existing folder. Received: .*nowhere"):
        find_versions(tmp_path / "nowhere")


def test_base_path_without_versions(tmp_path):
    with pytest.raises(StartupError, match="which holds: nothing"):
        find_versions(tmp_path)
    (tmp_path / "1.tmp").mkdir()
    with pytest.raises(StartupError, match="must hold a numeric version .* holds: 1.tmp"):
        find_versions(tmp_path)


def test_a_version_folder_as_base_path_says_what_to_pass(saved_model, tmp_path):
    with pytest.raises(StartupError, match=f"--model_base_path={saved_model.parent}$"):
        find_versions(saved_model)
    unversioned = tmp_path / "exported"
    unversioned.mkdir()
    shutil.copy(saved_model / "saved_model.pb", unversioned)
    with pytest.raises(StartupError, match="move its contents to .*exported/1"):
        find_versions(unversioned)


def test_missing_graph(version_folder):
    (version_folder / "saved_model.pb").unlink()
    with pytest.raises(StartupError, match="must hold saved_model.pb. .*interrupted"):
        Servable(version_folder)


@pytest.mark.parametrize("kept", [0.3, 0.7, 0.99])
def test_truncated_graph(version_folder, kept):
    file = version_folder / "saved_model.pb"
    whole = file.read_bytes()
    file.write_bytes(whole[: int(len(whole) * kept)])
    with pytest.raises(StartupError, match="must be a complete SavedModel.* cannot be parsed"):
        Servable(version_folder)


def test_empty_graph(version_folder):
    (version_folder / "saved_model.pb").write_bytes(b"")
    with pytest.raises(StartupError, match="must hold a graph tagged 'serve'"):
        Servable(version_folder)


@pytest.mark.parametrize("damage", ["truncate", "flip", "delete"])
@pytest.mark.parametrize("pattern", ["variables.data-*", "variables.index"])
def test_damaged_variables(version_folder, pattern, damage):
    (file,) = (version_folder / "variables").glob(pattern)
    content = file.read_bytes()
    if damage == "delete":
        file.unlink()
    elif damage == "truncate":
        file.write_bytes(content[: len(content) // 2])
    else:
        file.write_bytes(bytes([content[0] ^ 255]) + content[1:])
    with pytest.raises(StartupError, match="complete SavedModel that loads. Received: ") as caught:
        Servable(version_folder)
    assert "Traceback" not in str(caught.value) and 'File "' not in str(caught.value)


def test_deleted_variables_folder(version_folder):
    shutil.rmtree(version_folder / "variables")
    with pytest.raises(StartupError, match="complete SavedModel that loads. Received: "):
        Servable(version_folder)


def test_a_graph_of_tensorflow_1(tmp_path):
    v1 = tf.compat.v1
    with tf.Graph().as_default(), v1.Session() as session:
        x = v1.placeholder(tf.float32, [None], name="x")
        scale = v1.get_variable("scale", initializer=3.0)
        check = v1.assert_positive(x, message="x must be positive")
        with tf.control_dependencies([check]):
            y = x * scale
        session.run(v1.global_variables_initializer())
        v1.saved_model.simple_save(session, str(tmp_path / "1"), {"x": x}, {"y": y, "same": x})
    servable = Servable(tmp_path / "1")
    outputs = servable.signatures["serving_default"].outputs
    y, same = servable.run({"x:0": np.float32([1, 2])}, [outputs["y"].name, outputs["same"].name])
    assert y.tolist() == [3, 6] and same.tolist() == [1, 2]
    with pytest.raises(ServingError, match=r"^assertion failed: \[x must be positive[^{]*$"):
        servable.run({"x:0": np.float32([-1])}, [outputs["y"].name])
    servable.close()


@pytest.fixture
def like_an_export(version_folder):
    """The same folder as if kerasllm had written it."""
    (version_folder / MANIFEST).parent.mkdir()
    (version_folder / MANIFEST).write_text("{}")
    return version_folder


def test_exports_of_kerasllm_go_without_grappler(saved_model, like_an_export):
    def is_off(path, config=None):
        found = session_config_of(path, ModelOptions(session_config=config))
        assert config is None or found.intra_op_parallelism_threads == config.intra_op_parallelism_threads
        return found.graph_options.rewrite_options.disable_meta_optimizer

    assert MANIFEST.name == extra.MANIFEST
    assert is_off(like_an_export) and not is_off(saved_model)
    given = config_pb2.ConfigProto(intra_op_parallelism_threads=3)
    assert is_off(like_an_export, given) and not given.HasField("graph_options")
    # Who says something about it gets that.
    given.graph_options.rewrite_options.min_graph_nodes = 5
    assert not is_off(like_an_export, given)


def test_errors_of_a_graph_read_the_same_without_grappler(saved_model, like_an_export):
    texts = set()
    for path in (saved_model, like_an_export):
        servable = Servable(path)
        with pytest.raises(ServingError) as caught:
            servable.call("checked", {"prompt": np.array([b"too long"], object)})
        texts.add(caught.value.message)
        # Only a graph whose functions are not inlined names them, so this tells whether Grappler was there.
        assert caught.value.__cause__.message.startswith("{{function_node") == (path == like_an_export)
        servable.close()
    (text,) = texts
    assert text.startswith("assertion failed: [a prompt must not exceed 5 bytes]") and "node" not in text
