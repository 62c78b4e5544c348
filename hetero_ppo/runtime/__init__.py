"""What surrounds the trainer of a run: its folder, signals, heartbeats, the rendezvous of nodes, and how it resumes.

Start at ``run_folder.py``.
"""
