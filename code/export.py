"""Keep of a checkpoint what sampling needs, the averaged weights and the configuration: half of model_final's size.

python ./export.py ../logs/RUN/model_final.pth.tar ../logs/RUN/model.pth.tar [--half]
"""

import os

from libs.common.cli import Parser, check_output, run
from libs.common.checkpoint import load_checkpoint, save_checkpoint


def main():
    parser = Parser(__doc__)
    parser.add_argument("checkpoint", help="a checkpoint of train.py")
    parser.add_argument("output", help="file to write; sample.py and evaluate.py read it, train.py cannot resume from it")
    parser.add_argument("--half", action="store_true", help="store fp16: half the size again")
    parser.add_argument("--overwrite", action="store_true", help="replace an output that exists")
    args = parser.parse_args()
    check_output(args.output, args.overwrite, "output")
    state = load_checkpoint(args.checkpoint)
    slim = {k: state[k] for k in ("epoch", "step", "config", "classes", "autoencoder", "state_dict_ema") if k in state}
    if args.half:
        slim["state_dict_ema"] = {k: v.half() if k.startswith("model.") else v
                                  for k, v in slim["state_dict_ema"].items()}
    save_checkpoint(slim, False, *os.path.split(os.path.abspath(args.output)))
    print(f"wrote {args.output}: {os.path.getsize(args.output) / 1e6:.1f} MB")


if __name__ == "__main__":
    run(main)
