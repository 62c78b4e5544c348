"""The list of all sinks."""

from __future__ import annotations

from hetero_ppo.observability.sinks.base import MetricsSink
from hetero_ppo.observability.sinks.console import ConsoleSink
from hetero_ppo.observability.sinks.jsonl import JsonlSink
from hetero_ppo.observability.sinks.tensorboard import TensorBoardSink
from hetero_ppo.observability.sinks.weights_and_biases import WandbSink

#: Sinks in the order of opening and writing. The console comes last, so a line on it means that its record is in the files.
SINKS: tuple[type[MetricsSink], ...] = (WandbSink, JsonlSink, TensorBoardSink, ConsoleSink)
