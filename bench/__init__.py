"""The ops and the paths of the package against what one would write or install instead.

python -m bench --help lists the parts.
"""
