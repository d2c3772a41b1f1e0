"""Configuration: SETTINGS below, a YAML file with only its differences on top, then `--set key.sub=value`."""

import argparse
import copy
import os

from .common.cli import positive
from .common.errors import UsageError, shown
from .common.reading import CHARACTERS, parse_yaml
from .common.rules import boolean, check, device, integer, list_of, nearest_word, number, one_of, optional, text

# relative paths in a config are taken from this folder, code/, wherever a command is started
CODE = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
# what is computed once and kept: latents, features of real images
CACHE = os.path.normpath(os.path.join(CODE, "..", "data", ".cache"))


# data set -> (image shape, number of classes, None: known once the folder is read)
KNOWN = {
    "MNIST": ((1, 28, 28), 10),
    "FashionMNIST": ((1, 28, 28), 10),
    "CIFAR10": ((3, 32, 32), 10),
    "AFHQ": ((3, 128, 128), 3),
    "MiniImageNet": ((3, 128, 128), None),
    "ImageFolder": ((3, 128, 128), None),
}

# ---- every setting: key -> (default, rule)

SETTINGS = {
    # the first device is used; without a GPU training runs on the CPU and says so
    "devices": (["cuda:0"], list_of(device())),
    # auto: bf16 where the GPU has it, else fp16 with a gradient scaler; fp32 on a CPU
    "dtype": ("auto", one_of("auto", "bf16", "fp16", "fp32")),
    "seed": (0, integer(0, 2 ** 32 - 1)),
    "model_name": ("DDPM", one_of("DDPM", "EDM", "Flow")),
    "output_folder": ("../logs", text()),

    "dataset.name": ("MNIST", one_of(*KNOWN)),
    "dataset.split": ("train", one_of("train", "test", "val")),
    "dataset.data_folder": ("../data", text()),
    # side of the square images; null: the data's own, 128 for photographs
    "dataset.img_size": (None, optional(integer(8, 4096))),
    # train on this many images, spread evenly over the set; null: all
    "dataset.limit": (None, optional(integer(2))),
    # with use_vae: encode this many random crops of each image (and their mirror images) once, and learn from those:
    # updates are far faster, the augmentation is coarser. 0 or null: encode anew in every update, each time another crop
    "dataset.latent_crops": (4, optional(integer(0, 1000))),

    "loader.batch_size": (64, integer(1, 10 ** 6)),
    # threads that decode image files, where the data do not fit in memory
    "loader.num_workers": (4, integer(0, 1000)),

    "model.img_shape": (None, optional(list_of(integer(1, 4096), 3))),  # filled in from the data set
    "model.num_classes": (None, optional(integer(1, 10 ** 6))),   # filled in from the data set
    "model.timesteps": (1000, integer(1, 10 ** 5)),
    "model.dim": (64, integer(8, 8192)),                          # channels at the finest level
    "model.context_dim": (64, integer(1, 10 ** 5)),               # width of the label embedding
    "model.dim_mults": ([1, 2, 4], list_of(integer(1, 1000))),    # channels of each level, in units of dim
    # levels with a transformer, 0 being the finest; the middle always has one
    "model.attn_levels": ([0, 1], list_of(integer(0), empty=True)),
    # diffuse the latents of an autoencoder instead of pixels
    "model.use_vae": (False, boolean()),
    "model.vae_encoder_weights": (None, optional(text())),
    "model.vae_decoder_weights": (None, optional(text())),
    # beyond the handout: see UNet and Diffusion
    "model.label_dropout": (0.0, number(0, 1)),
    "model.dropout": (0.0, number(0, 0.99)),
    "model.label_in_time": (False, boolean()),
    "model.zero_init": (False, boolean()),
    "model.patch_size": (1, integer(1, 512)),

    "train_cfg.lr": (2e-4, number(above=0)),
    "train_cfg.epochs": (30, integer(1, 10 ** 9)),
    "train_cfg.num_eval_samples": (10, integer(1, 10 ** 4)),      # images per class in a sample grid
    "train_cfg.warmup": (0, integer(0, 10 ** 9)),                 # updates over which the learning rate rises to lr
    # cosine falls to zero over the whole training, trapezoid in a straight line over its second half
    "train_cfg.lr_schedule": ("constant", one_of("constant", "cosine", "trapezoid")),
    # muon: orthogonalized updates for the convolutions, AdamW for the rest
    "train_cfg.optimizer": ("adamw", one_of("adamw", "muon")),
    "train_cfg.betas": ([0.9, 0.999], list_of(number(0, 0.99999), 2)),  # AdamW's
    "train_cfg.weight_decay": (0.01, number(0)),
    "train_cfg.clip_grad_norm": (1.0, optional(number(above=0))),
    # parts in which a batch goes through the network, where it is too large for the memory
    "train_cfg.accumulate": (1, integer(1, 10 ** 5)),
    # null: on a GPU the network runs as CUDA graphs, or through torch.compile where graphs are not possible (several
    # processes, accumulate); true: torch.compile in any case; false: neither
    "train_cfg.compile": (None, optional(boolean())),
    # in update n it is (1 + n) / (10 + n) while that is smaller
    "train_cfg.ema_decay": (0.999, number(0, 0.999999)),
    "train_cfg.keep_last": (None, optional(integer(1))),          # number of checkpoints to keep; null: all

    # what evaluate.py and compare.py judge by; null: classifier for MNIST, else mobilenet
    "eval.features": (None, optional(one_of("classifier", "mobilenet", "inception", "autoencoder"))),

    # how images are drawn; null takes the sampler's default. DDPM has ddpm (all timesteps) and ddim; every model has
    # heun (the default of EDM and Flow), euler, euler_ancestral and dpmpp_2m
    "sample_cfg.sampler": (None, optional(one_of("ddpm", "ddim", "heun", "euler", "euler_ancestral", "dpmpp_2m"))),
    "sample_cfg.steps": (None, optional(integer(1, 10 ** 4))),
    "sample_cfg.guidance_scale": (1.0, number(0)),                # other than 1 needs model.label_dropout or a guide
    # checkpoint of a weaker model of the same images (smaller, trained less); guidance then leads away from its output
    # instead of from the model's own output without a label (autoguidance); not with ddpm and ddim
    "sample_cfg.guide": (None, optional(text())),
    # [sigma_lo, sigma_hi]: guide only where sigma_lo < sigma <= sigma_hi; null: at all levels
    "sample_cfg.guidance_interval": (None, optional(list_of(number(0), 2))),
    # keep predicted pixels in [-1, 1]; null: true for a DDPM in pixels, except with ddpm; else false
    "sample_cfg.clip": (None, optional(boolean())),
    "sample_cfg.eta": (None, optional(number(0, 1))),             # fresh noise in each step: ddim, euler_ancestral, dpmpp_2m
    "sample_cfg.spacing": (None, optional(one_of("uniform", "quadratic"))),  # of ddim's timesteps
    "sample_cfg.S_churn": (None, optional(number(0))),            # fresh noise on the whole way: heun
}

# of one kind of model alone; see its class
MODEL_SETTINGS = {
    "DDPM": {
        "model.beta_schedule": (None, optional(one_of("linear", "quadratic", "cosine"))),
        "model.prediction": ("eps", one_of("eps", "v", "x0")),
    },
    "EDM": {
        "model.sigma_data": (None, optional(number(1e-6, 1e6))),
        "model.P_mean": (-1.2, number(-100, 100)),
        "model.P_std": (1.2, number(1e-6, 100)),
        "model.sigma_min": (0.002, number(1e-6, 1e6)),  # both are cut to what P_mean and P_std make training draw
        "model.sigma_max": (80.0, number(1e-6, 1e6)),
        "model.rho": (7.0, number(0.1, 1000)),
    },
}
# training draws the logit of Flow's time as it draws EDM's ln(sigma), about another mean
MODEL_SETTINGS["Flow"] = {key: value for key, value in MODEL_SETTINGS["EDM"].items() if key != "model.sigma_data"} | {
    "model.P_mean": (0.0, number(-100, 100)), "model.P_std": (1.0, number(1e-6, 100))}

RULES = {key: rule for table in (SETTINGS, *MODEL_SETTINGS.values()) for key, (_, rule) in table.items()}
PATHS = ("output_folder", "dataset.data_folder", "model.vae_encoder_weights", "model.vae_decoder_weights",
         "sample_cfg.guide")
# keys in checkpoints of earlier versions, with the only value that they may have
RETIRED = {"model.scale_betas": False, "model.min_snr_gamma": None, "train_cfg.cuda_graphs": None, "eval.every": None,
           "eval.num": 1000, "sample_cfg.S_min": None, "sample_cfg.S_max": None, "sample_cfg.S_noise": None}


def defaults_of(table):
    """{"section": {"key": default}} of a table like SETTINGS."""
    config = {}
    for key, (default, _) in table.items():
        *sections, last = key.split(".")
        section = config
        for name in sections:
            section = section.setdefault(name, {})
        section[last] = copy.deepcopy(default)
    return config


def load_config(path, overrides=()):
    """The configuration of one run: the defaults of SETTINGS, then the file, then `overrides`; checked.

    Args:
        path: YAML file; looked up in the project's configs/ too.
        overrides: strings "key.sub=value", the value in YAML.

    Returns:
        dict of sections, `model` with the settings of its `model_name`; paths absolute; `img_shape` and `num_classes`
        filled in where the data set's name determines them.

    Raises:
        UsageError: naming the file or key, the value, and what would be right.
    """
    return complete_config(set_values(read_yaml(path), overrides))


def complete_config(given):
    """A dict of differences, or a checkpoint's whole configuration, on top of the defaults; see `load_config`."""
    if isinstance(given.get("model"), dict) and "unet" in given["model"]:
        raise UsageError("config: this is a config of Stable Diffusion; draw with it by txt2img.py")
    name = given.get("model_name", SETTINGS["model_name"][0])
    check_value("model_name", name)
    config = merge(defaults_of(SETTINGS | MODEL_SETTINGS[name]), given)
    for section, key in _paths(config):
        section[key] = os.path.normpath(os.path.join(CODE, os.path.expanduser(section[key])))
    _fill_in_shapes(config)
    _check_combinations(config)
    return config


def read_yaml(path):
    """The dict in a YAML file. Raises UsageError."""
    name, places = os.path.basename(path), [path]
    # a checkout without symbolic links has no code/configs, an unpacked submission only that
    folders = [os.path.join(CODE, "..", "configs"), os.path.join(CODE, "configs")]
    if os.path.basename(os.path.dirname(path)) == "configs":
        places += [os.path.join(folder, name) for folder in folders]
    found = next(filter(os.path.isfile, places), None)
    if found is None:
        near = nearest_word(name, next((os.listdir(folder) for folder in folders if os.path.isdir(folder)), []))
        raise UsageError(f"config: no file {path}" + (f"; did you mean configs/{near}?" if near else ""))
    try:
        with open(found, encoding="utf-8") as f:
            given = parse_yaml(f.read(CHARACTERS + 1))
    except OSError as e:
        raise UsageError(f"config: {path} cannot be read ({e.strerror})") from None
    except ValueError as e:
        raise UsageError(f"config: {path} is no YAML: {e}") from None
    if given is not None and not isinstance(given, dict):
        raise UsageError(f"config: {path} must hold `key: value` lines, not {type(given).__name__}")
    return given or {}


def set_values(given, overrides):
    """`given` with the values of `--set key.sub=value`. Raises UsageError."""
    for item in overrides:
        key, sign, value = item.partition("=")
        if not sign or not key:
            raise UsageError(f"--set: {shown(item)} is not of the form key.sub=value")
        try:
            value = parse_yaml(value)
        except ValueError as e:
            raise UsageError(f"--set {key}: {shown(value)} is no YAML value ({e})") from None
        *parents, last = key.strip().split(".")
        section = given
        for name in parents:
            section = section.setdefault(name, {})
            if not isinstance(section, dict):
                raise UsageError(f"--set {key}: {name} is no section")
        section[last] = value
    return given


def merge(config, given, rules=RULES, prefix=""):
    """Put the values of `given` into `config`, both dicts of sections. Raises UsageError for what does not belong."""
    for key, value in given.items():
        full = f"{prefix}{key}"
        if key not in config and full in RETIRED and value == RETIRED[full]:
            continue
        if key not in config:
            raise UsageError(f"config: unknown key {full}{_hint(key, full, config, prefix, rules)}")
        if not isinstance(config[key], dict):
            config[key] = check(full, value, rules)
        elif isinstance(value, dict):
            merge(config[key], value, rules, f"{full}.")
        else:
            raise UsageError(f"config: {full} is a section of `key: value` lines, not {shown(value)}")
    return config


def _hint(key, full, config, prefix, rules):
    owners = [name for name, table in MODEL_SETTINGS.items() if full in table]
    if owners:
        return f"; it belongs to model_name {' and '.join(owners)}"
    near = nearest_word(key, config)
    if near:
        return f"; did you mean {prefix}{near}?"
    elsewhere = [k for k in rules if k.split(".")[-1] == key]
    return f"; did you mean {elsewhere[0]}?" if elsewhere else f"; there are {', '.join(map(str, config))}"


def check_value(key, value):
    """The value of a setting as it is used. Raises UsageError with the key, the value, and what would be right."""
    return check(key, value, RULES)


def _paths(config):
    """(section, key) of every path that is set."""
    for path in PATHS:
        *parents, key = path.split(".")
        section = config.get(parents[0], {}) if parents else config  # an autoencoder's config has no sample_cfg
        if section.get(key) is not None:
            yield section, key


def _fill_in_shapes(config):
    data, model = config["dataset"], config["model"]
    shape, classes = KNOWN[data["name"]]
    size = data["img_size"] or shape[-1]
    model["img_shape"] = model["img_shape"] or [shape[0], size, size]
    model["num_classes"] = model["num_classes"] or classes
    if model["img_shape"] != [shape[0], size, size]:
        raise UsageError(f"config: model.img_shape is {model['img_shape']}, but the data set {data['name']} "
                         f"gives {[shape[0], size, size]}; change dataset.img_size")


def portable(config):
    """A copy for files: paths in the project are relative to code/ again, as it may be moved; others are absolute."""
    config, root = copy.deepcopy(config), os.path.dirname(CODE)
    for section, key in _paths(config):
        if os.path.join(section[key], "").startswith(os.path.join(root, "")):
            section[key] = os.path.relpath(section[key], CODE).replace(os.sep, "/")
    return config


def _check_combinations(config):
    model, sampling = config["model"], config["sample_cfg"]
    if model["use_vae"]:
        for key in ("vae_encoder_weights", "vae_decoder_weights"):
            if model[key] is None:
                raise UsageError(f"config: model.use_vae needs model.{key}, the path of a weight file")
    if sampling["guidance_scale"] != 1 and model["label_dropout"] == 0 and sampling["guide"] is None:
        raise UsageError(f"config: sample_cfg.guidance_scale is {sampling['guidance_scale']}; "
                         "other than 1 it needs model.label_dropout above 0 (0.1 is usual), or sample_cfg.guide")


# ---- sample_cfg on the command line

# the settings of sample_cfg that have a flag, with their help
SAMPLER_FLAGS = {
    "sampler": RULES["sample_cfg.sampler"][0].removeprefix("null or ") + "; ddpm and ddim draw from a DDPM only",
    "steps": "number of steps (default: heun 18, dpmpp_2m 20, the others 50; ddpm takes every timestep)",
    "guidance_scale": "guidance, 1 is none; needs a model trained with model.label_dropout, or a guide",
    "guide": "checkpoint of a weaker model, to guide away from it",
    "guidance_interval": "guide only at noise levels LO < sigma <= HI",
    "clip": "keep predicted pixels in [-1, 1]",
    "eta": "fresh noise in each step, 0 to 1: ddim, euler_ancestral, dpmpp_2m",
    "spacing": "ddim's timesteps, uniform or quadratic",
    "S_churn": "fresh noise on the whole way: heun",
}


def add_sampler_flags(parser):
    """The flags that say how images are drawn; `sampler_flags` reads them, models.sampling_settings checks them."""
    group = parser.add_argument_group("sampling; what is not given is the config's, see sample_cfg in libs/config.py")
    types = {"steps": {"type": positive}, "sampler": {"metavar": "NAME"},
             "guide": {"metavar": "FILE"}, "guidance_interval": {"type": lambda text: text.split(","), "metavar": "LO,HI"},
             "clip": {"action": argparse.BooleanOptionalAction}}
    types |= {key: {"type": float, "metavar": "X"} for key in ("guidance_scale", "eta", "S_churn")}
    for key, description in SAMPLER_FLAGS.items():
        group.add_argument("--" + key.replace("_", "-"), default=None, help=description, **types.get(key, {}))


def sampler_flags(args):
    """The settings of sample_cfg on the command line, None for those not given."""
    return {key: getattr(args, key) for key in SAMPLER_FLAGS}


def parse_setting(text):
    """ "heun:9 guidance_scale=2" -> {"sampler": "heun", "steps": 9, "guidance_scale": 2}; "config" -> {}.

    Raises UsageError for a key that is not of sample_cfg, or a value that is not YAML; models.sampling_settings checks
    the values.
    """
    keys = [key for key in SAMPLER_FLAGS if key != "guide"]  # which is loaded with the model
    name, *pairs = text.split() or [""]
    if name != "config":
        sampler, colon, steps = name.partition(":")
        pairs = [f"sampler={sampler}"] + [f"steps={steps}"] * bool(colon) + pairs
    setting = {}
    for pair in pairs:
        key, _, value = pair.partition("=")
        if not value or key not in keys:
            raise UsageError(f"{shown(text)}: {shown(pair)} is not one of {', '.join(keys)} with a value, as "
                             "in guidance_scale=2")
        try:
            setting[key] = parse_yaml(f"[{value}]" if key == "guidance_interval" else value)
        except ValueError as e:
            raise UsageError(f"{shown(text)}: {shown(value)} is no YAML value ({e})") from None
    return setting
