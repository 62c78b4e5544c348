"""Read JSONL and parquet rows, render and tokenise conversations, and sample batches in an order that a checkpoint can resume.

Start at ``dataset.py``, then read ``conversation.py`` to see how a conversation becomes token ids and a mask.
"""
