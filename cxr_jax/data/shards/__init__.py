"""Folders of records as tensorflow-datasets prepares them, read and written without TensorFlow.

`python -m cxr_jax.data.shards SOURCE OUT` writes one (`write`); `folder` and `records` read those of anybody.
"""
