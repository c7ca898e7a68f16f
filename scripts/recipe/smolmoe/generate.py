"""Step 3: the dense model writes the training text, thousands of rows in lockstep, each step one CUDA graph."""

from __future__ import annotations

import logging
import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from . import kernels
from .config import ChatTokens, GenerateConfig
from .decoder import INTERPRETED, LockstepDecoder, decoding_device, decoding_dtype
from .dense import DenseModel, load_dense
from .prompts import CHAT, FREE, USER, Prompts

_log = logging.getLogger(__name__)

_TOKEN_BLOCK = 4096
_SEED_STRIDE = 100_003
"""between rounds; every step of a round uses the next seed"""
_CHECKED_ROWS = 4
_CHECKED_POSITION = 200


class LockstepWriter:
    """Samples rows from forced beginnings.

    In a chat both sides are sampled: when a turn's <|im_end|> is drawn, the tokens that open the other role's turn are
    forced. Users speak at temperature 1, assistants and plain texts at their row's own.
    """

    def __init__(self, model: DenseModel, config: GenerateConfig) -> None:
        device = decoding_device()
        rows, length = config.rows, config.length
        self._config = config
        self._decoder = LockstepDecoder(model, rows, length)

        def ints(*size: int) -> Tensor:
            return torch.zeros(*size, device=device, dtype=torch.int64)

        self._position, self._seed = ints(1), ints(1)
        self._token, self._drawn = ints(rows), ints(rows)
        self._tokens = ints(rows, length)
        self._forced = ints(rows, length + 1)
        self._role = ints(rows)
        self._opening = ints(rows)
        """0: sampling; k: the k-th token of the turn's opening comes next"""
        self._banned = ints(rows, 2)
        self._is_chat = torch.zeros(rows, device=device, dtype=torch.bool)
        self._own_temperature = torch.zeros(rows, device=device)
        self._temperature = torch.zeros(rows, device=device)

        openings = (ChatTokens().open_user, ChatTokens().open_assistant)
        self._opening_lengths = torch.tensor([len(opening) for opening in openings], device=device)
        longest = int(self._opening_lengths.max())
        padded = [[*opening, *[0] * (longest - len(opening))] for opening in openings]
        self._opening_tokens = torch.tensor(padded, device=device)
        self._graph: torch.cuda.CUDAGraph | None = None

    def write(self, prompts: Prompts, row_numbers: NDArray[np.int64], seed: int, check: bool = False) -> Tensor:
        """Write one round.

        Args:
            prompts: the beginnings.
            row_numbers: which of them to use, shape [config.rows].
            seed: of the sampling; the same arguments give the same rows.
            check: compare the logits of one step with a plain forward pass.

        Returns:
            Tokens, int64 [rows, length]; overwritten by the next call.

        Raises:
            ArithmeticError: the check failed.
        """
        self._start(prompts, row_numbers, seed)
        if self._graph is None and not INTERPRETED:
            self._capture()
            self._start(prompts, row_numbers, seed)
        steps = self._config.length - 1
        steps_before_check = min(_CHECKED_POSITION, steps - 1) if check else 0
        self._run(steps_before_check)
        if check:
            self._check()
        self._run(steps - steps_before_check)
        return self._tokens

    def _start(self, prompts: Prompts, row_numbers: NDArray[np.int64], seed: int) -> None:
        def chosen(values: NDArray[Any]) -> Tensor:
            return torch.from_numpy(values[row_numbers])

        tokens = ChatTokens()
        prefix = chosen(prompts.prefix)[:, : self._config.length]
        self._forced.fill_(FREE)
        self._forced[:, : prefix.shape[1]] = prefix
        self._forced[:, -1] = tokens.end_of_text  # input of the step after the last, never used
        self._token.copy_(self._forced[:, 0])
        self._tokens[:, 0] = self._token
        self._is_chat.copy_(chosen(prompts.kind) == CHAT)
        self._role.copy_(chosen(prompts.role))
        self._own_temperature.copy_(chosen(prompts.temperature))
        self._set_temperature()
        self._banned[:, 0] = torch.where(self._is_chat, tokens.end_of_text, tokens.im_end)
        self._banned[:, 1] = tokens.im_start
        self._opening.zero_()
        self._position.zero_()
        self._seed.fill_(seed)

    def _set_temperature(self) -> None:
        one = torch.ones_like(self._own_temperature)
        self._temperature.copy_(torch.where((self._role == USER) & self._is_chat, one, self._own_temperature))

    def _run(self, steps: int) -> None:
        for _ in range(steps):
            if self._graph is None:
                self._step()
            else:
                self._graph.replay()

    def _step(self) -> None:
        """Draw the tokens of the next position. Only tensor operations on fixed buffers, so that it can be captured."""
        logits = self._decoder.logits(self._token, self._position)
        kernels.draw_token[(self._config.rows,)](
            logits,
            self._temperature,
            self._banned,
            self._seed,
            self._drawn,
            vocabulary=logits.shape[1],
            block=math.gcd(logits.shape[1], _TOKEN_BLOCK),
            log_min_p=math.log(self._config.min_p),
        )
        forced = self._forced.index_select(1, self._position + 1).squeeze(1)
        opening = self._opening
        is_opening = opening > 0
        opening_token = self._opening_tokens[self._role, (opening - 1).clamp_min(0)]
        token = torch.where(forced != FREE, forced, torch.where(is_opening, opening_token, self._drawn))

        turn_ends = (forced == FREE) & ~is_opening & self._is_chat & (self._drawn == ChatTokens().im_end)
        opened = opening >= self._opening_lengths[self._role]
        next_opening = torch.where(is_opening & ~opened, opening + 1, 0)
        self._opening.copy_(torch.where(turn_ends, 1, next_opening))
        self._role.copy_(torch.where(turn_ends, 1 - self._role, self._role))
        self._set_temperature()
        self._token.copy_(token)
        self._position.add_(1)
        self._seed.add_(1)
        self._tokens.index_copy_(1, self._position, token.unsqueeze(1))

    def _capture(self) -> None:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):  # compiles the kernels and lets the libraries allocate their workspaces
                self._step()
        torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.synchronize()
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self._step()

    def _check(self) -> None:
        position = int(self._position)
        expected = self._decoder.reference_logits(self._tokens[:_CHECKED_ROWS, : position + 1]).float()
        got = self._decoder.logits(self._token, self._position)[:_CHECKED_ROWS].float()
        error = float((got - expected).norm() / expected.norm())
        _log.info("decoder against plain forward pass at position %d: relative error %.2e", position, error)
        bound = 0.05 if decoding_dtype() == torch.bfloat16 else 1e-3
        if not error < bound:
            raise ArithmeticError(f"the decoder's logits are off by {error:.2e}, more than {bound}")


def distinct_trigrams(tokens: Tensor) -> Tensor:
    """Share of distinct trigrams in each row of `tokens`, int64 [rows, length]; a low one means a loop."""
    prime = 49_157  # above any token id
    trigrams = tokens[:, :-2] * prime**2 + tokens[:, 1:-1] * prime + tokens[:, 2:]
    ordered, _ = trigrams.sort(1)
    return 1.0 - (ordered[:, 1:] == ordered[:, :-1]).float().mean(1)


def generate(base: Path, prompts_path: Path, out: Path, config: GenerateConfig, check: bool = False) -> None:
    """Write rows until all rounds are done and save those that do not loop, uint16 [n, length], to `out`."""
    prompts = Prompts.load(prompts_path)
    kept: list[NDArray[np.uint16]] = []
    with torch.no_grad():
        writer = LockstepWriter(load_dense(base, decoding_device()), config)
        for number in range(config.rounds):
            start = time.monotonic()
            rows = np.arange(number * config.rows, (number + 1) * config.rows) % len(prompts.kind)
            tokens = writer.write(prompts, rows, 1 + number * _SEED_STRIDE, check and number == 0)
            distinct = distinct_trigrams(tokens)
            kept.append(tokens[distinct > config.min_distinct].cpu().numpy().astype(np.uint16))
            seconds = time.monotonic() - start
            _log.info(
                "round %d: kept %d of %d rows, mean share of distinct trigrams %.3f, %.0f k tokens/s",
                number + 1, len(kept[-1]), config.rows, distinct.mean(), config.rows * config.length / seconds / 1e3,
            )  # fmt: skip
    rows_kept = np.concatenate(kept)
    np.save(out, rows_kept)
    _log.info("saved %d rows of %d tokens to %s", *rows_kept.shape, out)
