"""Several texts at once with one model: continuous batching over llama.cpp's sequences, and a cache of prompts."""

from pyengine.sessions.prefix_file import PrefixFileError
from pyengine.sessions.prefixes import PrefixCache
from pyengine.sessions.request import PromptTooLongError, Request, SamplingParams
from pyengine.sessions.scheduler import Scheduler
from pyengine.sessions.session import Session, SessionState, Times, TokenLogprobs

__all__ = [
    "PrefixCache",
    "PrefixFileError",
    "PromptTooLongError",
    "Request",
    "SamplingParams",
    "Scheduler",
    "Session",
    "SessionState",
    "Times",
    "TokenLogprobs",
]
