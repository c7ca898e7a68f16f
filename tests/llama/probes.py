"""Calls on a Llama of either kind whose answers can be compared: plain data out, no pyengine imported.

A stock process of its own runs them on llama_cpp.Llama, the tests on pyengine.Llama.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterable
from typing import Any

import llama_cpp
import numpy as np
from llama_cpp.llama_grammar import LlamaGrammar
from llama_cpp.llama_speculative import LlamaPromptLookupDecoding

Answer = Any  # what JSON can hold

#: Kernels spin at barriers, so two threads on a busy machine of two cores take seconds. Results do not depend on it.
THREADS: dict[str, Any] = {"n_threads": 1, "n_threads_batch": 1}
N_CTX = 512

_SERIAL = ("id", "created")  # differ from call to call
_LOGIT_STEP = 97  # every so many-th logit is compared


def options_for(options: dict[str, Any]) -> dict[str, Any]:
    """Keyword arguments of either class from plain data: `draft` is a number of tokens to guess."""
    given = {"n_ctx": N_CTX, "verbose": False, **THREADS, **options}
    draft = given.pop("draft", None)
    return given | ({"draft_model": LlamaPromptLookupDecoding(num_pred_tokens=draft)} if draft else {})


def as_json(answer: Answer) -> str:
    """One line of JSON; llama_cpp leaves numpy's numbers in its answers."""
    return json.dumps(answer, default=float)


def _plain(response: Any) -> dict[str, Any]:
    return {name: value for name, value in response.items() if name not in _SERIAL}


def completion(llm: llama_cpp.Llama, **arguments: Any) -> Answer:
    """create_completion without what differs from call to call."""
    llm.reset()
    return _plain(llm.create_completion(**arguments))


def completion_stream(llm: llama_cpp.Llama, **arguments: Any) -> Answer:
    """All chunks of a streamed create_completion."""
    llm.reset()
    return [_plain(chunk) for chunk in llm.create_completion(stream=True, **arguments)]


def chat(llm: llama_cpp.Llama, **arguments: Any) -> Answer:
    """create_chat_completion without what differs from call to call (tool calls get random ids, too)."""
    llm.reset()
    answer = _plain(llm.create_chat_completion(**arguments))
    for choice in answer["choices"]:
        for call in choice["message"].get("tool_calls", ()):
            call["id"] = call["id"].rpartition("-cmpl-")[0]
    return answer


def chat_stream(llm: llama_cpp.Llama, **arguments: Any) -> Answer:
    """All chunks of a streamed create_chat_completion."""
    llm.reset()
    return [_plain(chunk) for chunk in llm.create_chat_completion(stream=True, **arguments)]


def constrained(llm: llama_cpp.Llama, rules: str, **arguments: Any) -> Answer:
    """A completion under a grammar."""
    grammar = LlamaGrammar.from_string(rules, verbose=False)
    return completion(llm, grammar=grammar, **arguments)


def greedy(llm: llama_cpp.Llama, prompt: str, n: int) -> Answer:
    """The n likeliest tokens after a prompt, through generate()."""
    llm.reset()
    tokens = llm.tokenize(prompt.encode())
    return [int(token) for token in itertools.islice(llm.generate(tokens, temp=0.0), n)]


def by_hand(llm: llama_cpp.Llama, prompt: str, n: int) -> Answer:
    """The same through eval() and sample()."""
    llm.reset()
    llm.eval(llm.tokenize(prompt.encode()))
    tokens = []
    for _ in range(n):
        tokens.append(int(llm.sample(temp=0.0)))
        llm.eval(tokens[-1:])
    return {"tokens": tokens, "n_tokens": llm.n_tokens, "eval_tokens": list(llm.eval_tokens)}


def logits(llm: llama_cpp.Llama, prompt: str) -> Answer:
    """Some of the logits of every token of a prompt; the model must keep all (logits_all)."""
    llm.reset()
    llm.eval(llm.tokenize(prompt.encode()))
    rows = llm.scores[: llm.n_tokens]
    return {"likeliest": rows.argmax(axis=1).tolist(), "values": rows[:, ::_LOGIT_STEP].tolist()}


def embeddings(llm: llama_cpp.Llama, texts: list[str]) -> Answer:
    """create_embedding of several texts at once, and embed() of the first alone, normalised."""
    llm.reset()
    together = llm.create_embedding(texts)
    return {
        "vectors": [_flat(item["embedding"]) for item in together["data"]],
        "usage": together["usage"],
        "first": _flat(llm.embed(texts[0], normalize=True)),
    }


def _flat(vectors: Iterable[Any]) -> list[float]:
    return [float(value) for value in np.asarray(vectors).ravel()]


def state_round_trip(llm: llama_cpp.Llama, prompt: str, n: int) -> Answer:
    """Tokens after a prompt; then, from the state saved before them, once more."""
    llm.reset()
    llm.eval(llm.tokenize(prompt.encode()))
    state = llm.save_state()
    answers = []
    for _ in range(2):
        llm.load_state(state)
        tokens = [int(token) for token in itertools.islice(llm.generate(llm.eval_tokens, temp=0.0, reset=True), n)]
        answers.append(tokens)
    return {"answers": answers, "n_tokens": state.n_tokens}


def refusal(llm: llama_cpp.Llama, of: str, **arguments: Any) -> Answer:
    """The class and the words of the error that the probe `of` ends with; None if it ends with none."""
    try:
        PROBES[of](llm, **arguments)
    except Exception as error:
        return [type(error).__name__, str(error)]
    return None


def facts(llm: llama_cpp.Llama) -> Answer:
    """What the model says about itself."""
    return {
        "n_ctx": llm.n_ctx(),
        "n_embd": llm.n_embd(),
        "n_vocab": llm.n_vocab(),
        "special": [llm.token_bos(), llm.token_eos(), llm.token_nl()],
        "chat_format": llm.chat_format,
        "metadata": llm.metadata,
        "tokens": llm.tokenize("Straße, 42 \U0001f600 <|im_start|>".encode(), add_bos=True, special=True),
        "text": llm.detokenize(llm.tokenize("Straße, 42 \U0001f600".encode())).decode(),
    }


_ALL: tuple[Callable[..., Answer], ...] = (
    completion,
    completion_stream,
    chat,
    chat_stream,
    constrained,
    greedy,
    by_hand,
    logits,
    embeddings,
    state_round_trip,
    refusal,
    facts,
)
PROBES: dict[str, Callable[..., Answer]] = {probe.__name__: probe for probe in _ALL}
