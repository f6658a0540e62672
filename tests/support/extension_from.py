"""A pytest plugin that loads `logra_kernels._C` from the folder LOGRA_EXTENSION_FROM.

`make sanitize` runs tests over an extension of its own build with it.
"""

import os

import logra_kernels

logra_kernels.__path__.insert(0, os.environ["LOGRA_EXTENSION_FROM"])
from logra_kernels import _native  # noqa: E402

assert _native.C is not None
assert str(_native.C.__file__).startswith(os.environ["LOGRA_EXTENSION_FROM"])
