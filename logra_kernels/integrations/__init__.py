"""The other libraries that run on this package."""
