"""The sinks that a run may have."""

from __future__ import annotations

from hetero_ppo.observability.sinks.base import MetricsSink
from hetero_ppo.observability.sinks.console import ConsoleSink
from hetero_ppo.observability.sinks.jsonl import JsonlSink
from hetero_ppo.observability.sinks.tensorboard import TensorBoardSink
from hetero_ppo.observability.sinks.weights_and_biases import WandbSink

#: In the order of opening and writing. The console comes last: a line on it is a record that is in the files.
SINKS: tuple[type[MetricsSink], ...] = (WandbSink, JsonlSink, TensorBoardSink, ConsoleSink)
