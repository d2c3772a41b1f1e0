"""plot_results.py: the figures of a run and their numbers."""

import csv
import json
import math
import shutil
import subprocess
import sys

import pytest
import yaml
from PIL import Image
from torch.utils.tensorboard import SummaryWriter

import plot_results
from helpers import one_line
from libs.config import CODE
from libs.common.errors import UsageError


def make_run(folder, grids=(1, 2, 3)):
    """A run folder with 30 updates, of which the last 10 come from a resumed process."""
    folder.mkdir()
    config = {"model_name": "DDPM", "loader": {"batch_size": 64}, "train_cfg": {"num_eval_samples": 4}}
    (folder / "config.txt").write_text(yaml.safe_dump(config))
    for start, stop, purge in ((0, 25, None), (20, 30, 21)):  # updates 21 to 25 are done twice: the second time counts
        with SummaryWriter(str(folder / "logs"), purge_step=purge) as board:
            for step in range(start + 1, stop + 1):
                board.add_scalar("train/loss", 1 / step + (start > 0), step)
                board.add_scalar("train/lr", 1e-3, step)
                board.add_scalar("train/grad_norm", 2.0, step)
                for k in range(10):
                    board.add_scalar(f"loss_by_time/{k / 10:.1f}", 1 + k / step, step)
                if step % 10 == 0:
                    board.add_scalar("eval/fd_train", 5 / step, step)
    for epoch in grids:  # 2 rows of 4 images of 8 x 8, one pixel between them: grey says which epoch and column
        picture = Image.new("RGB", (4 * 9 + 1, 2 * 9 + 1))
        for column in range(4):
            for row in range(2):
                picture.paste((50 * epoch + 10 * column,) * 3, (1 + 9 * column, 1 + 9 * row, 9 + 9 * column, 9 + 9 * row))
        picture.save(folder / f"sample-{epoch - 1}.png")
    return folder


def plot(*args):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["plot_results.py", *map(str, args)])
        plot_results.main()


def refusal(*args):
    with pytest.raises(UsageError) as error:
        plot(*args)
    return one_line(error)


@pytest.fixture(scope="module")
def plotted(tmp_path_factory):
    run = make_run(tmp_path_factory.mktemp("plot") / "run")
    plot(run, "--epochs", 2, "--columns", 3)
    return run / "figures"


def test_the_figures_of_a_run(plotted):
    names = {"curves.csv", "loss.pdf", "loss_by_time.pdf", "eval.pdf", "samples_by_epoch.png"}
    assert {path.name for path in plotted.iterdir()} == names
    for path in plotted.glob("*.pdf"):
        assert path.read_bytes().startswith(b"%PDF") and b"/Subtype /Image" not in path.read_bytes()  # lines, not pixels


def test_the_curves_are_those_of_the_board_and_a_resumed_part_counts_once(plotted):
    rows = list(csv.DictReader((plotted / "curves.csv").read_text().splitlines()))
    assert [int(row["step"]) for row in rows] == list(range(1, 31))
    for row in rows:
        step = int(row["step"])
        assert float(row["train/loss"]) == pytest.approx(1 / step + (step > 20), rel=1e-5)
        assert float(row["loss_by_time/0.7"]) == pytest.approx(1 + 7 / step, rel=1e-5)
        assert (row["eval/fd_train"] != "") == (step % 10 == 0)


def test_the_same_run_gives_the_same_files(plotted, tmp_path):
    plot(plotted.parent, "--epochs", 2, "--columns", 3, "--output", tmp_path / "again")
    for path in plotted.iterdir():
        assert (tmp_path / "again" / path.name).read_bytes() == path.read_bytes(), path.name


def test_grids_of_the_first_and_the_last_epoch_side_by_side(plotted):
    picture = Image.open(plotted / "samples_by_epoch.png")
    caption = plot_results.CAPTION
    assert picture.height == caption + 19
    width = (picture.width + 8) // 2
    for column in range(3):
        assert picture.getpixel((4 + 9 * column, caption + 5))[0] == 50 + 10 * column
        assert picture.getpixel((width + 4 + 9 * column, caption + 14))[0] == 150 + 10 * column
    assert picture.getpixel((4 + 27, caption + 5)) == (255, 255, 255)  # the fourth column is not shown


@pytest.mark.parametrize("values, least, right", [
    ([0, 10, 20], 3, [0, 10, 20]),
    ([5, 5, 5], 2, [3, 5, 7]),
    ([10, 0, 1], 4, [10, -1.5, 2.5]),
    ([], 1, []),
])
def test_labels_move_apart_as_little_as_it_takes(values, least, right):
    assert plot_results.spread(values, least) == pytest.approx(right)


def lines(axis):
    return {line.get_label(): [list(map(float, line.get_xdata())), list(map(float, line.get_ydata()))]
            for line in axis.get_lines()}


def test_what_the_curves_show():
    """A value that is no number is a gap; a tenth that was never positive is left out; one point is enough."""
    curves = {"train/loss": [(1, 8.0), (2, math.nan), (3, 2.0), (4, 1.0)], "train/grad_norm": [(1, 0.0)],
              "loss_by_time/0.0": [(1, 0.5)], "loss_by_time/0.1": [(1, 0.0)], "loss_by_time/0.9": [(1, 0.5), (2, math.inf)],
              "eval/precision": [(2, 0.25)]}
    top, bottom = plot_results.plot_loss(curves, 64).axes  # there is no learning rate
    (steps, values), = lines(top).values()
    assert steps == [1, 2, 3, 4] and values[:1] + values[2:] == [8, 2, 1] and math.isnan(values[1])
    assert top.get_yscale() == "linear" and bottom.get_ylabel() == "gradient norm"
    axis, = plot_results.plot_tenths(curves, 64).axes
    assert list(lines(axis).values()) == [[[1], [0.5]], [[1], [0.5]]]
    assert [text.get_text() for text in axis.texts] == ["0.0 to 0.1", "0.9 to 1.0"]
    axis, = plot_results.plot_evaluations(curves, 64).axes
    assert lines(axis) == {"precision": [[2], [0.25]]}


def test_grids_of_an_autoencoder_have_rows_of_five(tmp_path):
    run = make_run(tmp_path / "run")
    config = yaml.safe_load((run / "config.txt").read_text()) | {"model_name": "TAESD"}
    (run / "config.txt").write_text(yaml.safe_dump(config))
    assert plot_results.read_config(run) == (64, 5)


def row(sampler, calls, fd, **way):
    return {"model": "../logs/a.pth.tar", "hash": "abc", "network_calls": calls, "fd_train": fd,
            "way": {"sampler": sampler, "steps": calls, **way}}


def test_a_comparison_of_samplers(tmp_path):
    """A line for each model and way; the mean and the deviation over the seeds, and over nothing else."""
    source = tmp_path / "samplers.json"
    rows = [row("heun", 17, 0.3), row("heun", 17, 0.5), row("heun", 35, 0.2), row("dpmpp_2m", 20, 0.6, eta=0.5),
            row("dpmpp_2m", 20, 0.7, eta=0.0), {**row("heun", 17, 0.9), "hash": "def"}]
    source.write_text(json.dumps({"metric": "FD (classifier)", "n": 1000, "floor": 0.4, "rows": rows}))
    axis, = plot_results.plot_samplers(*plot_results.read_comparison(source)).axes
    found = {bars.get_label(): (list(bars.lines[0].get_xdata()), list(bars.lines[0].get_ydata())) for bars in axis.containers}
    assert found == {"abc, heun": ([17, 35], [0.4, 0.2]), "abc, dpmpp_2m, eta 0.5": ([20], [0.6]),
                     "abc, dpmpp_2m, eta 0.0": ([20], [0.7]), "def, heun": ([17], [0.9])}
    (low, high), *_ = [segment[:, 1] for segment in axis.containers[0].lines[2][0].get_segments()]
    assert (high - low) / 2 == pytest.approx(0.02 ** 0.5)  # of 0.3 and 0.5
    assert lines(axis)["real test images"][1] == [0.4, 0.4]
    plot(source)
    assert (tmp_path / "samplers.pdf").read_bytes().startswith(b"%PDF")
    assert "samplers.pdf exists" in refusal(source)


@pytest.mark.parametrize("spoil, word", [
    (lambda run: (run / "config.txt").unlink(), "is no run folder"),
    (lambda run: (run / "config.txt").write_bytes(b"\xff"), "is no run folder"),
    (lambda run: [path.unlink() for path in (run / "logs").iterdir()], "no train/loss"),
    (lambda run: shutil.rmtree(run / "logs"), "no train/loss"),
])
def test_no_run_folder(tmp_path, spoil, word):
    run = make_run(tmp_path / "run")
    spoil(run)
    assert word in refusal(run)
    assert not (run / "figures").exists()


@pytest.mark.parametrize("content", ["{}", "[1]", "not JSON", '{"rows": [{"way": 1}]}',
                                     '{"metric": "FD", "n": 1, "floor": 1, "rows": []}', json.dumps({"rows": [row("heun", 1, 1)]})])
def test_no_comparison(tmp_path, content):
    (tmp_path / "x.json").write_text(content)
    assert "no file of compare_samplers.py" in refusal(tmp_path / "x.json")


def test_nothing_there(tmp_path):
    assert "no such run folder or file" in refusal(tmp_path / "nothing")


def test_the_script(tmp_path):
    run = make_run(tmp_path / "run", grids=())
    done = subprocess.run([sys.executable, "plot_results.py", str(run)], cwd=CODE, capture_output=True, text=True)
    assert done.returncode == 0 and "loss.pdf" in done.stdout, done.stderr
    assert not (run / "figures" / "samples_by_epoch.png").exists()
