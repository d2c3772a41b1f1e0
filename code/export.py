"""Keep of a checkpoint what sampling needs, the averaged weights and the configuration: a fraction of its size.

python code/export.py RUN model.pth.tar --half
python code/export.py RUN model.pth.tar --set sample_cfg.steps=10      another default for drawing"""

import os

from libs.common.checkpoint import load_checkpoint, model_file, save_checkpoint
from libs.common.cli import Parser, check_output, run
from libs.common.errors import UsageError, shown
from libs.config import portable, set_values
from libs.models import model_from


def parse_args(argv=None):
    parser = Parser(__doc__)
    parser.add_argument("checkpoint", help="a checkpoint of train.py, or a run folder")
    parser.add_argument("output", help="file to write; sample.py and evaluate.py read it, train.py cannot resume from it")
    parser.add_argument("--half", action="store_true", help="store fp16: half the size again")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="change a setting of sample_cfg or eval")
    parser.add_argument("--overwrite", action="store_true", help="replace an output that exists")
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    check_output(args.output, args.overwrite, "output")
    path = model_file(args.checkpoint)
    state = load_checkpoint(path)
    wrong = next((item for item in args.set if not item.startswith(("sample_cfg.", "eval."))), None)
    if wrong:
        raise UsageError(f"--set: {shown(wrong)}: only sample_cfg and eval can be changed; the rest says what training was")
    state["config"] = set_values(state["config"], args.set)
    _, config = model_from(state, path)  # refuses what nobody could draw with
    kept = {k: state[k] for k in ("epoch", "step", "classes", "autoencoder") if k in state}
    kept["config"] = config = portable(config)
    own = "../data/afhq" if config["dataset"]["name"] == "AFHQ" else "../data"
    for section, key, default in ((config, "output_folder", "../logs"), (config["dataset"], "data_folder", own)):
        if os.path.isabs(section[key]):  # a folder outside the project, which other machines do not have
            section[key] = default
    if os.path.isabs(config["sample_cfg"]["guide"] or ""):
        print(f"note: the guide, {config['sample_cfg']['guide']}, is outside the project; the file needs it there")
    kept["state_dict_ema"] = {k: v.half() if args.half and k.startswith("model.") else v
                              for k, v in state["state_dict_ema"].items()}
    save_checkpoint(kept, False, *os.path.split(os.path.abspath(args.output)))
    print(f"wrote {args.output}: {os.path.getsize(args.output) / 1e6:.1f} MB")


if __name__ == "__main__":
    run(main)
