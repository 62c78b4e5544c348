"""Model families: one file each with its names, shapes and options.

Start at ``decoder.py``, which has what all families share. ``param_mapping.py`` defines the rules that names and shapes follow, and
``registry.py`` finds the family of a checkpoint.
"""
