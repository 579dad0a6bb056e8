"""tf.train.Example, the record of tensorflow-datasets: features by name, each a list of bytes, of floats or of ints.

Its five messages are those of tensorflow/core/example/example.proto and feature.proto, described here, so that neither
TensorFlow nor a compiler of such files is needed.
"""

from collections.abc import Mapping
from typing import Any

from google.protobuf import descriptor_pb2, descriptor_pool, message, message_factory

Value = bytes | float | int
_FIELD = descriptor_pb2.FieldDescriptorProto
_PACKAGE = "cxr_jax.example"  # of descriptions that are nobody else's: TensorFlow may be in this process as well


class BadExampleError(Exception):
    """Bytes that are no tf.train.Example."""


def decode(record: bytes) -> dict[str, list[Value]]:
    """Read an example: feature -> its values.

    Raises:
        BadExampleError: for bytes that are none.
    """
    # Unknown fields are passed over, as protocol buffers do.
    try:
        example = _Example.FromString(record)
    except message.DecodeError:
        raise BadExampleError("is no tf.train.Example") from None
    features = {}
    for name, feature in example.features.feature.items():
        # Of an empty list nothing says of what it would be.
        kind = feature.WhichOneof("kind")
        features[name] = list(getattr(feature, kind).value) if kind else []
    return features


def encode(features: Mapping[str, bytes | list[int]]) -> bytes:
    """Write an example; equal features give equal bytes.

    Args:
        features: bytes become a list of one, ints an int64 list.
    """
    example = _Example()
    for name, value in features.items():
        feature = example.features.feature[name]
        if isinstance(value, bytes):
            feature.bytes_list.value.append(value)
        else:
            feature.int64_list.value.extend(value)
    return example.SerializeToString(deterministic=True)


def _describe() -> Any:
    """The class of Example, from a description of its messages."""
    file = descriptor_pb2.FileDescriptorProto(
        name="cxr_jax/example.proto", package=_PACKAGE, syntax="proto3"
    )
    # ---- The three lists ----
    for name, kind in (
        ("BytesList", _FIELD.TYPE_BYTES),
        ("FloatList", _FIELD.TYPE_FLOAT),
        ("Int64List", _FIELD.TYPE_INT64),
    ):
        values = file.message_type.add(name=name)
        values.field.add(name="value", number=1, type=kind, label=_FIELD.LABEL_REPEATED)
    # ---- Feature: one of them ----
    feature = file.message_type.add(name="Feature")
    feature.oneof_decl.add(name="kind")
    for number, (name, kind) in enumerate(
        (("bytes_list", "BytesList"), ("float_list", "FloatList"), ("int64_list", "Int64List")), 1
    ):
        _add_message(feature, name, number, kind).oneof_index = 0
    # ---- Features: a map, which is a list of entries on the wire ----
    features = file.message_type.add(name="Features")
    entry = features.nested_type.add(name="FeatureEntry")
    entry.options.map_entry = True
    entry.field.add(name="key", number=1, type=_FIELD.TYPE_STRING, label=_FIELD.LABEL_OPTIONAL)
    _add_message(entry, "value", 2, "Feature")
    _add_message(features, "feature", 1, "Features.FeatureEntry").label = _FIELD.LABEL_REPEATED
    _add_message(file.message_type.add(name="Example"), "features", 1, "Features")
    # ---- Its class, in a pool of its own ----
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName(f"{_PACKAGE}.Example"))


def _add_message(owner: Any, name: str, number: int, kind: str) -> Any:
    return owner.field.add(
        name=name,
        number=number,
        type=_FIELD.TYPE_MESSAGE,
        type_name=f".{_PACKAGE}.{kind}",
        label=_FIELD.LABEL_OPTIONAL,
    )


_Example = _describe()
