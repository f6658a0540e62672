"""The codecs: what a row is on disk, by the name that stands as "dtype" in the manifest.

A codec is a subclass of `RowCodec` in a file of its own, registered below. Where NumPy is too slow
for it, logra_kernels/rows.py gets an entry with the ops that do the same to tensors.
"""

from logra_kernels.store.codecs.base import RowCodec, codec_names, register_codec, row_codec
from logra_kernels.store.codecs.float16 import Float16
from logra_kernels.store.codecs.float32 import Float32
from logra_kernels.store.codecs.int8 import Int8

__all__ = ["Float16", "Float32", "Int8", "RowCodec", "codec_names", "register_codec", "row_codec"]

register_codec(Float16())
register_codec(Float32())
register_codec(Int8())
