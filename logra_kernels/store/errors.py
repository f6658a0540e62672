"""What can go wrong with a store. A message names the file, what was wanted and what came."""


class StoreError(ValueError):
    """Anything that keeps a store from being written or read."""


class StoreExistsError(StoreError):
    """A store, or something else, already lies where a new store was to be made."""


class StoreFormatError(StoreError):
    """The folder is no store, a newer version's, or damaged."""


class StoreLockedError(StoreError):
    """Another writer has the store open."""


class StoreMismatchError(StoreError):
    """A run resumes a store that was made with other modules, projection, dtype or data."""


class DuplicateIdError(StoreError):
    """An id is in the batch twice, or in the store already."""


class StoreWriteError(StoreError):
    """The operating system refused a write: disk full, quota, input/output error."""
