"""The parts of a training step as values: its roles, their phases and their placement. All other packages read these.

Start at ``phases.py``, which lists the phases of a step in order, with what each needs on the device.
"""
