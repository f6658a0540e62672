"""The store: rows of projected gradients on disk, format versions 1 and 2 (FORMAT.md).

It imports numpy and file-format libraries only, so that a store can be read without torch.
"""

from logra_kernels.store.codecs import RowCodec, codec_names, register_codec, row_codec
from logra_kernels.store.errors import (
    DuplicateIdError,
    StoreError,
    StoreExistsError,
    StoreFormatError,
    StoreLockedError,
    StoreMismatchError,
    StoreWriteError,
)
from logra_kernels.store.layout import Module, RowLayout
from logra_kernels.store.maps import huge_buffer
from logra_kernels.store.planned import planned_bytes
from logra_kernels.store.read_ahead import BlockReader, RowBlock
from logra_kernels.store.reader import Shard, Store
from logra_kernels.store.self_influence import SelfInfluenceCache
from logra_kernels.store.verify import verify_store
from logra_kernels.store.writer import StoreWriter

__all__ = [
    "BlockReader",
    "DuplicateIdError",
    "Module",
    "RowBlock",
    "RowCodec",
    "RowLayout",
    "SelfInfluenceCache",
    "Shard",
    "Store",
    "StoreError",
    "StoreExistsError",
    "StoreFormatError",
    "StoreLockedError",
    "StoreMismatchError",
    "StoreWriteError",
    "StoreWriter",
    "codec_names",
    "huge_buffer",
    "planned_bytes",
    "register_codec",
    "row_codec",
    "verify_store",
]
