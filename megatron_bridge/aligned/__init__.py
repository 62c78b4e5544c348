"""Layers whose results have the same bits for every batch, padding, micro-batch and tensor-parallel layout.

The order of additions behind a number depends only on the number's own place: its token, its column and the sizes of the model. Where
other layers sum over ranks, these gather the parts and sum them in one fixed order. The backwards are correct, but their bits may
depend on the layout. Start at ``layers.py``.
"""
