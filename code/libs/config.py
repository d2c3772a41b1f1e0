"""Configuration: DEFAULTS below, a YAML file with only its differences on top, then `--set key.sub=value`."""

import copy
import difflib
import os
import re

import yaml

from .datasets import KNOWN
from .ddpm import PREDICTIONS, SCHEDULES
from .common.errors import UsageError
from .samplers import DEFAULT_STEPS, SPACINGS

# relative paths in a config are taken from this folder, code/, wherever a command is started
CODE = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
# what is computed once and kept: latents, features of real images
CACHE = os.path.normpath(os.path.join(CODE, "..", "data", ".cache"))

DEFAULTS = {
    # the first device is used; without a GPU training goes on on the CPU and says so
    "devices": ["cuda:0"],
    # "auto": bf16 where the GPU has it, else fp16 with a gradient scaler, fp32 on a CPU; or "bf16", "fp16", "fp32"
    "dtype": "auto",
    "seed": 0,
    # "DDPM", "DDIM" (the same model, sampled otherwise) or "EDM"
    "model_name": "DDPM",
    "output_folder": "../logs",
    "dataset": {
        "name": "MNIST",  # see datasets.KNOWN
        "split": "train",
        "data_folder": "../data",
        "img_size": None,  # side of the square images; None: the data's own, 128 for photographs
        "limit": None,  # train on so many images, spread over the set; None: all
        # with use_vae: encode so many random crops of each image, mirrored too, once, and learn from those: updates are
        # far faster, the augmentation is coarser. None or 0: encode anew in every update, each time another crop
        "latent_crops": 4,
    },
    "loader": {
        "batch_size": 64,
        "num_workers": 4,  # threads that decode files, where the data do not fit in memory
    },
    "model": {
        "img_shape": None,  # filled in from the data set
        "num_classes": None,  # filled in from the data set
        "timesteps": 1000,
        "dim": 64,  # channels at the finest level
        "context_dim": 64,  # width of the label embedding
        "dim_mults": [1, 2, 4],  # channels of each level, in units of dim
        "attn_levels": [0, 1],  # levels with a transformer; the middle always has one
        "use_vae": False,  # diffuse the latents of an autoencoder instead of pixels
        "vae_encoder_weights": None,
        "vae_decoder_weights": None,
        # not the handout's: see UNet and Diffusion for what these do
        "label_dropout": 0.0,
        "dropout": 0.0,
        "label_in_time": False,
        "zero_init": False,
        "patch_size": 1,
    },
    "train_cfg": {
        "lr": 2e-4,
        "epochs": 30,
        "num_eval_samples": 10,  # images per class in a sample grid
        "warmup": 0,  # updates over which the learning rate rises to lr
        "lr_schedule": "constant",  # or "cosine" or "linear": down to zero at the last update
        "optimizer": "adamw",  # or "muon": orthogonal updates for the convolutions, AdamW for the rest
        "betas": [0.9, 0.999],  # AdamW's
        "weight_decay": 0.01,
        "clip_grad_norm": 1.0,  # None: gradients as they are
        "accumulate": 1,  # parts in which a batch goes through the network, where it is too large for the memory
        # how the network is called in training; None: as CUDA graphs on a GPU, but with several processes or parts of a
        # batch, which graphs cannot have, through torch.compile, which takes minutes before the first update
        "cuda_graphs": None,
        "compile": None,
        "ema_decay": 0.999,  # approached as (1 + n) / (10 + n) over the first updates n
        "keep_last": None,  # how many checkpoints to keep; None: all
    },
    "eval": {  # numbers while training, onto the board; evaluate.py makes more of them
        "every": None,  # epochs between two; None: none
        "num": 1000,  # images; numbers of another `num` are not comparable
        "features": None,  # None: "classifier" for MNIST, else "inception"; or "autoencoder"
    },
    "sample_cfg": {  # for the grids; None is the sampler's default
        # DDPM and DDIM: "ddpm", "ddim" (their default); all: "heun" (EDM's), "euler", "euler_ancestral", "dpmpp_2m"
        "sampler": None,
        "steps": None,  # see samplers.DEFAULT_STEPS
        "guidance_scale": 1.0,  # above 1 needs model.label_dropout
        "guidance_interval": None,  # [sigma_lo, sigma_hi]: guide at these noise levels only; None: at all
        # keep predicted pixels in [-1, 1]; None: true for DDPM and DDIM in pixels, except with "ddpm"; false for EDM
        "clip": None,
        "eta": None,  # new noise in each step, 0 to 1: of "ddim", "dpmpp_2m" (default 0), "euler_ancestral" (1)
        "spacing": None,  # of "ddim": "uniform" (default) or "quadratic" timesteps
        "S_churn": None, "S_min": None, "S_max": None, "S_noise": None,  # of "heun": EDM's Algorithm 2 (default: none)
    },
}

# options of one kind of model alone; see the class for what they do
MODEL_OPTIONS = {
    "DDPM": {"beta_schedule": None, "scale_betas": False, "prediction": "eps", "min_snr_gamma": None},
    "EDM": {"sigma_data": None, "P_mean": -1.2, "P_std": 1.2, "sigma_min": 0.002, "sigma_max": 80.0, "rho": 7.0},
}
MODEL_OPTIONS["DDIM"] = MODEL_OPTIONS["DDPM"]

PATHS = (("output_folder",), ("dataset", "data_folder"), ("model", "vae_encoder_weights"),
         ("model", "vae_decoder_weights"))


# ---- what a value may be: each rule is (text for people, function value -> value that raises ValueError)

def integer(low, high=None):
    def check(v):
        if isinstance(v, bool) or not isinstance(v, int) or v < low or (high is not None and v > high):
            raise ValueError
        return v
    return f"an integer of {low} or more" if high is None else f"an integer from {low} to {high}", check


def number(low=None, high=None, above=None):
    def check(v):
        if isinstance(v, bool) or not isinstance(v, (int, float, str)):
            raise ValueError
        v = float(v)  # YAML reads 2e-4 as text
        if v != v or abs(v) == float("inf") or (low is not None and v < low) or (
                high is not None and v > high) or (above is not None and v <= above):
            raise ValueError
        return v
    bounds = [f"{word} {bound}" for word, bound in (("above", above), ("from", low), ("to", high))
              if bound is not None]
    return " ".join(["a number"] + bounds), check


def one_of(*choices):
    def check(v):
        if isinstance(v, bool) or v not in choices:
            raise ValueError
        return v
    return "one of " + ", ".join(choices), check


def boolean():
    def check(v):
        if not isinstance(v, bool):
            raise ValueError
        return v
    return "true or false", check


def text():
    def check(v):
        if not isinstance(v, str) or not v:
            raise ValueError
        return v
    return "a piece of text", check


def device():
    def check(v):
        if not isinstance(v, str) or not re.fullmatch(r"cpu|mps|(cuda|xpu)(:\d+)?", v):
            raise ValueError
        return v
    return "cuda:0, cuda:1, ..., cpu or mps", check


def list_of(rule, length=None, empty=False):
    def check(v):
        if not isinstance(v, (list, tuple)) or (length and len(v) != length) or not (v or empty):
            raise ValueError
        return [rule[1](x) for x in v]
    return f"a list of {f'{length} times ' if length else ''}{rule[0]}", check


def optional(rule):
    return f"null or {rule[0]}", lambda v: None if v is None else rule[1](v)


RULES = {
    "devices": list_of(device()), "dtype": one_of("auto", "bf16", "fp16", "fp32", "fp64"),
    "seed": integer(0, 2 ** 32 - 1),
    "model_name": one_of(*MODEL_OPTIONS), "output_folder": text(),
    "dataset.name": one_of(*KNOWN), "dataset.split": one_of("train", "test", "val"),
    "dataset.data_folder": text(), "dataset.img_size": optional(integer(8)),
    "dataset.limit": optional(integer(2)), "dataset.latent_crops": optional(integer(0)),
    "loader.batch_size": integer(1), "loader.num_workers": integer(0),
    "model.img_shape": optional(list_of(integer(1), 3)), "model.num_classes": optional(integer(1)),
    "model.timesteps": integer(1), "model.dim": integer(8), "model.context_dim": integer(1),
    "model.dim_mults": list_of(integer(1)), "model.attn_levels": list_of(integer(0), empty=True),
    "model.use_vae": boolean(), "model.vae_encoder_weights": optional(text()),
    "model.vae_decoder_weights": optional(text()), "model.label_dropout": number(0, 1),
    "model.dropout": number(0, 0.99), "model.label_in_time": boolean(), "model.zero_init": boolean(),
    "model.patch_size": integer(1),
    "model.beta_schedule": optional(one_of(*SCHEDULES)), "model.scale_betas": boolean(),
    "model.prediction": one_of(*PREDICTIONS), "model.min_snr_gamma": optional(number(above=0)),
    "model.sigma_data": optional(number(above=0)), "model.P_mean": number(), "model.P_std": number(above=0),
    "model.sigma_min": number(above=0), "model.sigma_max": number(above=0), "model.rho": number(above=0),
    "train_cfg.lr": number(above=0), "train_cfg.epochs": integer(1), "train_cfg.num_eval_samples": integer(1),
    "train_cfg.warmup": integer(0), "train_cfg.lr_schedule": one_of("constant", "cosine", "linear"),
    "train_cfg.optimizer": one_of("adamw", "muon"), "train_cfg.betas": list_of(number(0, 0.99999), 2),
    "train_cfg.weight_decay": number(0),
    "train_cfg.accumulate": integer(1), "train_cfg.compile": optional(boolean()),
    "train_cfg.cuda_graphs": optional(boolean()),
    "train_cfg.clip_grad_norm": optional(number(above=0)), "train_cfg.ema_decay": number(0, 0.999999),
    "train_cfg.keep_last": optional(integer(1)),
    "eval.every": optional(integer(1)), "eval.num": integer(10),
    "eval.features": optional(one_of("classifier", "inception", "autoencoder")),
    "sample_cfg.sampler": optional(one_of(*DEFAULT_STEPS)), "sample_cfg.steps": optional(integer(1)),
    "sample_cfg.guidance_scale": number(0), "sample_cfg.guidance_interval": optional(list_of(number(0), 2)),
    "sample_cfg.clip": optional(boolean()), "sample_cfg.eta": optional(number(0, 1)),
    "sample_cfg.spacing": optional(one_of(*SPACINGS)), "sample_cfg.S_churn": optional(number(0)),
    "sample_cfg.S_min": optional(number(0)), "sample_cfg.S_max": optional(number(0)),
    "sample_cfg.S_noise": optional(number(0)),
}


def load_config(path, overrides=()):
    """The configuration of one run: DEFAULTS, then the file, then overrides; checked.

    Args:
        path: YAML file; looked up in the project's configs/ too.
        overrides: strings "key.sub=value", the value in YAML.

    Returns:
        dict shaped like DEFAULTS, `model` with the options of its `model_name`; paths absolute;
        `img_shape` and `num_classes` filled in where the data set's name settles them.

    Raises:
        UsageError: naming the file or key, the value, and what would be right.
    """
    given = _read(path)
    for item in overrides:
        _set(given, item)
    return complete_config(given)


def complete_config(given):
    """Put a dict of differences (or a checkpoint's whole configuration) on top of DEFAULTS; see `load_config`."""
    name = given.get("model_name", DEFAULTS["model_name"])
    check_value("model_name", name)
    defaults = copy.deepcopy(DEFAULTS)
    defaults["model"].update(MODEL_OPTIONS[name])
    config = _merge(defaults, given, "", name)
    _resolve(config)
    _check_combinations(config)
    return config


def _read(path):
    name, places = os.path.basename(path), [path]
    # a checkout without symbolic links has no code/configs, an unpacked submission only that
    folders = [os.path.join(CODE, "..", "configs"), os.path.join(CODE, "configs")]
    if os.path.basename(os.path.dirname(path)) == "configs":
        places += [os.path.join(folder, name) for folder in folders]
    found = next(filter(os.path.isfile, places), None)
    if found is None:
        near = _nearest(name, next((os.listdir(folder) for folder in folders if os.path.isdir(folder)), []))
        raise UsageError(f"config: no file {path}" + (f"; did you mean configs/{near}?" if near else ""))
    try:
        with open(found, encoding="utf-8") as f:
            given = yaml.safe_load(f)
    except (yaml.YAMLError, ValueError, RecursionError, OSError) as e:  # ValueError: no UTF-8, no such date
        raise UsageError(f"config: {path} is no YAML: {' '.join(str(e).split())}") from None
    if given is not None and not isinstance(given, dict):
        raise UsageError(f"config: {path} must hold `key: value` lines, not {type(given).__name__}")
    return given or {}


def _set(given, item):
    key, sign, value = item.partition("=")
    if not sign or not key:
        raise UsageError(f"--set: {item!r} is not of the form key.sub=value")
    try:
        value = yaml.safe_load(value)
    except (yaml.YAMLError, ValueError):
        raise UsageError(f"--set {key}: {value!r} is no YAML value") from None
    *parents, last = key.strip().split(".")
    for name in parents:
        given = given.setdefault(name, {})
        if not isinstance(given, dict):
            raise UsageError(f"--set {key}: {name} is no section")
    given[last] = value


def _nearest(word, words):
    lower = {str(w).lower(): str(w) for w in words}
    return next((lower[w] for w in difflib.get_close_matches(str(word).lower(), lower, 1)), None)


def _merge(defaults, given, prefix, model_name):
    for key, value in given.items():
        full = f"{prefix}{key}"
        if key not in defaults:
            raise UsageError(f"config: unknown key {full}{_hint(key, defaults, prefix, model_name)}")
        if isinstance(defaults[key], dict):
            if not isinstance(value, dict):
                raise UsageError(f"config: {full} is a section of `key: value` lines, not {value!r}")
            _merge(defaults[key], value, f"{full}.", model_name)
        else:
            defaults[key] = check_value(full, value)
    return defaults


def _hint(key, defaults, prefix, model_name):
    owner = next((m for m, options in MODEL_OPTIONS.items() if key in options), None)
    if prefix == "model." and owner:
        return f"; it belongs to model_name {owner}, not {model_name}"
    near = _nearest(key, defaults)
    if near:
        return f"; did you mean {prefix}{near}?"
    elsewhere = [k for k in RULES if k.split(".")[-1] == key]
    return f"; did you mean {elsewhere[0]}?" if elsewhere else f"; there are {', '.join(map(str, defaults))}"


def check_value(key, value, rules=RULES):
    wanted, check = rules[key]
    try:
        return check(value)
    except (ValueError, TypeError, OverflowError):
        _, choice, words = wanted.partition("one of ")
        near = _nearest(value, words.split(", ")) if choice else None
        raise UsageError(f"config: {key} is {value!r}; it must be {wanted}"
                         + (f" (did you mean {near}?)" if near else "")) from None


def _paths(config):
    """(section, key) of every path that is set."""
    for *parents, key in PATHS:
        section = config
        for name in parents:
            section = section[name]
        if section[key] is not None:
            yield section, key


def _resolve(config):
    for section, key in _paths(config):
        section[key] = os.path.normpath(os.path.join(CODE, os.path.expanduser(section[key])))
    data, model = config["dataset"], config["model"]
    shape, classes = KNOWN[data["name"]]
    size = data["img_size"] or shape[-1]
    model["img_shape"] = model["img_shape"] or [shape[0], size, size]
    model["num_classes"] = model["num_classes"] or classes
    if model["img_shape"] != [shape[0], size, size]:
        raise UsageError(f"config: model.img_shape is {model['img_shape']}, but the data set {data['name']} "
                         f"gives {[shape[0], size, size]}; change dataset.img_size")


def portable(config):
    """A copy whose paths are relative to code/ again, for files that may move to another machine."""
    config = copy.deepcopy(config)
    for section, key in _paths(config):
        try:
            section[key] = os.path.relpath(section[key], CODE).replace(os.sep, "/")
        except ValueError:  # another drive
            pass
    return config


def _check_combinations(config):
    model, sampling = config["model"], config["sample_cfg"]
    if model["use_vae"]:
        for key in ("vae_encoder_weights", "vae_decoder_weights"):
            if model[key] is None:
                raise UsageError(f"config: model.use_vae needs model.{key}, the path of a weight file")
    if sampling["guidance_scale"] != 1 and model["label_dropout"] == 0:
        raise UsageError(f"config: sample_cfg.guidance_scale is {sampling['guidance_scale']}; "
                         "other than 1 it needs model.label_dropout above 0 (0.1 is usual)")
    if model.get("beta_schedule") == "cosine" and model["prediction"] == "eps":
        # it ends at abar = 2e-9: an image worked out from x_t and eps there is an error times 20,000
        raise UsageError("config: model.prediction is 'eps', which cannot be sampled with model.beta_schedule "
                         "'cosine'; use v or x0")
    if config["model_name"] == "EDM" and model["sigma_min"] >= model["sigma_max"]:
        raise UsageError(f"config: model.sigma_min is {model['sigma_min']}; it must be below model.sigma_max, "
                         f"{model['sigma_max']}")
