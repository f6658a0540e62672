"""LogIX: its names, its logs and its configuration files, over this package."""
