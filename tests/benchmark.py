"""What the model costs, by hand: python tests/benchmark.py COMMAND [options]; see --help

Needs torch and huggingface_hub alone, so that it runs on a bare machine with a GPU; load needs
soundfile, too, and score all of requirements.txt.
"""

import argparse
import sys
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks import loading, scoring, separation, stream, training
from benchmarks.options import OneLineParser
from benchmarks.report import show_machine, write_json


def main(arguments: list[str] | None = None) -> None:
    args = parse_arguments(arguments)
    try:
        machine = show_machine(getattr(args, "device", "cpu"))
        measured = args.run(args)
    except (BrokenProcessPool, torch.cuda.OutOfMemoryError) as error:
        sys.exit(f"benchmark.py: error: probably out of memory: {error}")
    if args.json:
        write_json(args.json, {"machine": machine, **measured})


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = OneLineParser(description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for command in (separation, stream, training, loading, scoring):
        command.add_options(commands)
    for parser_of_command in commands.choices.values():
        parser_of_command.add_argument(
            "--json", type=Path, metavar="FILE", help="where to write all of it"
        )
    args = parser.parse_args(arguments)
    if args.json and (args.json.is_dir() or not args.json.parent.is_dir()):
        parser.error(f"--json: cannot write {args.json}")
    if getattr(args, "device", None) == "cuda" and not torch.cuda.is_available():
        parser.error("--device: there is no GPU here")
    return args


if __name__ == "__main__":
    main()
