#!/bin/sh
# Fetch what configs/afhq.yaml needs: the AFHQ v2 images and the TAESD weights.
# Nothing gets its final name before it is checked: a broken run leaves at most a .part file.
set -eu
CDPATH= cd -- "$(dirname -- "$0")"

AFHQ_URL=${AFHQ_URL:-"https://www.dropbox.com/s/vkzjokiwof5h8w6/afhq_v2.zip?dl=1"}
AFHQ_TRAIN_COUNT=${AFHQ_TRAIN_COUNT:-14336}
AFHQ_TEST_COUNT=${AFHQ_TEST_COUNT:-1467}
TAESD_URL=${TAESD_URL:-"https://raw.githubusercontent.com/madebyollin/taesd/5cccb12dc72074a4be35680c3b108548a7c69978"}
# git blob ids of that commit: they pin the content, wherever TAESD_URL points
TAESD_ENCODER=65f85afc58480128926e52086fbf0fdc61c2c9b5
TAESD_DECODER=5915a429fc08eba4adf62bf74f96705b8b0d5c1f

usage() {
    cat <<'EOF'
usage: sh ./download_dataset.sh [afhq|taesd|all]

  afhq    AFHQ v2, about 6.5 GB, to data/afhq/{train,test}/{cat,dog,wild}
  taesd   the autoencoder's weights, about 10 MB, to pretrained/
  all     both (the default)

A download that broke off goes on where it stopped. Needs curl or wget, and Python 3.
Environment, for mirrors and tests: AFHQ_URL (the zip), AFHQ_TRAIN_COUNT and AFHQ_TEST_COUNT
(images it must hold), TAESD_URL (the folder with taesd_encoder.pth and taesd_decoder.pth).
EOF
}

say() { echo "download_dataset.sh: $*"; }
die() { say "error: $*" >&2; exit 1; }
usage_error() { say "error: $*" >&2; exit 2; }

# What sh cannot do: hashes and zip files. One call, one job: py JOB ARGUMENTS...
py() {
    "$PYTHON" -I - "$@" <<'EOF'
import collections, hashlib, os, pathlib, re, shutil, signal, stat, sys, zipfile, zlib

# one extra folder on top is fine; dot files are the leavings of a file manager
IMAGE = re.compile(r"(?:[^/]+/)?((?:train|test)/(?:cat|dog|wild)/[^/.][^/]*\.(?i:png|jpe?g))")
BROKEN = (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError, ValueError)

def die(message):
    sys.exit(f"download_dataset.sh: error: {message}")

def stop(number, frame):
    for each in signals:  # a second Ctrl-C must not stop the cleaning up
        signal.signal(each, signal.SIG_IGN)
    sys.exit(128 + number)

def counts(names):
    found = collections.Counter(name.split("/")[0] for name in names)
    return found["train"], found["test"]

def complete(path):
    sys.exit(not zipfile.is_zipfile(path))  # a zip ends with its directory: half a zip has none

def blob(path):
    content = pathlib.Path(path).read_bytes()
    print(hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest())

def count(folder, train, test):
    names = (path.relative_to(folder).as_posix() for path in pathlib.Path(folder).glob("*/*/*"))
    found = counts(name for name in names if IMAGE.fullmatch(name))
    if found != (int(train), int(test)):
        die(f"{folder} holds {found[0]} train and {found[1]} test images, not {train} and {test}: "
            "move it away, then run this again")

def members(archive):
    """Every image of the archive by the path it gets; ValueError if one name is not to be trusted."""
    images = {}
    for info in archive.infolist():
        name = info.orig_filename  # as stored: zipfile tidies .filename up
        if (re.match(r"/|[a-z]:", name, re.I) or re.search(r"[\\\0]", name) or ".." in name.split("/")
                or stat.S_ISLNK(info.external_attr >> 16)):
            raise ValueError(f"member {name!r} could land outside the folder")
        match = IMAGE.fullmatch(name)
        if match and images.setdefault(match[1], info) is not info:
            raise ValueError(f"two members are {match[1]!r}")
    return images

def unpack(part, target, train, test):
    part, target = pathlib.Path(part), pathlib.Path(target)
    temporary = target.with_name(f"{target.name}.unpack.{os.getpid()}")
    try:
        with zipfile.ZipFile(part) as archive:
            images = members(archive)
            found = counts(images)
            if found != (int(train), int(test)):
                raise ValueError(f"{found[0]} train and {found[1]} test images, not {train} and {test}")
            need, free = sum(i.file_size for i in images.values()), shutil.disk_usage(target.parent).free
            if need > free:
                raise OSError(f"{need / 1e9:.1f} GB needed, {free / 1e9:.1f} GB free")
            for number, (name, info) in enumerate(images.items(), 1):
                path = temporary / name
                path.parent.mkdir(parents=True, exist_ok=True)
                with archive.open(info) as source, path.open("xb") as file:
                    shutil.copyfileobj(source, file, 1 << 20)  # to the end, which checks the CRC
                if number % 500 == 0 or number == len(images):
                    print(f"\r  {number} of {len(images)} images", end="", flush=True)
            print()
        temporary.rename(target)
        part.unlink()
    except BROKEN as error:
        part.unlink()
        die(f"{part} is not the AFHQ v2 zip ({error}): removed, run this again to start over")
    except OSError as error:
        die(f"cannot unpack {part} ({error}): it is kept, run this again when that is mended")
    finally:
        shutil.rmtree(temporary, ignore_errors=True)

signals = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
for each in signals:
    if signal.getsignal(each) != signal.SIG_IGN:  # nohup stays nohup
        signal.signal(each, stop)
try:
    {"complete": complete, "blob": blob, "count": count, "unpack": unpack}[sys.argv[1]](*sys.argv[2:])
except OSError as error:
    die(error)
EOF
}

# fetch URL FILE JOB: FILE.part grows until the server has no more to send
fetch() {
    if [ -s "$2.part" ]; then say "$2.part is there: going on where it stopped"; fi
    failed=0
    if command -v curl >/dev/null 2>&1; then
        # 416: nothing left to send, so the .part is whole (wget knows that by itself)
        http=$(curl -fL -C - --connect-timeout 30 -Y 1000 -y 60 -w '%{http_code}' -o "$2.part" "$1") || failed=$?
        if [ "$http" = 416 ]; then failed=0; fi
    else
        wget -c -t 1 -T 60 -O "$2.part" "$1" || failed=$?
    fi
    if [ "$failed" = 0 ] && [ -s "$2.part" ]; then return; fi
    # curl's 33: the server cannot go on in the middle
    if [ "$failed" = 33 ] || [ ! -s "$2.part" ]; then rm -f "$2.part"; then_what="run this again to start over"
    else then_what="$2.part is kept, to go on run: sh ./download_dataset.sh $3"; fi
    die "cannot fetch $1 (exit status $failed): $then_what"
}

taesd_file() {
    if [ -e "$1" ]; then
        found=$(py blob "$1") || exit 1
        [ "$found" = "$2" ] || die "$1 is not the official file (git blob id $found, not $2): move it away, then run this again"
        say "$1 is already there"
        return
    fi
    say "fetching $1 (4.9 MB) from $TAESD_URL"
    fetch "$TAESD_URL/${1##*/}" "$1" taesd
    found=$(py blob "$1.part") || exit 1
    if [ "$found" != "$2" ]; then
        rm -f "$1.part"
        die "$TAESD_URL/${1##*/} is not the official file (git blob id $found, not $2): removed"
    fi
    mv "$1.part" "$1"
    say "$1 is done"
}

taesd() {
    mkdir -p pretrained
    taesd_file pretrained/taesd_encoder.pth $TAESD_ENCODER
    taesd_file pretrained/taesd_decoder.pth $TAESD_DECODER
}

afhq() {
    mkdir -p data
    if [ -e data/afhq ] || [ -h data/afhq ]; then
        py count data/afhq "$AFHQ_TRAIN_COUNT" "$AFHQ_TEST_COUNT" || exit 1
        say "data/afhq is already there"
        return
    fi
    say "fetching AFHQ v2 (zip of about 6.5 GB, 13 GB of disk while unpacking) into data/afhq from $AFHQ_URL"
    py complete data/afhq_v2.zip.part || fetch "$AFHQ_URL" data/afhq_v2.zip afhq
    say "checking and unpacking data/afhq_v2.zip.part"
    py unpack data/afhq_v2.zip.part data/afhq "$AFHQ_TRAIN_COUNT" "$AFHQ_TEST_COUNT" || exit 1
    say "data/afhq is done: $AFHQ_TRAIN_COUNT train and $AFHQ_TEST_COUNT test images"
}

what=${1:-all}
case $what in -h|--help) usage; exit 0 ;; afhq|taesd|all) ;; *) usage_error "unknown argument '$what': afhq, taesd or all" ;; esac
[ $# -le 1 ] || usage_error "$# arguments: one of afhq, taesd or all"
case $AFHQ_TRAIN_COUNT$AFHQ_TEST_COUNT in
    *[!0-9]*) usage_error "AFHQ_TRAIN_COUNT '$AFHQ_TRAIN_COUNT', AFHQ_TEST_COUNT '$AFHQ_TEST_COUNT': whole numbers are needed" ;;
esac

command -v curl >/dev/null 2>&1 || command -v wget >/dev/null 2>&1 || die "neither curl nor wget found: install one of them"
for PYTHON in python3 python none; do  # tried, not just looked up: Windows has a python3 that only opens a shop
    "$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 8))' >/dev/null 2>&1 && break
done
[ "$PYTHON" != none ] || die "no Python 3.8 or newer found as python3 or python: install it"
trap 'say "stopped; to go on run: sh ./download_dataset.sh $what" >&2; exit 130' INT TERM HUP

# the small files first: they are of use even if the large one breaks off
case $what in taesd|all) taesd ;; esac
case $what in afhq|all) afhq ;; esac
