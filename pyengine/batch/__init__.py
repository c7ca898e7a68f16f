"""Batches of prompts from a file: OpenAI's batch lines in and out, resumable, many at once."""

from pyengine.batch.answers import AnswersError
from pyengine.batch.files import BatchFiles, open_batch
from pyengine.batch.run import answer_files, run_batch
from pyengine.batch.summary import BatchSummary

__all__ = ["AnswersError", "BatchFiles", "BatchSummary", "answer_files", "open_batch", "run_batch"]
