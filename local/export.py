"""A trained model as an ONNX file, for onnxruntime on any machine, without PyTorch.

`python -m local.export CHECKPOINT --out model.onnx` exports the model of whole songs, as it is
written in local/tasnet.py, edits included; `--stream` one push of a causal model, with its state as
inputs and outputs. Nothing is written unless onnxruntime gives what the model gives, in silence
too. Needs the packages onnx, onnxscript and onnxruntime.
"""

import sys
from pathlib import Path

if not __package__:  # run as a script: Python puts this folder on its path, not the one above
    sys.path[0] = str(Path(__file__).parents[1])

from local.tools.command_line import OneLineParser, cleaning_up_on_sigterm, clear_errors


def main(argv: list[str] | None = None) -> None:
    parser = OneLineParser(prog="python -m local.export", description=__doc__)
    add = parser.add_argument
    add(
        "checkpoint",
        metavar="CHECKPOINT",
        help="folder of a run, best_model.pth, .ckpt, save_pretrained folder or hub name",
    )
    add("-o", "--out", type=Path, required=True, metavar="FILE", help="to write, FILE.onnx")
    add("--stream", action="store_true", help="one push with its state, of a causal model")
    with clear_errors(parser.prog), cleaning_up_on_sigterm():
        args = parser.parse_args(argv)
        from local.share.onnx_file import export_onnx

        print(f"{args.out}: {export_onnx(args.checkpoint, args.out, args.stream)}")


if __name__ == "__main__":
    main()
