"""The codecs: what a row is on disk, by the name that stands as "dtype" in the manifest.

A codec is a subclass of `RowCodec` in a file of its own, registered below. Where NumPy is too slow
for it, logra_kernels/rows.py gets an entry with the ops that do the same to tensors.
"""

from logra_kernels.store.codecs.base import (
    Encoded,
    RowCodec,
    codec_names,
    register_codec,
    row_codec,
)
from logra_kernels.store.codecs.float16 import Float16
from logra_kernels.store.codecs.float32 import Float32
from logra_kernels.store.codecs.int8 import Int8
from logra_kernels.store.codecs.planes import Planes, int2, int4, sign

__all__ = [
    "Encoded",
    "Float16",
    "Float32",
    "Int8",
    "Planes",
    "RowCodec",
    "codec_names",
    "register_codec",
    "row_codec",
]

register_codec(Float16())
register_codec(Float32())
register_codec(Int8())
register_codec(int4())
register_codec(int2())
register_codec(sign())
