# mypy: ignore-errors
"""What other libraries' own layers compute: a program for an interpreter that has the library, and need not have torch.

python tests/interop/libraries.py LIBRARY < case.json > outcome.json

A case has x, (N, C, H, W), and a layer's values and settings as bridges.write gives them. The outcome: version; y, what
the layer makes of x in evaluation; and mean and variance, its statistics after a batch of training on x.
"""

import json
import os
import sys

import numpy as np


def keras(case):
    os.environ.setdefault("KERAS_BACKEND", "jax")
    import keras

    x = np.moveaxis(case["x"], 1, -1)
    layer = keras.layers.BatchNormalization(axis=-1, **case["settings"])
    layer.build(x.shape)
    layer.set_weights(list(case["values"].values()))
    y = np.asarray(layer(x, training=False))
    layer(x, training=True)
    return keras.__version__, np.moveaxis(y, -1, 1), *map(np.asarray, layer.get_weights()[2:])


def flax(case):
    import flax
    from flax import linen

    x = np.moveaxis(case["x"], 1, -1)
    y = linen.BatchNorm(use_running_average=True, **case["settings"]).apply(case["values"], x)
    layer = linen.BatchNorm(use_running_average=False, **case["settings"])
    _, after = layer.apply(case["values"], x, mutable=["batch_stats"])
    after = after["batch_stats"]
    return flax.__version__, np.moveaxis(np.asarray(y), -1, 1), after["mean"], after["var"]


def tf_slim(case):
    os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
    from importlib.metadata import version

    import tensorflow.compat.v1 as tf
    import tf_slim as slim

    tf.disable_v2_behavior()
    x = tf.constant(np.moveaxis(case["x"], 1, -1))
    initial = {name: tf.constant_initializer(value) for name, value in case["values"].items()}
    options = {"param_initializers": initial, "fused": False, "updates_collections": None, **case["settings"]}
    with tf.variable_scope("a"):
        y = slim.batch_norm(x, is_training=False, **options)
    with tf.variable_scope("b"):
        trained = slim.batch_norm(x, is_training=True, **options)
    after = {v.op.name.rsplit("/", 1)[-1]: v for v in tf.global_variables("b/")}
    with tf.Session() as session:
        session.run(tf.global_variables_initializer())
        y = session.run(y)
        session.run(trained)
        mean, variance = session.run([after["moving_mean"], after["moving_variance"]])
    return f"{version('tf-slim')} on tensorflow {tf.__version__}", np.moveaxis(y, -1, 1), mean, variance


def mxnet(case):
    import mxnet as mx

    gamma, beta, mean, variance = (mx.nd.array(each) for each in case["values"].values())
    x = mx.nd.array(case["x"])
    y = mx.nd.BatchNorm(x, gamma, beta, mean, variance, **case["settings"]).asnumpy()
    x.attach_grad()
    with mx.autograd.record():
        trained = mx.nd.BatchNorm(x, gamma, beta, mean, variance, **case["settings"])
    trained.backward()  # which is what moves the statistics
    mx.nd.waitall()
    return mx.__version__, y, mean.asnumpy(), variance.asnumpy()


def caffe(case):
    """As OpenCV reads it."""
    import cv2

    _, channels, height, width = case["x"].shape
    text = (
        'name: "net" input: "data" '
        f"input_dim: 1 input_dim: {channels} input_dim: {height} input_dim: {width} "
        'layer { name: "bn" type: "BatchNorm" bottom: "data" top: "bn" '
        f"batch_norm_param {{ use_global_stats: true eps: {case['settings']['eps']!r} }} }} "
        'layer { name: "scale" type: "Scale" bottom: "bn" top: "scale" scale_param { bias_term: true } }'
    )
    named = zip(("bn", "scale"), case["values"].values(), strict=True)
    binary = _message(1, b"net") + b"".join(_message(100, _layer(name, blobs)) for name, blobs in named)
    net = cv2.dnn.readNetFromCaffe(np.frombuffer(text.encode(), np.uint8), np.frombuffer(binary, np.uint8))
    found = []
    for image in case["x"]:
        net.setInput(image[None])
        found.append(net.forward()[0])
    return f"OpenCV {cv2.__version__}", np.stack(found), None, None


def _message(field, content):
    """A field of bytes in a protocol buffer."""
    return _number(field << 3 | 2) + _number(len(content)) + content


def _number(value):
    found = b""
    while value > 127:
        found, value = found + bytes([value & 127 | 128]), value >> 7
    return found + bytes([value])


def _layer(name, blobs):
    """A LayerParameter: name = 1, blobs = 7; a BlobProto: data = 5, shape = 7, whose dim = 1."""
    content = _message(1, name.encode())
    for blob in blobs:
        shape = _message(7, _message(1, _number(len(blob))))
        content += _message(7, _message(5, np.asarray(blob, "<f4").tobytes()) + shape)
    return content


def inplace_abn(case):
    import importlib.metadata

    import inplace_abn
    import torch

    x = torch.tensor(case["x"])
    layer = inplace_abn.InPlaceABN(x.shape[1], **case["settings"])
    layer.load_state_dict({name: torch.tensor(value) for name, value in case["values"].items()})
    with torch.no_grad():
        y = layer.eval()(x.clone())
        layer.train()(x.clone())
    return (
        importlib.metadata.version("inplace_abn"),
        y.numpy(),
        layer.running_mean.numpy(),
        layer.running_var.numpy(),
    )


LIBRARIES = {
    "keras": keras,
    "flax": flax,
    "tf-slim": tf_slim,
    "mxnet": mxnet,
    "caffe": caffe,
    "inplace_abn": inplace_abn,
}


def _arrays(value):
    if isinstance(value, dict):
        return {key: _arrays(each) for key, each in value.items()}
    if isinstance(value[0], list):
        return [np.asarray(each, np.float32) for each in value]  # blobs
    return np.asarray(value, np.float32)


def main(library):
    case = json.load(sys.stdin)
    case["values"], case["x"] = _arrays(case["values"]), np.asarray(case["x"], np.float32)
    version, y, mean, variance = LIBRARIES[library](case)
    lists = {"y": y, "mean": mean, "variance": variance}
    found = {name: None if value is None else np.asarray(value).tolist() for name, value in lists.items()}
    json.dump({"version": version} | found, sys.stdout)


if __name__ == "__main__":
    main(sys.argv[1])
