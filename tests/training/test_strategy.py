import json

import pytest
import tensorflow as tf

from kerasllm.training import make_strategy


def test_one_device_is_what_there_is(monkeypatch):
    monkeypatch.delenv("TF_CONFIG", raising=False)
    assert make_strategy() is make_strategy("one") is tf.distribute.get_strategy()


@pytest.mark.parametrize(
    "config",
    ["{", "[]", json.dumps({"cluster": {}}), json.dumps({"cluster": {"worker": ["a:1"]}, "task": {}})],
)
def test_a_broken_configuration_is_refused(monkeypatch, config):
    monkeypatch.setenv("TF_CONFIG", config)
    with pytest.raises(ValueError, match="`TF_CONFIG` must be JSON"):
        make_strategy()


def test_a_worker_that_is_not_in_the_cluster_is_refused(monkeypatch):
    config = {"cluster": {"worker": ["a:1", "b:1"]}, "task": {"type": "worker", "index": 2}}
    monkeypatch.setenv("TF_CONFIG", json.dumps(config))
    with pytest.raises(ValueError, match="is none of"):
        make_strategy()


@pytest.mark.parametrize(
    ("name", "message"),
    [("mirored", "must be one of"), ("mirrored", "needs a GPU"), ("multi_worker", "needs `TF_")],
)
def test_what_is_not_there_is_refused(monkeypatch, name, message):
    monkeypatch.delenv("TF_CONFIG", raising=False)
    with pytest.raises(ValueError, match=message):
        make_strategy(name)
