"""Routing traces: which experts each token used, recorded from a running engine, kept in a file, replayed by others."""

from pyengine.traces.archive import load_trace, save_trace
from pyengine.traces.trace import Prompts, Trace, TracedModel, TraceError

__all__ = ["Prompts", "Trace", "TraceError", "TracedModel", "load_trace", "save_trace"]
