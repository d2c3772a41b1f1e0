"""Configuration: what a YAML file and --set may say, and the one line that answers what they may not."""

import copy
import os
from pathlib import Path

import pytest

from libs import UsageError, load_config
from libs.config import CODE, DEFAULTS, MODEL_OPTIONS, RULES, complete_config, portable

ROOT = Path(CODE).parent
CONFIGS = [p for p in sorted((ROOT / "configs").glob("*.yaml")) if p.name != "sd15.yaml"]  # that one is txt2img.py's
MNIST = str(ROOT / "configs" / "mnist.yaml")


@pytest.fixture
def load(tmp_path):
    """load(yaml text, *overrides): the configuration of a file with that text."""
    def load(text="", *overrides):
        path = tmp_path / "test.yaml"
        path.write_text(text, encoding="utf-8")
        return load_config(str(path), overrides)
    return load


@pytest.fixture
def refused(load):
    """refused(yaml text, *overrides): the message of the UsageError, which is one line."""
    def refused(text="", *overrides):
        with pytest.raises(UsageError) as error:
            load(text, *overrides)
        message = str(error.value)
        assert message and "\n" not in message
        return message
    return refused


# ---- what is there when nothing is said

@pytest.mark.parametrize("key, value", [
    ("devices", ["cuda:0"]), ("dtype", "auto"), ("seed", 0), ("model_name", "DDPM"),
    ("output_folder", os.path.join(str(ROOT), "logs")),
    ("dataset.name", "MNIST"), ("dataset.split", "train"), ("dataset.data_folder", os.path.join(str(ROOT), "data")),
    ("loader.batch_size", 64), ("loader.num_workers", 4),
    ("model.img_shape", [1, 28, 28]), ("model.num_classes", 10), ("model.timesteps", 1000), ("model.dim", 64),
    ("model.context_dim", 64), ("model.dim_mults", [1, 2, 4]), ("model.attn_levels", [0, 1]),
    ("model.use_vae", False), ("model.vae_encoder_weights", None), ("model.vae_decoder_weights", None),
    ("model.label_dropout", 0), ("model.beta_schedule", None), ("model.prediction", "eps"),
    ("train_cfg.lr", 2e-4), ("train_cfg.epochs", 30), ("train_cfg.num_eval_samples", 10),
    ("sample_cfg.guidance_scale", 1),
])
def test_defaults_are_the_courses(key, value):
    found = load_config(MNIST)
    for part in key.split("."):
        found = found[part]
    assert found == value


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.name)
def test_every_shipped_config_loads(path):
    config = load_config(str(path))
    assert config["model"]["img_shape"] and config["train_cfg"]["epochs"] >= 1


def test_there_are_shipped_configs():
    assert {"mnist.yaml", "afhq.yaml"} <= {p.name for p in CONFIGS}


def test_afhq_is_the_handouts_run():
    config = load_config(str(ROOT / "configs" / "afhq.yaml"))
    assert config["model"]["img_shape"] == [3, 128, 128] and config["model"]["use_vae"]
    assert config["train_cfg"]["epochs"] == 300


def test_an_empty_file_is_all_defaults(load):
    assert load("") == load("# nothing") == load_config(MNIST)


def test_every_default_has_a_rule_and_passes_it():
    def check(section, prefix):
        for key, value in section.items():
            if isinstance(value, dict):
                check(value, f"{prefix}{key}.")
            else:
                assert RULES[prefix + key][1](value) == value, prefix + key
    check(DEFAULTS, "")
    for options in MODEL_OPTIONS.values():
        check(options, "model.")


def test_loading_leaves_the_defaults_alone(load):
    before = copy.deepcopy(DEFAULTS)
    load("model: {dim_mults: [1, 2], timesteps: 10}", "train_cfg.betas=[0.5, 0.9]", "model_name=EDM")
    assert DEFAULTS == before


@pytest.mark.parametrize("name", MODEL_OPTIONS)
def test_each_kind_of_model_gets_its_own_options(load, name):
    model = load(f"model_name: {name}")["model"]
    assert MODEL_OPTIONS[name].items() <= model.items()
    others = {k for options in MODEL_OPTIONS.values() for k in options} - MODEL_OPTIONS[name].keys()
    assert not others & model.keys()


@pytest.mark.parametrize("name, size, shape, classes", [
    ("FashionMNIST", "null", [1, 28, 28], 10), ("EMNIST", 32, [1, 32, 32], 47), ("CIFAR10", "null", [3, 32, 32], 10),
    ("AFHQ", 64, [3, 64, 64], 3), ("ImageFolder", "null", [3, 128, 128], None),
])
def test_shape_and_classes_come_from_the_data_set(load, name, size, shape, classes):
    model = load(f"dataset: {{name: {name}, img_size: {size}}}")["model"]
    assert (model["img_shape"], model["num_classes"]) == (shape, classes)


# ---- --set

@pytest.mark.parametrize("override, section, key, value", [
    ("train_cfg.lr=2e-4", "train_cfg", "lr", 2e-4),  # text to YAML, a number here
    ("train_cfg.lr=0.001", "train_cfg", "lr", 0.001),
    ("train_cfg.epochs=5", "train_cfg", "epochs", 5),
    ("train_cfg.clip_grad_norm=null", "train_cfg", "clip_grad_norm", None),
    ("train_cfg.clip_grad_norm=", "train_cfg", "clip_grad_norm", None),
    ("train_cfg.betas=[0.8, 0.9]", "train_cfg", "betas", [0.8, 0.9]),
    ("model.dim_mults=[1,2]", "model", "dim_mults", [1, 2]),
    ("model.attn_levels=[]", "model", "attn_levels", []),
    ("model.zero_init=true", "model", "zero_init", True),
    ("dataset.data_folder=/a=b", "dataset", "data_folder", "/a=b"),
])
def test_set(load, override, section, key, value):
    found = load("", override)[section][key]
    assert found == value and type(found) is type(value)


def test_set_beats_the_file_and_the_last_one_wins(load):
    assert load("seed: 1", "seed=2", "seed=3")["seed"] == 3
    config = load("train_cfg: {lr: 0.1, epochs: 7}", "train_cfg.lr=0.2")
    assert (config["train_cfg"]["lr"], config["train_cfg"]["epochs"]) == (0.2, 7)  # beside it, nothing changes


def test_set_takes_a_whole_section(load):
    config = load("", "loader={batch_size: 3}")
    assert config["loader"] == {"batch_size": 3, "num_workers": 4}


@pytest.mark.parametrize("override, named", [
    ("train_cfg.epochs", "'train_cfg.epochs'"), ("=5", "'=5'"), ("train_cfg.epochs=[1", "train_cfg.epochs"),
    ("model=3", "model is a section"), ("train_cfg.epoch=3", "train_cfg.epochs"),
    ("seed.x=3", "seed"), ("model.dim.x=3", "model.dim"),
])
def test_set_refuses(refused, override, named):
    assert named in refused("", override)


def test_set_into_what_the_file_made_a_value(refused):
    assert "model" in refused("model: 3", "model.dim=8")


# ---- keys that do not exist

@pytest.mark.parametrize("text, key, hint", [
    ("sed: 1", "sed", "did you mean seed?"),
    ("trian_cfg: {lr: 1}", "trian_cfg", "did you mean train_cfg?"),
    ("loader: {batchsize: 1}", "loader.batchsize", "did you mean loader.batch_size?"),
    ("model: {dims: 8}", "model.dims", "did you mean model.dim"),
    ("dataset: {folder: x}", "dataset.folder", "data_folder"),
    ("sample_cfg: {guidance: 2}", "sample_cfg.guidance", "did you mean sample_cfg.guidance_scale?"),
    ("batch_size: 8", "batch_size", "did you mean loader.batch_size?"),  # right key, wrong level
    ("model: {lr: 8}", "model.lr", "did you mean train_cfg.lr?"),
    ("xyzzy: 1", "xyzzy", "there are devices"),
    ("1: 2", "1", "there are devices"),
    ("model: {sigma_min: 0.1}", "model.sigma_min", "belongs to model_name EDM, not DDPM"),
    ("model_name: DDIM\nmodel: {P_mean: 0}", "model.P_mean", "belongs to model_name EDM, not DDIM"),
    ("model_name: EDM\nmodel: {prediction: v}", "model.prediction", "belongs to model_name DDPM, not EDM"),
])
def test_unknown_key(refused, text, key, hint):
    message = refused(text)
    assert f"unknown key {key}" in message and hint in message


# ---- values that cannot be

@pytest.mark.parametrize("key, value", [
    ("train_cfg.epochs", "true"), ("loader.batch_size", "true"), ("train_cfg.lr", "true"), ("seed", "false"),
    ("train_cfg.lr", "fast"), ("train_cfg.epochs", "many"), ("train_cfg.epochs", "2.5"), ("train_cfg.epochs", "'3'"),
    ("model.use_vae", "1"), ("model.use_vae", "'yes'"), ("output_folder", "3"), ("output_folder", "''"),
    ("output_folder", "null"), ("dataset.data_folder", "[a]"), ("train_cfg.lr", "[1]"), ("train_cfg.lr", "null"),
    ("train_cfg.lr", "{a: 1}"), ("model.dim", "null"),
    ("train_cfg.betas", "[0.9]"), ("train_cfg.betas", "[0.9, 0.99, 0.999]"), ("train_cfg.betas", "0.9"),
    ("train_cfg.betas", "[0.9, true]"), ("model.dim_mults", "2"), ("model.dim_mults", "[]"),
    ("model.dim_mults", "[1, 2.5]"), ("model.dim_mults", "[1, 0]"), ("model.attn_levels", "[-1]"),
    ("model.img_shape", "[28, 28]"), ("model.img_shape", "[1, 0, 28]"), ("devices", "cuda:0"), ("devices", "[]"),
    ("devices", "[gpu]"), ("devices", "[0]"),
    ("train_cfg.lr", "0"), ("train_cfg.lr", "-1"), ("train_cfg.lr", ".nan"), ("train_cfg.lr", ".inf"),
    ("train_cfg.lr", "nan"), ("train_cfg.lr", "-.inf"), ("train_cfg.weight_decay", "-0.1"),
    ("train_cfg.epochs", "0"), ("train_cfg.warmup", "-1"), ("train_cfg.clip_grad_norm", "0"),
    ("train_cfg.clip_grad_norm", ".nan"), ("train_cfg.ema_decay", "1"), ("train_cfg.keep_last", "0"),
    ("train_cfg.betas", "[0.9, 1]"), ("train_cfg.num_eval_samples", "0"), ("train_cfg.lr_schedule", "cosin"),
    ("loader.batch_size", "0"), ("loader.num_workers", "-1"), ("model.timesteps", "0"), ("model.dim", "-64"),
    ("model.label_dropout", "1.5"), ("model.dropout", "1"), ("model.patch_size", "0"), ("model.prediction", "epsilon"),
    ("model.min_snr_gamma", "0"), ("model.beta_schedule", "lineal"), ("dataset.img_size", "4"),
    ("dataset.split", "training"), ("dataset.name", "CIFAR"), ("dtype", "fp8"), ("model_name", "GAN"),
    ("model_name", "[EDM]"), ("seed", "-1"), ("sample_cfg.guidance_scale", "-1"), ("sample_cfg.steps", "0"),
    ("train_cfg.lr", "1" + "0" * 400),  # an integer that no float holds
])
def test_impossible_value(refused, key, value):
    message = refused("", f"{key}={value}")
    assert f"{key} is " in message and "it must be " in message


@pytest.mark.parametrize("key, value", [("P_std", 0), ("sigma_min", 0), ("sigma_max", ".inf"), ("rho", -7),
                                        ("sigma_data", 0), ("P_mean", ".nan")])
def test_impossible_value_of_edm(refused, key, value):
    assert f"model.{key} is " in refused(f"model_name: EDM\nmodel: {{{key}: {value}}}")


@pytest.mark.parametrize("key, value, near", [("model_name", "DDMP", "DDPM"), ("dtype", "bf61", "bf16"),
                                              ("dataset.name", "AFHQv2", "AFHQ"),
                                              ("train_cfg.lr_schedule", "cosin", "cosine")])
def test_a_choice_has_a_suggestion(refused, key, value, near):
    assert f"did you mean {near}?" in refused("", f"{key}={value}")


@pytest.mark.parametrize("section", ["dataset", "loader", "model", "train_cfg", "sample_cfg"])
@pytest.mark.parametrize("value", ["3", "[1]", "null", "text"])
def test_a_section_is_no_value(refused, section, value):
    assert f"{section} is a section" in refused(f"{section}: {value}")


# ---- values that cannot be together

@pytest.mark.parametrize("text, keys", [
    ("sample_cfg: {guidance_scale: 2}", ("sample_cfg.guidance_scale", "2", "model.label_dropout")),
    ("model: {use_vae: true}", ("model.use_vae", "model.vae_encoder_weights")),
    ("model: {use_vae: true, vae_encoder_weights: e.pth}", ("model.use_vae", "model.vae_decoder_weights")),
    ("model_name: EDM\nmodel: {sigma_min: 3, sigma_max: 3}", ("model.sigma_min is 3", "model.sigma_max")),
    ("model_name: EDM\nmodel: {sigma_min: 100}", ("model.sigma_min is 100", "80")),
    ("model: {img_shape: [3, 28, 28]}", ("model.img_shape is [3, 28, 28]", "MNIST", "[1, 28, 28]")),
    ("model: {img_shape: [1, 32, 32]}", ("model.img_shape is [1, 32, 32]", "dataset.img_size")),
    ("dataset: {img_size: 64}\nmodel: {img_shape: [1, 28, 28]}", ("model.img_shape", "[1, 64, 64]")),
])
def test_impossible_together(refused, text, keys):
    message = refused(text)
    assert all(key in message for key in keys), message


def test_possible_together(load):
    load("sample_cfg: {guidance_scale: 2}\nmodel: {label_dropout: 0.1}")
    load("dataset: {img_size: 32}\nmodel: {img_shape: [1, 32, 32]}")
    load("model: {use_vae: true, vae_encoder_weights: e.pth, vae_decoder_weights: d.pth}")


# ---- files

@pytest.mark.parametrize("name, near", [("mnst.yaml", "configs/mnist.yaml"),
                                        ("./configs/afqh.yaml", "configs/afhq.yaml")])
def test_missing_file_has_a_suggestion(name, near):
    with pytest.raises(UsageError) as error:
        load_config(name)
    assert name in str(error.value) and f"did you mean {near}?" in str(error.value)


def test_missing_file_like_no_other(tmp_path):
    with pytest.raises(UsageError, match="no file .*0000$"):
        load_config(str(tmp_path / "0000"))


def test_a_folder_is_no_file(tmp_path):
    with pytest.raises(UsageError, match="no file"):
        load_config(str(tmp_path))


def test_looked_up_in_configs(tmp_path, monkeypatch):
    """A checkout without symbolic links has no code/configs, an unpacked submission has nothing else."""
    monkeypatch.chdir(tmp_path)
    assert load_config("./configs/mnist.yaml") == load_config(MNIST)
    monkeypatch.setattr("libs.config.CODE", str(tmp_path / "code"))
    (tmp_path / "code" / "configs").mkdir(parents=True)
    (tmp_path / "code" / "configs" / "mine.yaml").write_text("seed: 7")
    assert load_config("configs/mine.yaml")["seed"] == 7
    with pytest.raises(UsageError, match=r"did you mean configs/mine.yaml\?"):
        load_config("configs/min.yaml")


@pytest.mark.parametrize("text", [
    "model: {dim: 8", "\tseed: 1", "seed: 1\n  dim: 2", "a: b: c", "seed: [1, 2", "x: \x07",
    "seed: !!python/object:os.system {}", "seed: !!int three",
    "output_folder: 2024-13-45",  # a date to YAML, but none of this calendar
])
def test_broken_yaml(refused, text):
    message = refused(text)
    assert "test.yaml is no YAML" in message


def test_broken_value_of_set(refused):
    assert "output_folder" in refused("", "output_folder=2024-13-45")


def test_not_utf8(tmp_path):
    path = tmp_path / "latin.yaml"
    path.write_bytes(b"output_folder: \xe9t\xe9")
    with pytest.raises(UsageError, match="latin.yaml is no YAML"):
        load_config(str(path))


@pytest.mark.parametrize("text, kind", [("- 1\n- 2", "list"), ("hello", "str"), ("3", "int")])
def test_no_key_value_lines(refused, text, kind):
    assert f"`key: value` lines, not {kind}" in refused(text)


# ---- paths

def test_relative_paths_start_at_code_wherever_we_are(load, tmp_path, monkeypatch):
    text = ("output_folder: runs\ndataset: {data_folder: ../x/../y}\n"
            "model: {use_vae: true, vae_encoder_weights: ./e.pth, vae_decoder_weights: ../d.pth}")
    here = load(text)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert load(text) == here
    assert here["output_folder"] == os.path.join(CODE, "runs")
    assert here["dataset"]["data_folder"] == os.path.join(str(ROOT), "y")
    assert here["model"]["vae_encoder_weights"] == os.path.join(CODE, "e.pth")
    assert here["model"]["vae_decoder_weights"] == os.path.join(str(ROOT), "d.pth")


def test_absolute_and_home_paths(load, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    config = load("output_folder: ~/runs\ndataset: {data_folder: /data/mnist}")
    assert config["output_folder"] == str(tmp_path / "runs") and config["dataset"]["data_folder"] == "/data/mnist"


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.name)
def test_portable_and_back(path):
    config = load_config(str(path))
    before = copy.deepcopy(config)
    moved = portable(config)
    assert config == before  # a copy
    assert moved["output_folder"] == "../logs" and moved["dataset"]["data_folder"].startswith("../")
    assert str(ROOT) not in repr(moved)
    assert complete_config(copy.deepcopy(moved)) == config
    assert portable(complete_config(copy.deepcopy(moved))) == moved


@pytest.mark.parametrize("name", MODEL_OPTIONS)
def test_portable_and_back_of_each_kind(load, name):
    config = load(f"model_name: {name}\noutput_folder: /elsewhere/runs\ndataset: {{name: ImageFolder}}")
    config["model"]["num_classes"] = 7  # as train.py fills in what the folder holds
    assert complete_config(portable(config)) == config


def test_cosine_schedule_with_eps_is_refused():
    """abar ends at 2e-9: DDIM's first step would turn an error in eps into one 20,000 times as large."""
    with pytest.raises(UsageError, match="model.prediction is 'eps'"):
        load_config(MNIST, ["model.beta_schedule=cosine"])
    for prediction in ("v", "x0"):
        load_config(MNIST, ["model.beta_schedule=cosine", f"model.prediction={prediction}"])
