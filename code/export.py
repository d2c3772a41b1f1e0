"""Keep of a checkpoint what sampling needs, the averaged weights and the configuration: a fraction of its size.

python code/export.py RUN model.pth.tar --half"""

import os

from libs.common.checkpoint import load_checkpoint, model_file, save_checkpoint
from libs.common.cli import Parser, check_output, run


def parse_args(argv=None):
    parser = Parser(__doc__)
    parser.add_argument("checkpoint", help="a checkpoint of train.py, or a run folder")
    parser.add_argument("output", help="file to write; sample.py and evaluate.py read it, train.py cannot resume from it")
    parser.add_argument("--half", action="store_true", help="store fp16: half the size again")
    parser.add_argument("--overwrite", action="store_true", help="replace an output that exists")
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    state = load_checkpoint(model_file(args.checkpoint))
    check_output(args.output, args.overwrite, "output")
    kept = {k: state[k] for k in ("epoch", "step", "config", "classes", "autoencoder", "state_dict_ema") if k in state}
    if args.half:
        kept["state_dict_ema"] = {k: v.half() if k.startswith("model.") else v
                                  for k, v in kept["state_dict_ema"].items()}
    save_checkpoint(kept, False, *os.path.split(os.path.abspath(args.output)))
    print(f"wrote {args.output}: {os.path.getsize(args.output) / 1e6:.1f} MB")


if __name__ == "__main__":
    run(main)
