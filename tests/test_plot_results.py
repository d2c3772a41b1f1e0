"""plot_results.py: the figures of a run and their numbers."""

import csv
import json
import math
import shutil
import sys
from pathlib import Path

import pytest
import yaml
from PIL import Image
from torch.utils.tensorboard import SummaryWriter

import plot_results
from helpers import one_line
from libs.common.errors import UsageError
from libs.config import CODE


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run folder with 30 updates, of which the last 10 come from a resumed process, and its figures."""
    folder = tmp_path_factory.mktemp("plot") / "run"
    folder.mkdir()
    config = {"model_name": "DDPM", "loader": {"batch_size": 64}, "train_cfg": {"num_eval_samples": 4}}
    (folder / "config.txt").write_text(yaml.safe_dump(config))
    for start, stop, purge in ((0, 25, None), (20, 30, 21)):  # updates 21 to 25 are done twice: the second time counts
        with SummaryWriter(str(folder / "logs"), purge_step=purge) as board:
            for step in range(start + 1, stop + 1):
                board.add_scalar("train/loss", 1 / step + (start > 0), step)
                for k in range(10):
                    board.add_scalar(f"train_loss_by_time/{k / 10:.1f}", 1 + k / step, step)
                if step % 10 == 0:
                    board.add_scalar("eval/psnr", 5 / step, step)
    for epoch in (1, 2, 3):  # 2 rows of 4 images of 8 x 8, one pixel between them: grey is the epoch and column
        picture = Image.new("RGB", (4 * 9 + 1, 2 * 9 + 1))
        for column in range(4):
            for row in range(2):
                box = (1 + 9 * column, 1 + 9 * row, 9 + 9 * column, 9 + 9 * row)
                picture.paste((50 * epoch + 10 * column,) * 3, box)
        picture.save(folder / f"sample-{epoch - 1}.png")
    plot_results.main([str(folder), "--epochs", "2", "--columns", "3"])
    return folder


def test_the_figures_of_a_run(run, tmp_path):
    names = {"curves.csv", "loss.pdf", "loss_by_time.pdf", "samples_by_epoch.png"}
    assert {path.name for path in (run / "figures").iterdir()} == names
    plot_results.main([str(run), "--epochs", "2", "--columns", "3", "--output", str(tmp_path / "again")])
    for path in (run / "figures").iterdir():
        data = path.read_bytes()
        assert (tmp_path / "again" / path.name).read_bytes() == data
        assert path.suffix != ".pdf" or data.startswith(b"%PDF") and b"/Subtype /Image" not in data  # lines, not pixels

    # the curves are the board's; updates done again after a resume count once
    rows = list(csv.DictReader((run / "figures/curves.csv").read_text().splitlines()))
    assert [int(row["step"]) for row in rows] == list(range(1, 31))
    for row in rows:
        step = int(row["step"])
        assert float(row["train/loss"]) == pytest.approx(1 / step + (step > 20), rel=1e-5)
        assert float(row["train_loss_by_time/0.7"]) == pytest.approx(1 + 7 / step, rel=1e-5)
        assert (row["eval/psnr"] != "") == (step % 10 == 0)

    # three columns of the grids of the first and the last epoch, side by side
    picture, caption = Image.open(run / "figures/samples_by_epoch.png"), plot_results.CAPTION
    assert picture.height == caption + 19
    width = (picture.width + 8) // 2
    for column in range(3):
        assert picture.getpixel((4 + 9 * column, caption + 5))[0] == 50 + 10 * column
        assert picture.getpixel((width + 4 + 9 * column, caption + 14))[0] == 150 + 10 * column
    assert picture.getpixel((4 + 27, caption + 5)) == (255, 255, 255)


def lines(axis):
    return {line.get_label(): [list(map(float, line.get_xdata())), list(map(float, line.get_ydata()))]
            for line in axis.get_lines()}


def test_curves():
    """A value that is no number is a gap; a tenth that was never positive is left out; one point is enough."""
    curves = {"train/loss": [(1, 8.0), (2, math.nan), (3, 2.0), (4, 1.0)], "train/grad_norm": [(1, 0.0)],
              "train_loss_by_time/0.0": [(1, 0.5)], "train_loss_by_time/0.1": [(1, 0.0)], "train_loss_by_time/0.9": [(1, 0.7), (2, math.inf)]}
    top, bottom = plot_results.plot_losses(curves, 64).axes  # there is no learning rate
    (steps, values), = lines(top).values()
    assert steps == [1, 2, 3, 4] and values[:1] + values[2:] == [8, 2, 1] and math.isnan(values[1])
    assert top.get_yscale() == "linear" and bottom.get_ylabel() == "gradient norm"
    axis, = plot_results.plot_loss_by_time(curves, 64).axes
    assert list(lines(axis).items()) == [("0.9 to 1.0", [[1], [0.7]]), ("0.0 to 0.1", [[1], [0.5]])]  # as they end
    assert plot_results.plot_loss_by_time({"train/loss": [(1, 1.0)]}, 64) is None


def test_a_comparison_of_samplers():
    """A line for each model and setting; the mean and the deviation over the seeds, and over nothing else."""
    def row(sampler, calls, fd, digest="abc", **settings):
        return {"model": "logs/a.pth.tar", "hash": digest, "network_calls": calls, "fd_train": fd,
                "way": {"sampler": sampler, "steps": calls, **settings}}

    rows = [row("heun", 17, 0.3), row("heun", 17, 0.5), row("heun", 35, 0.2), row("dpmpp_2m", 20, 0.6, eta=0.5),
            row("dpmpp_2m", 20, 0.7, eta=0.0), row("heun", 17, 0.9, "def")]
    axis, = plot_results.plot_samplers({"metric": "FD (classifier)", "n": 1000, "floor": 0.4, "rows": rows}).axes
    found = {bars.get_label(): (list(bars.lines[0].get_xdata()), list(bars.lines[0].get_ydata()))
             for bars in axis.containers}
    assert found == {"abc, heun": ([17, 35], [0.4, 0.2]), "abc, dpmpp_2m, eta 0.5": ([20], [0.6]),
                     "abc, dpmpp_2m, eta 0.0": ([20], [0.7]), "def, heun": ([17], [0.9])}
    (low, high), *_ = [segment[:, 1] for segment in axis.containers[0].lines[2][0].get_segments()]
    assert (high - low) / 2 == pytest.approx(0.02 ** 0.5)  # of 0.3 and 0.5
    assert lines(axis)["real test images"][1] == [0.4, 0.4]


def test_a_comparison_of_runs():
    """A line for each kind and setting, over network calls; the settings' hash only where a kind has several."""
    def row(kind, settings, calls, fd, sampler="euler"):
        return {"kind": kind, "settings": settings, "network_calls": calls, "fd_test": fd, "fd_train": 9.0,
                "way": {"sampler": sampler, "steps": calls}}

    rows = [row("EDM", "a", 5, 0.3), row("EDM", "b", 5, 0.5), row("Flow", "c", 5, 0.2), row("Flow", "c", 5, 0.4),
            row("Flow", "c", 10, 0.1)]
    axis, = plot_results.plot_samplers({"metric": "FD (classifier)", "num": 2000, "floor": 0.05, "rows": rows,
                                        "errors": [row("EDM", "a", 0, 0), row("EDM", "b", 0, 0), row("Flow", "c", 0, 0)]}).axes
    found = {bars.get_label(): (list(bars.lines[0].get_xdata()), list(bars.lines[0].get_ydata()))
             for bars in axis.containers}
    assert found == {"EDM (a)": ([5], [0.3]), "EDM (b)": ([5], [0.5]), "Flow": ([5, 10], [pytest.approx(0.3), 0.1])}
    assert axis.get_ylabel() == "FD (classifier), n = 2,000" and axis.get_xscale() == "log"


def test_a_shipped_comparison(tmp_path):
    source = Path(CODE).parent / "results/mnist_cpu/models.json"
    plot_results.main([str(source), "--output", str(tmp_path)])
    assert (tmp_path / "models.pdf").read_bytes().startswith(b"%PDF")


def test_a_grid_that_is_no_picture(run, tmp_path):
    shutil.copytree(run, tmp_path / "run")
    (tmp_path / "run" / "sample-0.png").write_text("no picture")
    with pytest.raises(UsageError, match="samples: .*sample-0.png"):
        plot_results.main([str(tmp_path / "run"), "--output", str(tmp_path / "figures")])


def test_bad_input(run, tmp_path, monkeypatch):
    (tmp_path / "empty").mkdir()
    (tmp_path / "no_logs").mkdir()
    (tmp_path / "no_logs/config.txt").write_text((run / "config.txt").read_text())
    (tmp_path / "x.json").write_text("not JSON")
    (tmp_path / "y.json").write_text(json.dumps({"errors": [], "rows": []}))
    for source, message in (("empty", "is no run folder"), ("no_logs", "no train/loss"),
                            ("x.json", "no file of compare.py"),
                            ("y.json", "no file of compare.py"), ("nothing", "no such run folder or file"),
                            (run, "curves.csv exists; give another name, or --overwrite")):
        with pytest.raises(UsageError) as error:
            plot_results.main([str(tmp_path / source)])
        assert message in one_line(error)
    assert not list(tmp_path.glob("*/figures"))
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(UsageError, match="pip install matplotlib"):
        plot_results.main([str(run), "--output", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()
