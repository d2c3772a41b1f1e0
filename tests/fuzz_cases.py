"""What fuzz.py attacks with: valid commands and the files they need, and `Case`, which makes one of them hostile."""

import io
import json
import os
import random
import re
import shutil
import stat

import numpy as np
import torch
import yaml
from PIL import Image

from hostile import (BOMBS, DEVICES, KEYS, TEXTS, WORDS, YAML, YAML_LINES, arrays, damage, mutate_json, mutate_state,
                     number, picture, word)
from scripts import PROJECT, command

KINDS = {"config": 25, "checkpoint": 25, "weights": 6, "npz": 10, "image": 14, "command": 16, "file": 4}

# valid commands, before they are mutated; RUN is a trained run, RUN2 another one
TRAIN = ["train.py tiny.yaml --output a", "train.py tiny.yaml --dry-run", "train.py edm.yaml --output a -p 1",
         "train.py latent.yaml --output a"]
RESUME = ["train.py --resume RUN --set train_cfg.epochs=2", "train.py tiny.yaml --resume RUN --dry-run",
          "train.py --resume RUN/epoch_000.pth.tar --set train_cfg.epochs=2"]
DRAW = ["sample.py RUN --num 2", "sample.py RUN --num 2 --output s.npz --steps 3",
        "sample.py RUN/epoch_000.pth.tar --num 1 --output new/ --sampler heun --steps 2",
        "sample.py RUN --labels 1,0 --num 3 --sampler dpmpp_2m --eta 0.5",
        "export.py RUN e.pth.tar --half", "export.py RUN/epoch_000.pth.tar e.pth.tar"]
JUDGE = ["evaluate.py RUN --num 4 --no-memorization --steps 2", "compare.py samplers RUN heun:2 --num 4",
         "compare.py samplers RUN heun:2 --num 4 --output samplers.json",
         "compare.py runs RUN RUN2 --num 4 --sampler DDPM=heun:2"]
NPZ = "evaluate.py good.npz --config latent.yaml --num 4 --no-memorization"
FOLDER = "evaluate.py split/test --config latent.yaml --num 4 --no-memorization"
PLOT = ["plot_results.py RUN --output figures", "plot_results.py samplers.json --output figures"]
CODER = ["train_autoencoder.py autoencoder.yaml --dry-run",
         "train_autoencoder.py autoencoder.yaml --evaluate encoder.pth decoder.pth"]
DIFFUSION = ["txt2img.py sd.yaml --ckpt sd.safetensors --prompt cat",
             "txt2img.py sd.yaml --ckpt sd.ckpt --prompts prompts.txt"]
OTHERS = ["benchmark.py no.yaml --rounds 1", "train_classifier.py --data-folder images --limit 10 --output c.pth"]

BASIC = "--num --seed --batch-size --device --output"
SAMPLING = "--sampler --steps --guidance-scale --guidance-interval --clip --no-clip --eta --spacing --S-churn --guide"
FLAGS = {"train.py": "-p -c --output --resume --set --dry-run",
         "train_autoencoder.py": "-p -c --output --resume --set --dry-run --evaluate",
         "sample.py": f"--config --labels {BASIC} {SAMPLING}",
         "evaluate.py": f"--config --features --data-folder {BASIC} {SAMPLING}",
         "compare.py": f"--seeds --sampler {BASIC}", "export.py": "--half --set",
         "plot_results.py": "--output --epochs --columns",
         "txt2img.py": "--ckpt --prompt --prompts --negative-prompt --vae --weights --sampler --steps "
                       f"--guidance-scale --height --width --dtype {BASIC}",
         "benchmark.py": "--compare --profile --rounds --seconds --set --json --one",
         "train_classifier.py": "--data-folder --output --epochs --seed --limit --bf16"}


def prepare(base):
    """Make base/template/case, which cases copy. Paths in its configs lead to the same files in every copy."""
    place = os.path.join(base, "template", "case")
    for name, size in (("images", 36), ("split/train", 32), ("split/test", 32)):
        for k, ending in enumerate(["png", "jpg", "gif", "bmp"] if name == "images" else ["png"] * 8):
            os.makedirs(f"{place}/{name}/{['cat', 'dog'][k % 2]}", exist_ok=True)
            noise = np.random.default_rng([k, len(name)]).integers(0, 256, (size, size, 3), dtype=np.uint8)
            Image.fromarray(noise).save(f"{place}/{name}/{['cat', 'dog'][k % 2]}/{k}.{ending}")
    os.makedirs(f"{base}/home")
    for half in ("encoder", "decoder"):
        shutil.copyfile(f"{PROJECT}/pretrained/afhq_{half}.pth", f"{place}/{half}.pth")
    vae = {f"vae_{half}_weights": f"../case/{half}.pth" for half in ("encoder", "decoder")}
    common = {"devices": ["cpu"], "output_folder": "../case/runs"}
    data = {"name": "ImageFolder", "data_folder": "../case/images", "img_size": 16}
    split = data | {"data_folder": "../case/split", "img_size": 32}
    small = {"dim": 8, "context_dim": 8, "dim_mults": [1], "attn_levels": [], "timesteps": 10}
    tiny = common | {"dataset": data, "loader": {"batch_size": 2}, "eval": {"features": "autoencoder"},
                     "model": small | {"beta_schedule": "cosine", "prediction": "v"},  # noise at the end of ten steps
                     "train_cfg": {"epochs": 1, "num_eval_samples": 1}, "sample_cfg": {"steps": 2}}
    unet = {"dim": 32, "context_dim": 32, "dim_mults": [1, 2], "attn_levels": [0], "num_res_blocks": 1, "num_heads": 2}
    parts = {"unet": unet, "autoencoder": {"dim": 32}, "text_encoder": {"width": 32, "layers": 1, "heads": 2}}
    configs = {"tiny": tiny, "edm": tiny | {"model_name": "EDM", "model": small},
               "latent": tiny | {"dataset": split, "model": tiny["model"] | {"use_vae": True} | vae},
               "autoencoder": common | {"dataset": split, "model": vae, "train_cfg": {"epochs": 1}},
               "sd": {"devices": ["cpu"], "model": parts, "sample_cfg": {"steps": 2, "height": 64, "width": 64}}}
    for name, config in configs.items():
        with open(f"{place}/{name}.yaml", "w") as f:
            yaml.safe_dump(config, f, sort_keys=False)
    with open(f"{place}/prompts.txt", "w") as f:
        f.write("a cat\na dog\n")
    for line in ["train.py tiny.yaml --output a", "train.py edm.yaml --output a", "train.py latent.yaml --output a",
                 "train.py latent.yaml --output b", "sample.py runs/latent_a --num 2 --output good.npz",
                 "compare.py samplers runs/latent_a heun:2 euler:2 --num 4",
                 f"{PROJECT}/tests/random_sd_checkpoint.py sd.safetensors --config sd.yaml",
                 f"{PROJECT}/tests/random_sd_checkpoint.py sd.ckpt --config sd.yaml"]:
        done = command(*line.split(), cwd=place, environment=environment(base, "template"), seconds=120)
        if done.status:
            raise RuntimeError(f"{line}: {done.err}")


def environment(base, outer):
    """No network, nothing of the user's home; the project's own folders are those in base/outer."""
    home = {key: f"{base}/home" for key in ("HOME", "TORCH_HOME", "MPLCONFIGDIR")}
    return {"http_proxy": "http://127.0.0.1:9", "https_proxy": "http://127.0.0.1:9", **home,
            "CODE": f"{base}/{outer}/code", "CACHE": f"{base}/{outer}/cache"}


def device(path, name):
    """A device. Root gets one of its own in place of a link: with root's rights a script can replace /dev/null."""
    if os.getuid():
        os.symlink(f"/dev/{name}", path)
    else:
        os.mknod(path, 0o666 | stat.S_IFCHR, os.makedev(1, DEVICES[name]))


def snapshot(*folders):
    """path -> size, time of change and mode, of every file."""
    found = [os.path.join(a, f) for folder in folders for a, _, files in os.walk(folder) for f in files
             if not a.endswith("__pycache__")]
    return {path: (s.st_size, s.st_mtime_ns, s.st_mode) for path in found for s in [os.lstat(path)]}


class Case:
    """Case k of a seed. `build` makes its folder, `line`, a script and its arguments, and `notes`, what is hostile."""

    def __init__(self, seed, k):
        self.rng, self.notes = random.Random(f"{seed} {k}"), []
        self.pick = self.rng.choice
        self.kind = self.rng.choices(list(KINDS), KINDS.values())[0]

    def build(self, base, folder):
        self.base, self.folder, self.template = base, folder, os.path.join(base, "template", "case")
        for name in ("images", "split"):
            shutil.copytree(f"{self.template}/{name}", self.path(name))
        for name in os.listdir(self.template):
            if name.endswith((".yaml", ".npz", ".json", ".txt")):
                shutil.copyfile(f"{self.template}/{name}", self.path(name))
            elif name.endswith((".pth", ".safetensors", ".ckpt")):
                os.symlink(f"{self.template}/{name}", self.path(name))
        for name in ("fifo", "folder", "loop", "nowhere", *DEVICES):
            self.special(name, name)
        self.write("empty", b"")
        self.notes.clear()
        getattr(self, self.kind)()

    def path(self, name):
        return os.path.join(self.folder, name)

    def read(self, name):
        with open(self.path(name), "rb") as f:
            return f.read()

    def write(self, name, data):
        if os.path.lexists(self.path(name)):
            os.remove(self.path(name))
        with open(self.path(name), "wb") as f:
            f.write(data)

    def chance(self, share):
        return self.rng.random() < share

    def times(self):
        return range(self.pick([1, 1, 1, 2, 2, 3]))

    def take(self, commands):
        """One of the commands; its run goes into the case's folder."""
        line = self.pick(commands)
        latent = line in JUDGE or self.kind == "weights"
        self.run = "latent" if latent else self.pick(["tiny", "tiny", "edm", "latent"])
        for name, run in (("RUN", f"{self.run}_a"), ("RUN2", "latent_b")):
            if name in line:
                shutil.copytree(f"{self.template}/runs/{run}", self.path(name.lower()))
        self.line = line.replace("RUN", "run").split()

    def special(self, name, what=None):
        """Something that is no plain file under this name."""
        path = self.path(name)
        if os.path.lexists(path):
            os.remove(path)
        what = what or self.pick(["fifo", "folder", "loop", "nowhere", "unreadable", *DEVICES])
        if what == "fifo":
            os.mkfifo(path)
        elif what == "folder":
            os.mkdir(path)
        elif what == "unreadable":
            os.close(os.open(path, os.O_CREAT, 0))
        elif what in DEVICES:
            device(path, what)
        else:
            os.symlink(os.path.basename(path) if what == "loop" else "no/such/file", path)
        self.notes.append(f"{name} is {what}")

    def bomb(self, name, kind):
        """A link to a small file that unpacks to gigabytes; made once, as that takes a while."""
        path = os.path.join(self.base, kind)
        if not os.path.exists(path):
            BOMBS[kind](f"{path}.{os.getpid()}")
            os.replace(f"{path}.{os.getpid()}", path)
        if os.path.lexists(self.path(name)):
            os.remove(self.path(name))
        os.symlink(path, self.path(name))
        self.notes.append(f"{name} is {kind}")

    def spoil(self, name):
        """Change the bytes of a file, or rarely what it is."""
        if self.chance(0.03):
            self.special(name)
        elif os.path.isfile(self.path(name)) and os.access(self.path(name), os.R_OK):
            self.write(name, damage(self.rng, self.read(name)))
            self.notes.append(f"bytes of {name}")

    def spoil_state(self, name, less=()):
        """Mutate a file of torch.save. less: keys that its reader does not look at."""
        how = self.rng.random()
        if how < 0.75:
            state = torch.load(io.BytesIO(self.read(name)), weights_only=True)
            data, said = mutate_state(self.rng, {k: v for k, v in state.items() if k not in less}, self.times())
            self.write(name, data)
            self.notes += said
        if how > 0.7:
            self.spoil(name)

    def setting(self):
        """(key, value in YAML) of a setting, the value mostly another one or wrong, the key sometimes."""
        with open(f"{self.template}/runs/{self.run}_a/config.txt") as f:
            config = yaml.safe_load(f)
        key, old = self.pick([pair for a, section in config.items() for pair in (
            [(f"{a}.{b}", x) for b, x in section.items()] if isinstance(section, dict) else [(a, section)])])
        if self.chance(0.1):
            key = self.pick([*KEYS, key + " ", key.upper(), key + "\n"])
        likely = self.pick([1, 2, 3, 8, 16, 0.5, 0.1, True, [0.1, 20], self.pick(WORDS)])
        if isinstance(old, (bool, str, list)):
            several = [self.pick([1, 2, 0.5]) for _ in self.times()]
            likely = {bool: not old, str: self.pick(WORDS), list: several}[type(old)]
        value = self.pick([likely, likely, number(self.rng), self.pick(WORDS), self.pick(YAML),
                           json.dumps(self.pick(TEXTS)), [number(self.rng) for _ in self.times()]])
        if key in ("train_cfg.epochs", "sample_cfg.steps") and self.line[0] == "train.py":
            self.line.append("--dry-run")  # many of them take long, and may
        return key, str(value)

    # ---- the kinds

    def config(self):
        self.take(TRAIN * 4 + RESUME + CODER + [NPZ, DIFFUSION[0]])
        name = next((x for x in self.line if x.endswith(".yaml")), None)
        for _ in self.times():
            key, value = self.setting()
            if self.line[0].startswith("train") and (not name or self.chance(0.5)):
                self.line += ["--set", f"{key}={value}"]
                self.notes.append(f"--set {key[:50]}={value[:50]}")
            elif name and self.chance(0.3):
                self.spoil(name)
            elif name and os.path.isfile(self.path(name)):
                text = self.read(name).decode(errors="replace")
                section, _, last = key.rpartition(".")
                if self.chance(0.8) and f"{section}:\n" in text:  # into its section, before or after its other value
                    text = re.sub(rf"\n  {re.escape(last)}: [^\n]*", "", text) if self.chance(0.8) else text
                    text = text.replace(f"{section}:\n", f"{section}:\n  {last}: {value}\n")
                else:
                    more = self.pick([f"{key}: {value}\n", f"{value}\n", *YAML_LINES])
                    text, value = (more + text if self.chance(0.5) else text + more), f"{value[:50]} {more[:50]}"
                self.write(name, text.encode(errors="surrogatepass"))
                self.notes.append(f"{name}: {key[:50]}: {value[:100]}")

    def checkpoint(self):
        self.take(RESUME * 3 + DRAW + JUDGE)
        name = "run/epoch_000.pth.tar"
        if "train.py" not in self.line and name not in self.line:
            name = "run/model_final.pth.tar"
        if self.chance(0.003):
            self.bomb(name, "bomb.pth.tar")
        else:
            self.spoil_state(name, () if "train.py" in self.line else ("optimizer", "scaler", "rng"))

    def weights(self):
        name = self.pick(["encoder.pth", "decoder.pth", "sd.safetensors", "sd.ckpt"])
        if name.endswith(".pth"):
            self.take([TRAIN[3], NPZ, *CODER, *DRAW[:2]])
            self.spoil_state(name)
        else:
            self.take([DIFFUSION[name == "sd.ckpt"]])
            if name == "sd.ckpt":
                self.spoil_state(name)
            elif self.chance(0.4):
                self.spoil(name)
            else:
                data = self.read(name)
                end = 8 + int.from_bytes(data[:8], "little")
                text, said = mutate_json(self.rng, data[8:end], self.times())
                self.write(name, len(text).to_bytes(8, "little") + text + data[end:])
                self.notes += said

    def npz(self):
        self.take([NPZ])
        if self.chance(0.01):
            self.bomb("good.npz", "bomb.npz")
        elif self.chance(0.4):
            for _ in self.times():
                self.spoil("good.npz")
        else:
            good = np.load(self.path("good.npz"))["arr_0"] if self.chance(0.3) else None
            data, said = arrays(self.rng, good)
            self.write("good.npz", data if self.chance(0.8) else damage(self.rng, data))
            self.notes.append(said)

    def image(self):
        self.take(TRAIN[:2] + TRAIN[3:] + CODER[1:] + [FOLDER] * 2)
        folder = "images" if "tiny.yaml" in self.line else self.pick(["split/train", "split/test", "split/test"])
        for _ in self.times():
            files = [os.path.relpath(path, self.folder) for path in sorted(snapshot(self.path(folder)))]
            how, (data, ending) = self.rng.random(), picture(self.rng)
            animal = f"{folder}/{self.pick(['cat', 'dog'])}"
            name = self.pick(["z"] * 5 + ["\n", "é", "\udcff", ".z", "-", " ", "%s", "a" * 240, "\x1b[31m"]) + ending
            try:
                if how < 0.35 and files:
                    self.spoil(self.pick(files))
                elif how < 0.7:
                    self.write(f"{animal}/{name}", data if self.chance(0.6) else damage(self.rng, data))
                    self.notes.append(f"{data[:4]!r} as {name[:20]!r}")
                elif how < 0.85:
                    self.special(f"{animal}/{name}")
                elif how < 0.86:
                    self.bomb(f"{animal}/{name}", "bomb.png")
                elif how < 0.93:
                    new = f"{self.pick([folder, folder, animal])}/{self.pick(['train', 'val', 'new', name])}"
                    os.mkdir(self.path(new))
                    self.notes.append(f"folder {new[:50]}")
                elif how < 0.97:
                    shutil.rmtree(self.path(animal))
                    self.notes.append(f"no {animal}")
                else:
                    os.chmod(self.path(animal), 0)
                    self.notes.append(f"{animal} cannot be read")
            except OSError as e:
                self.notes.append(f"({e.strerror})")

    def command(self):
        self.take(TRAIN[:3] + RESUME + DRAW * 2 + JUDGE + [NPZ, FOLDER] + PLOT + CODER + DIFFUSION * 2 + OTHERS)
        names = sorted(os.listdir(self.folder))
        for _ in self.times():
            how, at, new = self.rng.random(), self.rng.randrange(1, len(self.line)), word(self.rng, names)
            if how < 0.5:
                flag = self.pick([*FLAGS[self.line[0]].split(), "--overwrite"])
                new = "=".join(self.setting()) if flag == "--set" else new
                said = self.pick([[flag, new], [flag, new], [f"{flag}={new}"], [flag]])
                self.line += said
            elif how < 0.8:
                said = [self.line[at], "->", new]
                self.line[at] = new
            elif how < 0.9 and len(self.line) > 2:
                said = ["less", self.line.pop(at)]
            else:
                said = ["inserted", self.pick([new, self.line[at]])]
                self.line.insert(at, said[1])
            self.notes.append(" ".join(said)[:100])
        if self.line[0] == "benchmark.py":
            self.line.insert(1, "no.yaml")  # it must not come to its measurements
        if "epochs=" in str(self.line) and self.line[0] == "train.py":
            self.line.append("--dry-run")

    def file(self):
        """JSON of comparisons, config.txt, event files, prompts."""
        name = self.pick(["samplers.json"] * 2 + ["run/config.txt", "events", "prompts.txt", "run/sample-0.png"])
        self.take({"samplers.json": [PLOT[1], JUDGE[2]], "prompts.txt": DIFFUSION[1:]}.get(name, PLOT[:1] + RESUME[:1]))
        name = "run/logs/" + os.listdir(self.path("run/logs"))[0] if name == "events" else name
        if name == "samplers.json" and self.chance(0.6):
            text, said = mutate_json(self.rng, self.read(name), self.times())
            self.write(name, text)
            self.notes += said
        else:
            self.spoil(name)
        if name == "prompts.txt" and os.path.isfile(self.path(name)):  # a picture for each line
            self.write(name, b"\n".join(self.read(name).splitlines()[:9]))
