"""Save a run, find its newest checkpoint, load it, and keep as many checkpoints as the configuration says.

Start at ``manager.py``; ``manifest.py`` has the checksums of the files.
"""
