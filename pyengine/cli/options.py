"""Options that several commands share: which model and how it runs, and how tokens are sampled.

Names, short forms and sampling defaults are llama.cpp's.
"""

from __future__ import annotations

import functools
import secrets
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

import click

Function = TypeVar("Function", bound=Callable[..., Any])

DEFAULT_CONTEXT = 4096

# llama.cpp rounds a context up to a multiple of this; llama_cpp.Llama 0.3.36 does not follow with its own arrays, and a
# text longer than what was asked for then fails in them. So we ask for what there will be.
CONTEXT_STEP = 256

ENVIRONMENT_PREFIX = "PYENGINE_"  # PYENGINE_CTX_SIZE sets --ctx-size, and so on, for every command that has the option


class Option(click.Option):
    """An option that may be set by an environment variable and is listed under a heading of its own in the help."""

    def __init__(self, *args: Any, section: str = "Options", env: bool = False, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.section = section
        if env:
            long_name = max(self.opts, key=len).lstrip("-")
            self.envvar = ENVIRONMENT_PREFIX + long_name.upper().replace("-", "_")

    def get_help_extra(self, ctx: click.Context) -> Any:
        """What follows the help text in brackets: without the permitted range, which an error message names."""
        extra = super().get_help_extra(ctx)
        extra.pop("range", None)
        return extra


class Command(click.Command):
    """A command whose help groups its options under headings and names its environment variables."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        sections: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            if record is not None:
                sections.setdefault(getattr(parameter, "section", "Options"), []).append(record)
        for title, records in sections.items():
            with formatter.section(title):
                formatter.write_dl(records)
        variables = [str(parameter.envvar) for parameter in self.params if parameter.envvar]
        with formatter.section("Environment variables for options"):
            formatter.write_text(", ".join(variables))


@dataclass(frozen=True)
class ModelOptions:
    """Arguments of pyengine.Llama. None means: leave it to pyengine.Llama's own default."""

    model: Path | None
    ram_budget: str
    gpu: str
    vram_budget: str
    hybrid: bool
    bundle: str
    bundle_cap: str
    policy: str
    look_ahead: str
    yes: bool
    ctx_size: int
    threads: int | None
    threads_batch: int | None
    batch_size: int | None
    ubatch_size: int | None
    gpu_layers: int | None
    flash_attn: bool | None
    repeat_last_n: int
    verbose: bool

    def arguments(self) -> dict[str, Any]:
        """Keyword arguments for pyengine.Llama."""
        given = {
            "ram_budget": budget(self.ram_budget),
            "gpu": None if self.gpu == "auto" else self.gpu,
            "vram_budget": None if self.vram_budget == "auto" else budget(self.vram_budget),
            "hybrid": None if self.hybrid else False,
            "bundle": None if self.bundle in ("use", "auto") else self.bundle,
            "policy": None if self.policy == "auto" else self.policy,
            "look_ahead": None if self.look_ahead == "auto" else self.look_ahead,
            "n_ctx": -(-self.ctx_size // CONTEXT_STEP) * CONTEXT_STEP,
            "n_threads": self.threads,
            "n_threads_batch": self.threads_batch or self.threads,
            "n_batch": self.batch_size,
            "n_ubatch": self.ubatch_size,
            "n_gpu_layers": self.gpu_layers,
            "flash_attn": self.flash_attn,
            "last_n_tokens_size": self.repeat_last_n,
            "verbose": self.verbose,
        }
        return {name: value for name, value in given.items() if value is not None}


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen. `seed` is -1 for a new random one; resolve() settles it."""

    temp: float
    top_k: int
    top_p: float
    min_p: float
    typical: float
    repeat_penalty: float
    presence_penalty: float
    frequency_penalty: float
    mirostat: int
    mirostat_lr: float
    mirostat_ent: float
    seed: int

    def arguments(self) -> dict[str, Any]:
        """Keyword arguments of llama_cpp.Llama.generate, which calls the temperature `temp`."""
        return {
            "temp": self.temp,
            "top_k": self.top_k,
            "top_p": self.top_p,
            "min_p": self.min_p,
            "typical_p": self.typical,
            "repeat_penalty": self.repeat_penalty,
            "presence_penalty": self.presence_penalty,
            "frequency_penalty": self.frequency_penalty,
            "mirostat_mode": self.mirostat,
            "mirostat_eta": self.mirostat_lr,
            "mirostat_tau": self.mirostat_ent,
        }

    def chat_arguments(self) -> dict[str, Any]:
        """Keyword arguments of llama_cpp.Llama.create_chat_completion, which calls it `temperature`."""
        arguments = self.arguments()
        arguments["temperature"] = arguments.pop("temp")
        return arguments

    def resolved_seed(self) -> int:
        """The seed to use: the given one, else a fresh random one (llama_cpp.Llama's own default is a constant)."""
        return self.seed if self.seed >= 0 else secrets.randbits(31)


def budget(text: str) -> str | int:
    """The value pyengine.Llama takes for `ram_budget`: bytes as an int, other forms ("50%", "2GiB") as they stand."""
    text = text.strip()
    return int(text) if text.isascii() and text.isdigit() else text


_POSITIVE = click.IntRange(min=1)
_SHARE = click.FloatRange(0.0, 1.0)

_model_option = functools.partial(click.option, cls=Option, section="Model")
_sampling_option = functools.partial(click.option, cls=Option, section="Sampling")

_MODEL_OPTIONS = (
    _model_option(
        "-m",
        "--model",
        type=click.Path(path_type=Path),
        env=True,
        metavar="FILE",
        help="GGUF model file (the first one of a split model).  [default: the bundled model]",
    ),
    _model_option(
        "--ram-budget",
        default="auto",
        show_default=True,
        env=True,
        metavar="SIZE",
        help="Memory for experts: 50% of them, 2GiB, a number of bytes, or auto. With a GPU: of the RAM behind it.",
    ),
    _model_option(
        "--gpu",
        default="auto",
        show_default=True,
        env=True,
        metavar="auto|off|NAME,...",
        help="Where experts compute: auto takes every GPU that llama.cpp was built for, NAMEs some, e.g. CUDA0,CUDA1.",
    ),
    _model_option(
        "--vram-budget",
        default="auto",
        show_default=True,
        env=True,
        metavar="SIZE",
        help="Memory of all GPUs for experts, as --ram-budget; or a SIZE,SIZE,... for each.",
    ),
    _model_option(
        "--hybrid/--no-hybrid",
        default=True,
        show_default=True,
        help="With a GPU, let the CPU compute some missing experts where that is faster; without, every run of a text "
        "gives the same bits.",
    ),
    _model_option(
        "--bundle",
        default="use",
        show_default=True,
        env=True,
        metavar="use|auto|off|FILE",
        help="Read experts from the model's bundle if there is one; auto also makes one in the background.",
    ),
    _model_option(
        "--bundle-cap",
        default="25%",
        show_default=True,
        env=True,
        metavar="SIZE",
        help="Most disk for auto's bundle and those in the cache folder: 20GiB, bytes, or a share of what is free.",
    ),
    _model_option(
        "--policy",
        default="auto",
        show_default=True,
        env=True,
        metavar="NAME",
        help="Which experts stay in memory: auto, lru, lfu, ... (`pyengine replay` compares them).",
    ),
    _model_option(
        "--look-ahead",
        default="auto",
        show_default=True,
        env=True,
        metavar="auto|fate|off",
        help="How to tell which experts come next, so that they are fetched ahead.",
    ),
    _model_option("--yes", is_flag=True, help="Agree to the bundle that auto would make."),
    _model_option(
        "-c",
        "--ctx-size",
        type=click.IntRange(min=0),
        default=DEFAULT_CONTEXT,
        show_default=True,
        env=True,
        metavar="N",
        help=f"Context size in tokens, rounded up to a multiple of {CONTEXT_STEP}; 0 takes the model's own.",
    ),
    _model_option(
        "-t",
        "--threads",
        type=_POSITIVE,
        env=True,
        metavar="N",
        help="Threads for generation.  [default: all physical cores]",
    ),
    _model_option(
        "-tb",
        "--threads-batch",
        type=_POSITIVE,
        env=True,
        metavar="N",
        help="Threads for prompt processing.  [default: as --threads]",
    ),
    _model_option(
        "-b",
        "--batch-size",
        type=_POSITIVE,
        env=True,
        metavar="N",
        help="Most prompt tokens in one call.  [default: 512]",
    ),
    _model_option(
        "-ub",
        "--ubatch-size",
        type=_POSITIVE,
        env=True,
        metavar="N",
        help="Most prompt tokens computed at once.  [default: 512]",
    ),
    _model_option(
        "-ngl",
        "--gpu-layers",
        type=click.IntRange(min=-1),
        env=True,
        metavar="N",
        help="Layers to put on a GPU where llama.cpp has one; -1 for all, 0 is --gpu off.  [default: all]",
    ),
    _model_option(
        "-fa",
        "--flash-attn",
        is_flag=True,
        default=None,
        env=True,
        help="Use flash attention.",
    ),
    _model_option("-v", "--verbose", is_flag=True, help="Show llama.cpp's log on standard error."),
)

_SAMPLING_OPTIONS = (
    _sampling_option(
        "-s",
        "--seed",
        type=click.IntRange(-1, 2**32 - 2),
        default=-1,
        show_default="random",
        metavar="N",
        help="Seed of the random choice; -1 for a random one.",
    ),
    _sampling_option(
        "--temp",
        type=click.FloatRange(min=0.0),
        default=0.8,
        show_default=True,
        metavar="T",
        help="Temperature; 0 always takes the likeliest token.",
    ),
    _sampling_option("--top-k", type=int, default=40, show_default=True, metavar="N", help="Top-k; 0 switches it off."),
    _sampling_option("--top-p", type=_SHARE, default=0.95, show_default=True, metavar="P", help="Top-p; 1 is off."),
    _sampling_option("--min-p", type=_SHARE, default=0.05, show_default=True, metavar="P", help="Min-p; 0 is off."),
    _sampling_option("--typical", type=_SHARE, default=1.0, show_default=True, metavar="P", help="Typical; 1 is off."),
    _sampling_option(
        "--repeat-last-n",
        type=click.IntRange(min=-1),
        default=64,
        show_default=True,
        metavar="N",
        help="Tokens the penalties look back on; 0 is off, -1 the whole context.",
    ),
    _sampling_option(
        "--repeat-penalty",
        type=click.FloatRange(min=0.0, min_open=True),
        default=1.0,
        show_default=True,
        metavar="X",
        help="Penalty for repeated tokens; 1 is off.",
    ),
    _sampling_option(
        "--presence-penalty",
        type=float,
        default=0.0,
        show_default=True,
        metavar="X",
        help="Penalty for tokens already present; 0 is off.",
    ),
    _sampling_option(
        "--frequency-penalty",
        type=float,
        default=0.0,
        show_default=True,
        metavar="X",
        help="Penalty per earlier use of a token; 0 is off.",
    ),
    _sampling_option(
        "--mirostat",
        type=click.IntRange(0, 2),
        default=0,
        show_default=True,
        metavar="0|1|2",
        help="Mirostat version; with it top-k, top-p, min-p and typical are not used.",
    ),
    _sampling_option(
        "--mirostat-lr", type=float, default=0.1, show_default=True, metavar="X", help="Mirostat learning rate (eta)."
    ),
    _sampling_option(
        "--mirostat-ent", type=float, default=5.0, show_default=True, metavar="X", help="Mirostat target entropy (tau)."
    ),
)


def n_predict_option(meaning: str) -> Callable[[Function], Function]:
    """-n, the tokens of an answer; `meaning` is its help."""
    return click.option(
        "-n",
        "--n-predict",
        cls=Option,
        type=click.IntRange(min=-1),
        default=-1,
        show_default=True,
        env=True,
        metavar="N",
        help=meaning,
    )


def model_and_sampling_options(command: Function) -> Function:
    """Give a command the shared options; it receives them as `model_options` and `sampling`."""

    @functools.wraps(command)
    def collected(**values: Any) -> Any:
        model_options = ModelOptions(**{field.name: values.pop(field.name) for field in fields(ModelOptions)})
        sampling = Sampling(**{field.name: values.pop(field.name) for field in fields(Sampling)})
        return command(model_options=model_options, sampling=sampling, **values)

    decorated: Callable[..., Any] = collected
    for option in reversed(_MODEL_OPTIONS + _SAMPLING_OPTIONS):
        decorated = option(decorated)
    return decorated  # type: ignore[return-value]
