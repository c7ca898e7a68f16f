"""Command line of the recipe: ``python -m smolmoe STEP --help``.

Modules are imported by the steps that use them: preparing text needs no PyTorch, training needs no tokenizer.
"""

from __future__ import annotations

import argparse
import dataclasses
import logging
import sys
from pathlib import Path

from .config import GenerateConfig, TrainConfig


def _corpus(args: argparse.Namespace) -> None:
    from .corpus import build_corpus

    build_corpus(args.base, args.packages, args.out)


def _prompts(args: argparse.Namespace) -> None:
    from .prompt_drawing import write_prompts

    write_prompts(args.base, args.corpus, args.out, args.rows)


def _generate(args: argparse.Namespace) -> None:
    from .generate import generate

    config = GenerateConfig(rows=args.rows, length=args.length, rounds=args.rounds)
    generate(args.base, args.prompts, args.out, config, args.check)


def _train(args: argparse.Namespace) -> None:
    from .train import train

    config = TrainConfig.smoke() if args.smoke else TrainConfig()
    if args.layerwise_seconds is not None:
        stage = dataclasses.replace(config.layerwise, seconds=args.layerwise_seconds)
        config = dataclasses.replace(config, layerwise=stage)
    if args.distil_seconds is not None:
        config = dataclasses.replace(config, distil=dataclasses.replace(config.distil, seconds=args.distil_seconds))
    train(args.base, args.generated, args.corpus, args.out, config)


def _export(args: argparse.Namespace) -> None:
    from .export import export

    export(args.base, args.weights, args.out)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m smolmoe", description="Make the bundled model again.")
    steps = parser.add_subparsers(title="steps, in their order", dest="step", required=True)

    step = steps.add_parser("corpus", help="Debian documentation to token streams")
    step.add_argument("base", type=Path, help="GGUF of the dense model")
    step.add_argument("packages", type=Path, help="folder with one folder per unpacked package")
    step.add_argument("out", type=Path, help="folder to write")
    step.set_defaults(run=_corpus)

    step = steps.add_parser("prompts", help="beginnings of the rows that the dense model writes")
    step.add_argument("base", type=Path, help="GGUF of the dense model")
    step.add_argument("corpus", type=Path, help="folder of the corpus")
    step.add_argument("out", type=Path, help="file to write, .npz")
    step.add_argument("--rows", type=int, default=36_864, help="default: %(default)s")
    step.set_defaults(run=_prompts)

    sampling = GenerateConfig()
    step = steps.add_parser("generate", help="the dense model writes (GPU)")
    step.add_argument("base", type=Path, help="GGUF of the dense model")
    step.add_argument("prompts", type=Path, help="what `prompts` wrote")
    step.add_argument("out", type=Path, help="file to write, .npy")
    step.add_argument("--rows", type=int, default=sampling.rows, help="rows in lockstep, default: %(default)s")
    step.add_argument("--length", type=int, default=sampling.length, help="tokens per row, default: %(default)s")
    step.add_argument("--rounds", type=int, default=sampling.rounds, help="default: %(default)s")
    step.add_argument("--check", action="store_true", help="compare the kernels with a plain forward pass first")
    step.set_defaults(run=_generate)

    step = steps.add_parser("train", help="upcycling and distillation (GPU)")
    step.add_argument("base", type=Path, help="GGUF of the dense model")
    step.add_argument("generated", type=Path, help="what `generate` wrote")
    step.add_argument("corpus", type=Path, help="folder of the corpus")
    step.add_argument("out", type=Path, help="folder to write")
    step.add_argument("--layerwise-seconds", type=float, help="duration of the layer-wise stage")
    step.add_argument("--distil-seconds", type=float, help="duration of the end-to-end stage")
    step.add_argument("--smoke", action="store_true", help="every stage at its smallest, for a CPU")
    step.set_defaults(run=_train)

    step = steps.add_parser("export", help="weights to GGUF")
    step.add_argument("base", type=Path, help="GGUF of the dense model")
    step.add_argument("weights", type=Path, help="what `train` wrote, .npz")
    step.add_argument("out", type=Path, help="file to write, .gguf")
    step.set_defaults(run=_export)
    return parser


def main() -> None:
    """Run one step."""
    args = _parser().parse_args()
    logging.basicConfig(
        level=logging.INFO, stream=sys.stdout, format="%(asctime)s %(message)s", datefmt="%H:%M:%S", force=True
    )
    try:
        args.run(args)
    except (OSError, ValueError, ArithmeticError) as error:
        sys.exit(f"{args.step}: {error}")


if __name__ == "__main__":
    main()
