"""Layers whose results have the same bits for every batch, padding, micro-batch and tensor-parallel layout.

Every number of a forward is made by operations whose order of additions depends on the number's own place alone: its token, its
column, and the sizes of the model. What is summed over ranks elsewhere is gathered here and summed in one order. Backwards are
correct, but their bits may depend on the layout.
"""
