"""Services around the trainer of a run: its folder, its terminal, heartbeats, the rendezvous of nodes, and the comparison on resume.

Start at ``run_folder.py`` and ``resume.py``.
"""
