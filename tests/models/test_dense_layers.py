"""Files of layers that read everything."""

from __future__ import annotations

import json

import pytest

import models
from models import LayerFileError
from models.dense_layers import DENSE_LAYERS, load_dense_layers


@pytest.fixture(scope="module")
def model():
    return models.load("random:tiny").model


def test_a_file_is_of_the_model_that_it_was_measured_on(model, tmp_path):
    path = tmp_path / "layers.json"
    DENSE_LAYERS.write(path, [1, 0], model, {"select": "scores:0.2"})
    assert load_dense_layers(path, model) == (1, 0)
    assert json.loads(path.read_text())["select"] == "scores:0.2"
    other = models.load("random:tiny", seed=1).model
    with pytest.raises(LayerFileError, match="measured on another model"):
        load_dense_layers(path, other)
    DENSE_LAYERS.write(path, [0, 99], model, {})
    with pytest.raises(LayerFileError, match="there is a layer 99, and this model has"):
        load_dense_layers(path, model)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "has no dense layers"),
        ("[]", "must be a list of dense layers from 0, got None"),
        ('{"dense_layers": [-1]}', r"must be a list of dense layers from 0, got \[-1\]"),
        ('{"dense_layers": [true]}', r"must be a list of dense layers from 0, got \[True\]"),
        ('{"dense_layers": [1]}', "embedding_signature must be a list of numbers"),
    ],
)
def test_what_is_no_such_file_is_refused(content, message, model, tmp_path):
    path = tmp_path / "layers.json"
    path.write_text(content)
    with pytest.raises(LayerFileError, match=message):
        load_dense_layers(path, model)
    with pytest.raises(LayerFileError, match="can be read from"):
        load_dense_layers(tmp_path / "nowhere.json", model)
