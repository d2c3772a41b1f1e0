"""Configuration: what a YAML file and --set may say, and the one line that answers what they may not."""

import copy
import os
from pathlib import Path

import pytest

from helpers import one_line
from libs import UsageError, build_model, load_config
from libs.config import CODE, MODEL_SETTINGS, RULES, SAMPLER_FLAGS, SETTINGS, check_value, complete_config, portable
from libs.datasets import KNOWN
from libs.ddpm import PREDICTIONS, SCHEDULES
from libs.evaluation import EXTRACTORS
from libs.models import DEFAULT_SAMPLER, MODELS, SAMPLERS, config_of
from libs.samplers import SOLVERS

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
    """refused(yaml text, *overrides): the message of the UsageError."""
    def refused(text="", *overrides):
        with pytest.raises(UsageError) as error:
            load(text, *overrides)
        return one_line(error)
    return refused


# ---- defaults, and the files that ship

def test_defaults_are_the_handouts():
    config = load_config(MNIST)
    expected = {
        "dataset": {"name": "MNIST", "split": "train", "data_folder": str(ROOT / "data")},
        "loader": {"batch_size": 64},
        "model": {"img_shape": [1, 28, 28], "num_classes": 10, "timesteps": 1000, "dim": 64, "context_dim": 64,
                  "dim_mults": [1, 2, 4], "attn_levels": [0, 1], "use_vae": False, "label_dropout": 0,
                  "beta_schedule": None, "prediction": "eps"},
        "train_cfg": {"lr": 2e-4, "epochs": 30, "num_eval_samples": 10, "warmup": 0, "optimizer": "adamw"},
        "sample_cfg": {"sampler": None, "guidance_scale": 1.0},
    }
    for section, values in expected.items():
        assert values.items() <= config[section].items()
    assert (config["model_name"], config["output_folder"]) == ("DDPM", str(ROOT / "logs"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.name)
def test_a_shipped_config_can_be_stored_without_machine_paths(path):
    config = load_config(str(path))
    before = copy.deepcopy(config)
    moved = portable(config)
    assert config == before and moved["output_folder"] == "../logs" and str(ROOT) not in repr(moved)
    assert complete_config(moved) == config


def test_afhq_is_the_handouts_run():
    config = load_config(str(ROOT / "configs" / "afhq.yaml"))
    assert config["model"]["img_shape"] == [3, 128, 128] and config["model"]["use_vae"]
    assert config["train_cfg"]["epochs"] == 300


def test_a_config_of_the_course_is_accepted(load):
    config = load("""
        devices: ['cuda:0', 'cuda:1']
        dtype: fp32
        model_name: DDPM
        output_folder: ./logs
        dataset: {name: AFHQ, split: train, data_folder: ../data/afhq/train}
        loader: {batch_size: 32, num_workers: 4}
        model: {img_shape: [3, 128, 128], timesteps: 1000, num_classes: 3, dim: 96, context_dim: 128,
                dim_mults: [1, 2, 4], attn_levels: [0, 1], use_vae: true, vae_encoder_weights: ../e.pth,
                vae_decoder_weights: ../d.pth}
        train_cfg: {lr: 2e-4, epochs: 100, num_eval_samples: 4}""")
    assert config["model"]["dim"] == 96 and config["train_cfg"]["lr"] == 2e-4


# ---- the table of settings

def test_defaults_pass_their_own_rules_and_loading_leaves_them_alone(load):
    before = copy.deepcopy([SETTINGS, MODEL_SETTINGS], {id(f): f for _, f in RULES.values()})
    for table in (SETTINGS, *MODEL_SETTINGS.values()):
        for key, (default, _) in table.items():
            assert check_value(key, default) == default
    load("model: {dim_mults: [1, 2], timesteps: 10}", "train_cfg.betas=[0.5, 0.9]", "model_name=EDM")
    assert [SETTINGS, MODEL_SETTINGS] == before
    assert load("") == load("# nothing") == load_config(MNIST)


@pytest.mark.parametrize("key, table", [
    ("model_name", MODELS), ("sample_cfg.sampler", SAMPLERS), ("model.beta_schedule", SCHEDULES),
    ("model.prediction", PREDICTIONS), ("eval.features", EXTRACTORS), ("dataset.name", KNOWN)])
def test_choices_are_those_that_the_code_has(key, table):
    assert RULES[key][0].partition("one of ")[2].split(", ") == list(table)


def test_every_model_and_sampler_is_in_every_table():
    assert MODELS.keys() == DEFAULT_SAMPLER.keys() == MODEL_SETTINGS.keys()
    assert SOLVERS.keys() == SAMPLERS.keys() - {"ddpm", "ddim"} and set(DEFAULT_SAMPLER.values()) <= SAMPLERS.keys()
    settings = {key.removeprefix("sample_cfg.") for key in SETTINGS if key.startswith("sample_cfg.")}
    assert {*SAMPLER_FLAGS, "guide"} == settings


@pytest.mark.parametrize("name", MODELS)
def test_a_model_takes_the_settings_of_its_kind_and_no_others(load, name):
    model = load(f"model_name: {name}\nmodel: {{dim: 8, dim_mults: [1], attn_levels: []}}")["model"]
    own = {key.removeprefix("model.") for key in SETTINGS | MODEL_SETTINGS[name] if key.startswith("model.")}
    assert model.keys() == own
    build_model(complete_config({"model_name": name, "model": model}))


@pytest.mark.parametrize("name, size, shape, classes", [
    ("FashionMNIST", "null", [1, 28, 28], 10), ("CIFAR10", 64, [3, 64, 64], 10), ("ImageFolder", "null", [3, 128, 128], None)])
def test_shape_and_classes_come_from_the_data_set(load, name, size, shape, classes):
    model = load(f"dataset: {{name: {name}, img_size: {size}}}")["model"]
    assert (model["img_shape"], model["num_classes"]) == (shape, classes)


def test_a_path_that_no_file_can_have(refused):
    assert "output_folder is '" in refused('output_folder: "a\\ud83d"')


def test_settings_of_earlier_versions(load, refused):
    """A checkpoint may hold a setting that is gone, where it said nothing."""
    assert load("model: {scale_betas: false, min_snr_gamma: null}\nsample_cfg: {S_min: null}") == load("")
    assert "unknown key model.scale_betas" in refused("model: {scale_betas: true}")


# ---- --set

@pytest.mark.parametrize("override, key, value", [
    ("train_cfg.lr=2e-4", "lr", 2e-4),  # text to YAML, a number here
    ("train_cfg.epochs=5", "epochs", 5),
    ("train_cfg.clip_grad_norm=null", "clip_grad_norm", None),
    ("train_cfg.clip_grad_norm=", "clip_grad_norm", None),
    ("train_cfg.betas=[0.8, 0.9]", "betas", [0.8, 0.9]),
    ("train_cfg={epochs: 3}", "epochs", 3),
])
def test_set(load, override, key, value):
    found = load("train_cfg: {lr: 0.1, epochs: 7}", override)["train_cfg"]
    assert found[key] == value and type(found[key]) is type(value)
    assert found["warmup"] == 0  # beside it, nothing changes


def test_set_beats_the_file_and_the_last_one_wins(load):
    assert load("seed: 1", "seed=2", "seed=3")["seed"] == 3
    assert load("", "dataset.data_folder=/a=b")["dataset"]["data_folder"] == "/a=b"


@pytest.mark.parametrize("override, named", [
    ("train_cfg.epochs", "'train_cfg.epochs'"), ("=5", "'=5'"), ("train_cfg.epochs=[1", "train_cfg.epochs"),
    ("output_folder=2024-13-45", "output_folder"),  # a date to YAML, but none of this calendar
    ("model=3", "model is a section"), ("train_cfg.epoch=3", "train_cfg.epochs"), ("seed.x=3", "seed"),
])
def test_set_refuses(refused, override, named):
    assert named in refused("seed: 1", override)


# ---- keys and values that are refused

@pytest.mark.parametrize("text, key, hint", [
    ("trian_cfg: {lr: 1}", "trian_cfg", "did you mean train_cfg?"),
    ("loader: {batchsize: 1}", "loader.batchsize", "did you mean loader.batch_size?"),
    ("batch_size: 8", "batch_size", "did you mean loader.batch_size?"),  # right key, wrong level
    ("xyzzy: 1", "xyzzy", "there are devices"),
    ("1: 2", "1", "there are devices"),
    ("model: {sigma_min: 0.1}", "model.sigma_min", "belongs to model_name EDM"),
    ("model_name: EDM\nmodel: {prediction: v}", "model.prediction", "belongs to model_name DDPM"),
])
def test_unknown_key(refused, text, key, hint):
    message = refused(text)
    assert f"unknown key {key}" in message and hint in message


# for each kind of rule: another type, and each bound
@pytest.mark.parametrize("key, value", [
    ("train_cfg.epochs", "true"), ("train_cfg.epochs", "2.5"), ("train_cfg.epochs", "'3'"), ("train_cfg.epochs", "0"),
    ("seed", "-1"), ("seed", "4294967296"),
    ("train_cfg.lr", "true"), ("train_cfg.lr", "fast"), ("train_cfg.lr", "[1]"), ("train_cfg.lr", "null"),
    ("train_cfg.lr", "0"), ("train_cfg.lr", ".nan"), ("train_cfg.lr", ".inf"), ("train_cfg.lr", "1" + "0" * 400),
    ("train_cfg.weight_decay", "-0.1"), ("model.label_dropout", "1.5"), ("train_cfg.clip_grad_norm", "0"),
    ("model.use_vae", "1"), ("output_folder", "3"), ("output_folder", "''"), ("output_folder", "null"),
    ("train_cfg.betas", "[0.9]"), ("train_cfg.betas", "[0.9, true]"), ("model.dim_mults", "2"),
    ("model.dim_mults", "[]"), ("model.img_shape", "[28, 28]"), ("devices", "[gpu]"), ("devices", "cuda:0"),
    ("model_name", "[EDM]"), ("sample_cfg.guidance_interval", "[1]"), ("sample_cfg.spacing", "true"),
    ("dtype", "fp64"), ("train_cfg.lr_schedule", "linear"), ("dataset.name", "EMNIST"),
])
def test_impossible_value(refused, key, value):
    message = refused("", f"{key}={value}")
    assert f"{key} is " in message and "it must be " in message


def test_a_choice_has_a_suggestion(refused):
    assert "did you mean DDPM?" in refused("", "model_name=DDMP")
    assert "did you mean heun?" in refused("", "sample_cfg.sampler=huen")


@pytest.mark.parametrize("value", ["3", "[1]", "null", "text"])
def test_a_section_is_no_value(refused, value):
    assert "model is a section" in refused(f"model: {value}")


@pytest.mark.parametrize("text, words", [
    ("sample_cfg: {guidance_scale: 2}", ("sample_cfg.guidance_scale", "2", "model.label_dropout")),
    ("model: {use_vae: true}", ("model.use_vae", "model.vae_encoder_weights")),
    ("model: {use_vae: true, vae_encoder_weights: e.pth}", ("model.use_vae", "model.vae_decoder_weights")),
    ("model: {img_shape: [1, 32, 32]}", ("model.img_shape is [1, 32, 32]", "MNIST", "dataset.img_size")),
    ("model: {unet: {}}", ("Stable Diffusion", "txt2img.py")),
])
def test_impossible_together(refused, text, words):
    message = refused(text)
    assert all(word in message for word in words), message


# ---- files and paths

def test_a_missing_file_has_a_suggestion(tmp_path):
    for name, end in (("./configs/afqh.yaml", "did you mean configs/afhq.yaml?"), (str(tmp_path / "0000"), "0000"),
                      (str(tmp_path), str(tmp_path))):
        with pytest.raises(UsageError, match="no file") as error:
            load_config(name)
        assert name in one_line(error) and one_line(error).endswith(end)


def test_looked_up_in_configs(tmp_path, monkeypatch):
    """A checkout without symbolic links has no code/configs, an unpacked submission has nothing else."""
    monkeypatch.chdir(tmp_path)
    assert load_config("./configs/mnist.yaml") == load_config(MNIST)
    monkeypatch.setattr("libs.config.CODE", str(tmp_path / "code"))
    (tmp_path / "code" / "configs").mkdir(parents=True)
    (tmp_path / "code" / "configs" / "mine.yaml").write_text("seed: 7")
    assert load_config("configs/mine.yaml")["seed"] == 7


@pytest.mark.parametrize("text", ["model: {dim: 8", "a: b: c", "x: \x07", "seed: !!python/object:os.system {}",
                                  "seed: !!int three", "output_folder: 2024-13-45"])
def test_broken_yaml(refused, text):
    assert "test.yaml is no YAML" in refused(text)


def test_not_utf8(tmp_path):
    path = tmp_path / "latin.yaml"
    path.write_bytes(b"output_folder: \xe9t\xe9")
    with pytest.raises(UsageError, match="latin.yaml is no YAML"):
        load_config(str(path))


def test_no_key_value_lines(refused):
    assert "`key: value` lines, not list" in refused("- 1\n- 2") and "not str" in refused("hello")


def test_relative_paths_start_at_code_wherever_we_are(load, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    config = load("output_folder: ~/runs\ndataset: {data_folder: ../x/../y}\n"
                  "model: {use_vae: true, vae_encoder_weights: ./e.pth, vae_decoder_weights: /d.pth}")
    assert config["output_folder"] == str(tmp_path / "runs") and config["dataset"]["data_folder"] == str(ROOT / "y")
    assert config["model"]["vae_encoder_weights"] == os.path.join(CODE, "e.pth")
    assert config["model"]["vae_decoder_weights"] == "/d.pth"


def test_checkpoints_of_versions_that_measured_samples_in_training():
    old = {"eval": {"every": 5, "num": 200, "features": "classifier"}}
    assert config_of({"config": old}, "x.pth.tar")["eval"] == {"features": "classifier"}
    assert old["eval"]["every"] == 5
    with pytest.raises(UsageError, match="unknown key eval.every"):
        complete_config(old)
