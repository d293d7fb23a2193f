import csv

import pytest

from local.train.loggers import EpochTable, read_epochs

# Of an earlier version: rows of intervals, of validation, of hp_metric and of the epoch.
OLD = "epoch,hp_metric,items_per_second,loss,lr,peak_memory_gib,skipped_steps,step"
OLD += """,train_loss,val_loss
0,,,0.5,,,,1,,
0,,,,,,,2,,0.75
,0.75,,,,,,2,,
0,,99.5,,0.0005,0.25,0.0,2,0.625,
1,,,0.25,,,,4,,
1,,,,,,,5,,0.5
"""


def read_rows(path) -> list[dict]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def log_epoch(table: EpochTable, epoch: int, **more) -> None:
    """As Lightning does: the loss of a batch, what validation logs, what the epoch logs."""
    table.log_metrics({"loss": 9.0, "epoch": epoch}, step=2 * epoch)
    table.log_metrics({"val_loss": 0.1 * epoch, "epoch": epoch}, step=2 * epoch + 1)
    row = {"train_loss": 0.2 * epoch, "epoch": epoch, **more}
    table.log_metrics(row, step=2 * epoch + 1)
    table.save()


def test_an_epoch_is_one_row(tmp_path):
    path = tmp_path / "logs" / "metrics.csv"
    table = EpochTable(path)
    table.save()
    for epoch in range(3):
        log_epoch(table, epoch, lr=0.5)
    table.log_metrics({"val_loss": 1.0, "epoch": 3}, step=7)  # a run that ends here
    rows = read_rows(path)
    assert [row["epoch"] for row in rows] == ["0", "1", "2"]
    assert rows[1] == {
        **{"epoch": "1", "step": "3", "train_loss": "0.2", "val_loss": "0.1", "lr": "0.5"}
    }
    assert path.read_text().startswith("epoch,step,train_loss,val_loss,lr\n")


def test_a_resumed_run_drops_later_rows_and_new_columns_join(tmp_path):
    path, whole = tmp_path / "metrics.csv", tmp_path / "whole.csv"
    for target in (path, whole):
        table = EpochTable(target)
        for epoch in range(2):
            log_epoch(table, epoch)
    before = path.read_bytes().decode()
    log_epoch(EpochTable(path, before), 2)
    log_epoch(EpochTable(path, before), 2)  # a kill came after it
    resumed = EpochTable(path, before)
    resumed.save()
    assert path.read_bytes().decode() == before
    for one in (resumed, EpochTable(whole, before)):
        log_epoch(one, 2)
        log_epoch(one, 3, val_wer=0.25)
    assert path.read_bytes() == whole.read_bytes()
    assert [row["val_wer"] for row in read_rows(path)] == ["", "", "", "0.25"]


def test_the_file_of_a_run_that_learned_nothing_goes(tmp_path):
    path = tmp_path / "metrics.csv"
    path.write_text("epoch,step,train_loss\n0,2,0.5\n")
    EpochTable(path).save()
    assert not path.exists()


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_rows_of_an_earlier_version_are_merged_and_kept(tmp_path, end):
    before = OLD.replace("\n", end)
    assert list(read_epochs(before)) == [0]
    table = EpochTable(tmp_path / "metrics.csv", before)
    table.save()
    (row,) = read_rows(tmp_path / "metrics.csv")
    assert row == {
        **{"epoch": "0", "step": "2", "train_loss": "0.625", "val_loss": "0.75", "lr": "0.0005"},
        **{"items_per_second": "99.5", "peak_memory_gib": "0.25", "skipped_steps": "0.0"},
    }
    assert (tmp_path / "metrics_by_step.csv").read_bytes().decode() == before
