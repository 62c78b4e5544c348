"""Read JSONL and parquet rows, render and tokenise conversations, and sample batches that a checkpoint can resume.

Start at ``dataset.py``, then ``conversation.py`` for how a conversation becomes token ids and a mask.
"""
