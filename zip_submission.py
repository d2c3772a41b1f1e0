#!/usr/bin/env python3
"""Pack code/, writeup/ and results/ into one zip, and refuse what the course does not accept."""

import argparse
import ast
import json
import os
import re
import sys
import unicodedata
import warnings
import zipfile
from fnmatch import fnmatchcase
from pathlib import Path

ROOT = Path(__file__).resolve().parent
FOLDERS = ("code", "writeup", "results")
TOP_FILES = ("README.md", "requirements.txt")
SHIPPED_MODEL = ROOT / "pretrained/mnist_cpu.pth.tar"
LIMIT = 50e6  # bytes
PLACEHOLDER = "to be filled in"
YOURS = ("yours to write: UNet.forward (code/libs/unet.py); q_sample, p_sample, p_sample_loop, compute_loss "
         "(code/libs/ddpm.py); the runs, and what the report says of them")

LEFT_OUT_FOLDERS = {"data", "logs", "models", "checkpoints"}
LEFT_OUT_FILES = {
    "weights or data; --model puts a model in": (
        "*.pth.tar", "*.pth", "*.pt", "*.ckpt", "*.safetensors", "*.bin", "*.onnx", "*.h5", "*.hdf5", "*.pkl",
        "*.pickle", "*.joblib", "*.msgpack", "*.tflite", "*.gguf"),
    "archive": ("*.zip", "*.tar", "*.tar.*", "*.tgz", "*.7z", "*.rar"),
    "by its name a secret": (
        "id_rsa*", "id_dsa*", "id_ecdsa*", "id_ed25519*", "*.pem", "*.key", "*.env", "secrets.*", "credentials*.json",
        "*.p12", "*.pfx", "kubeconfig*", "*netrc"),
    "training log": ("*.tfevents.*",),
}
ARRAYS, ARRAY_LIMIT = (".npz", ".npy"), 1e6  # small ones are results, large ones are data

# An absolute path: /name/, ~/ or C:\, but not what is the same on every Linux machine.
SYSTEM = r"(?!/(?:dev|proc|sys)/)"
IN_PYTHON = re.compile(rf"(?:file://)?(?:{SYSTEM}/[\w.-]+/|~\w*/|[A-Za-z]:[\\/])")
# In other text it starts a value; "https://...", "a/b" and "$HOME/x" have something else before the slash.
IN_TEXT = re.compile(rf"(?:^|[\s=:,\[({{<>|])['\"]?((?:file://)?(?:{SYSTEM}/\w|~\w*/|\b[A-Za-z]:[\\/])[^\s'\",\])}}]*)")
TEXT_SUFFIXES = {".yaml", ".yml", ".json", ".toml", ".sh", ".cfg", ".ini", ".ipynb"}
RESERVED = re.compile(r"(con|prn|aux|nul|com[1-9]|lpt[1-9])(\..*)?", re.I)


class Refused(Exception):
    """One or more reasons, one line each."""


def python_paths(source):
    """(line, string) for every string literal that starts like an absolute path."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tree = ast.parse(source)
    tails = set()  # what follows something else: the "/b/c" of a + "/b/c" and of f"{a}/b/c"
    for node in ast.walk(tree):
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
            tails.add(node.right)
        elif isinstance(node, ast.JoinedStr):
            tails.update(node.values[1:])
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, (str, bytes)) and node not in tails:
            text = node.value if isinstance(node.value, str) else node.value.decode("latin-1")
            if IN_PYTHON.match(text.lstrip()):
                yield node.lineno, text


def text_paths(source, suffix):
    if suffix == ".ipynb":  # JSON, with lists of lines; a line is counted in the cells of code alone
        cells = (cell["source"] for cell in json.loads(source)["cells"] if cell["cell_type"] == "code")
        source = "\n".join("".join(cell) for cell in cells)
    for number, line in enumerate(source.splitlines(), 1):
        if suffix != ".json":
            line = re.sub(r"(^|\s)#.*", "", line)  # comments, and with them the shebang line
        if suffix == ".sh":
            line = re.sub(r"\b(?:sed|awk|grep)\b.*?(['\"]).*?\1", "", line)  # their /patterns/
        for match in IN_TEXT.finditer(line):
            yield number, match[1]


def absolute_paths(path):
    """One line for each absolute path in a file of code/."""
    suffix, name = path.suffix.lower(), path.relative_to(ROOT).as_posix()
    try:
        if suffix == ".py":
            found = list(python_paths(path.read_bytes()))
        elif suffix in TEXT_SUFFIXES:
            found = list(text_paths(path.read_text("utf-8"), suffix))
        else:
            return []
    except (SyntaxError, ValueError, TypeError, LookupError, RecursionError) as error:
        line = getattr(error, "lineno", None) or 1
        return [f"{name}:{line}: cannot be read ({getattr(error, 'msg', error)}): mend it first"]
    return [f"{name}:{line}: absolute path {text!r}: use one relative to code/" for line, text in found]


def why_left_out(path):
    """The reason why a file or folder is not packed, or None."""
    target = path.resolve() if path.exists() else path  # what a link leads to
    if not target.is_relative_to(ROOT):
        return "link out of the project"
    if any(part.startswith(".") for part in (path.name, *target.relative_to(ROOT).parts)):
        return "hidden"
    name = target.name.lower()
    if path.is_dir():
        if name == "__pycache__":
            return "cache"
        # a folder of Python modules may be called data or models
        if name in LEFT_OUT_FOLDERS and not any(path.glob("*.py")):
            return "the course wants no data, logs or models"
        return "link to a folder" if path.is_symlink() else None
    if not path.is_file():
        return "no regular file" if path.exists() else "dead link"
    for why, patterns in LEFT_OUT_FILES.items():
        if any(fnmatchcase(each, pattern) for pattern in patterns for each in (name, path.name.lower())):
            return why
    if name.endswith(ARRAYS) and path.stat().st_size > ARRAY_LIMIT:
        return "array over 1 MB"
    return None


def collect(paths, prefix, files, left_out):
    """Add files, and what folders hold, to files, {name in the zip: path}, or to left_out, [(path, reason)]."""
    for path in sorted(paths):
        name = prefix + path.name
        if name == "code/configs" and (path.is_symlink() or path.is_file()):
            continue  # the link to ../configs, or the text file in its place on Windows
        why = why_left_out(path)
        if why:
            left_out.append((path, why))
        elif path.is_dir():
            collect(path.iterdir(), name + "/", files, left_out)
        else:
            files[name] = path


def gather():
    """(files, left_out) of the whole project, see collect."""
    files, left_out = {}, []
    sources = {name: ROOT / name for name in FOLDERS}
    if not (ROOT / "code/configs").is_dir() or (ROOT / "code/configs").is_symlink():
        sources["code/configs"] = ROOT / "configs"
    for name, folder in sources.items():
        if not folder.is_dir():
            raise Refused(f"{folder.name}/ is missing: the zip must hold it as {name}/")
        if not folder.resolve().is_relative_to(ROOT):
            raise Refused(f"{folder.name}/ is a link out of the project: put the folder itself there")
        collect(folder.iterdir(), name + "/", files, left_out)
    collect([ROOT / name for name in TOP_FILES if os.path.lexists(ROOT / name)], "", files, left_out)
    return files, left_out


def check(files):
    """Refuse a hand-in without a report, with an empty folder, a name or a path that other machines do not have."""
    pdfs = [path for name, path in files.items() if re.fullmatch(r"writeup/[^/]+\.pdf", name, re.I)]
    if not any(path.read_bytes().startswith(b"%PDF") for path in pdfs):
        raise Refused("writeup/*.pdf: no PDF there, the report must be one")
    wrong, seen = [], {}
    for name in FOLDERS:
        if not any(each.startswith(name + "/") for each in files):
            wrong.append(f"{name}/ holds no file to hand in")
    for name, path in files.items():
        for part in name.split("/"):
            if re.search(r'[<>:"|?*\\\x00-\x1f]|[. ]$', part) or RESERVED.fullmatch(part):
                wrong.append(f"{name!r}: the name {part!r} is not allowed on Windows: rename it")
        twin = seen.setdefault(unicodedata.normalize("NFC", name).casefold(), name)
        if twin != name:
            wrong.append(f"{name!r} and {twin!r} are one file on Windows and macOS: rename one")
        if name.startswith("code/"):
            wrong += absolute_paths(path)
    if wrong:
        raise Refused(*wrong)


def write(files, output):
    """Write the zip, whole or not at all; returns its size in bytes."""
    temporary = output.with_name(f".{output.name}.{os.getpid()}")
    try:
        with zipfile.ZipFile(temporary, "x", zipfile.ZIP_DEFLATED, strict_timestamps=False) as archive:
            for name, path in sorted(files.items()):
                archive.write(path, name)
        size = temporary.stat().st_size
        if size > LIMIT:
            largest = max(archive.infolist(), key=lambda info: info.compress_size)
            raise Refused(f"{output.name} would have {size / 1e6:.1f} MB, over {LIMIT / 1e6:.0f} MB; the largest "
                          f"file is {largest.filename} ({largest.compress_size / 1e6:.1f} MB): leave something out")
        os.replace(temporary, output)
    finally:
        temporary.unlink(missing_ok=True)
    return size


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, metavar="PATH", default=SHIPPED_MODEL if SHIPPED_MODEL.is_file() else None,
                        help="the trained model to pack, as results/model/NAME (default: pretrained/mnist_cpu.pth.tar)")
    parser.add_argument("--output", type=Path, metavar="PATH", default=ROOT / "submission.zip",
                        help="default: submission.zip beside this script")
    parser.add_argument("--overwrite", action="store_true", help="replace the zip if it is there")
    args = parser.parse_args()

    if args.output.is_dir() or not args.output.parent.is_dir():
        raise Refused(f"--output {args.output}: must be a file in a folder that exists")
    if args.output.suffix.lower() != ".zip" or args.model and args.model.resolve() == args.output.resolve():
        raise Refused(f"--output {args.output}: must end in .zip, and not be the model")
    if args.output.exists() and not args.overwrite:
        raise Refused(f"{args.output} is there already: --overwrite replaces it")
    files, left_out = gather()
    if args.model:
        if not args.model.is_file():
            raise Refused(f"--model {args.model}: no such file")
        files[f"results/model/{args.model.name}"] = args.model
        left_out = [(path, why) for path, why in left_out if path.resolve() != args.model.resolve()]
    check(files)
    size = write(files, args.output)

    sys.stdout.reconfigure(errors="backslashreplace")  # a terminal may lack letters that a file name has
    for path, why in left_out:
        print(f"left out  {path.relative_to(ROOT).as_posix()} ({why})")
    for name, path in sorted(files.items()):
        if path.is_symlink():
            print(f"followed  {name} -> {path.resolve()}")
    for top in (*FOLDERS, *TOP_FILES):
        sizes = [path.stat().st_size for name, path in files.items() if name.split("/")[0] == top]
        if sizes:
            print(f"packed    {top}: {len(sizes)} file(s), {sum(sizes) / 1e6:.2f} MB")
    for name, path in sorted(files.items()):
        if path.suffix == ".tex" and PLACEHOLDER in path.read_text(encoding="utf-8", errors="replace"):
            print(f"warning: {name} still says {PLACEHOLDER!r}: your names and contributions")
    if args.model and args.model.resolve() == SHIPPED_MODEL.resolve():
        print("warning: the model is the one that ships; --model logs/RUN/model_final.pth.tar packs yours")
    print(YOURS)
    print(f"wrote {args.output}: {len(files)} files, {size / 1e6:.2f} MB")


if __name__ == "__main__":
    try:
        main()
    except Refused as refused:
        for reason in refused.args:
            print(f"zip_submission.py: error: {reason}", file=sys.stderr)
        sys.exit(2)
    except OSError as error:
        sys.exit(f"zip_submission.py: error: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
