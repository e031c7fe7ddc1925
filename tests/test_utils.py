"""Tests of ane_trainer/utils.py."""

import gc
import io
import json
import logging
import math
import os
import stat
import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ane_trainer import utils


def test_seeded_restores_the_generator():
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    with utils.seeded(99):
        inside = torch.rand(3)
    assert torch.equal(torch.rand(3), expected)
    with utils.seeded(99):
        assert torch.equal(torch.rand(3), inside)
    torch.manual_seed(1)
    with utils.seeded(None):
        assert torch.equal(torch.rand(3), expected)


def test_right_answers_of_class_indices_and_one_hot_rows():
    output = torch.tensor([[0.1, 0.9], [0.8, 0.2], [0.3, 0.7], [0.6, 0.4]])
    assert utils.count_correct(output, torch.tensor([1, 0, 0, 0])) == 3
    assert utils.count_correct(output, torch.tensor([[0.0, 1.0], [1, 0], [1, 0], [1, 0]])) == 3


@given(st.lists(st.lists(st.floats(-100, 100), min_size=1, max_size=5), min_size=1, max_size=6))
def test_running_mean_is_the_mean_over_examples(groups):
    running = utils.RunningMean()
    for group in groups:
        running.update(sum(group) / len(group), len(group))
    flat = [value for group in groups for value in group]
    assert running.mean == pytest.approx(sum(flat) / len(flat), abs=1e-9)


def test_running_mean_before_the_first_value_is_nan():
    assert math.isnan(utils.RunningMean().mean)


@pytest.mark.parametrize(
    ("size", "text"), [(0, "0 B"), (512, "512 B"), (999, "999 B"), (1500, "1.5 KB"), (20_300_000, "20.3 MB"),
                       (999_600, "1.0 MB"), (3e15, "3000 TB")],
)  # fmt: skip
def test_format_bytes(size, text):
    assert utils.format_bytes(size) == text


@pytest.mark.parametrize(
    ("count", "text"), [(7, "7"), (203_530, "203,530"), (1_240_000, "1.2M"), (5e9, "5G")]
)
def test_format_count(count, text):
    assert utils.format_count(count) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(85e-6, "85 us"), (0.99999e-3, "1 ms"), (0.012, "12 ms"), (0.9999, "1.0 s"), (3.21, "3.2 s"),
     (59.99, "1 min 00 s"), (245, "4 min 05 s"), (7380, "2 h 03 min")],
)  # fmt: skip
def test_format_seconds(seconds, text):
    assert utils.format_seconds(seconds) == text


def test_did_you_mean_suggests_the_near_name_and_lists_all():
    assert utils.did_you_mean("MNSIT", ["mnist", "digits"]) == "Did you mean 'mnist'? Known: digits, mnist."
    assert utils.did_you_mean("zzz", ["mnist", "digits"]) == "Known: digits, mnist."


def test_atomic_write_replaces_whole_files_and_makes_folders(tmp_path):
    path = utils.atomic_write(tmp_path / "a" / "b.txt", "é")
    assert path.read_bytes() == "é".encode()
    utils.atomic_write(path, b"\x00\x01")
    assert path.read_bytes() == b"\x00\x01"
    assert [p.name for p in path.parent.iterdir()] == ["b.txt"]


@pytest.mark.skipif(os.name != "posix", reason="file modes are POSIX")
def test_atomic_write_honours_the_umask(tmp_path):
    old = os.umask(0o027)
    try:
        mode = stat.S_IMODE(utils.atomic_write(tmp_path / "f", b"x").stat().st_mode)
    finally:
        os.umask(old)
    assert mode == 0o640


def test_a_failed_atomic_write_leaves_the_old_file_and_no_rest(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "kept").write_text("old")
    with pytest.raises(OSError):  # noqa: PT011  a folder cannot be replaced by a file; errno differs by system
        utils.atomic_write(tmp_path / "sub", b"new")
    assert [p.name for p in tmp_path.iterdir()] == ["sub"]
    assert (tmp_path / "sub" / "kept").read_text() == "old"


def test_atomic_write_json_round_trips_and_refuses_nan(tmp_path):
    value = {"loss": 0.25, "names": ["ä"], "none": None}
    path = utils.atomic_write_json(tmp_path / "r.json", value)
    assert json.loads(path.read_text(encoding="utf-8")) == value
    with pytest.raises(ValueError, match="JSON compliant"):
        utils.atomic_write_json(path, float("nan"))
    assert json.loads(path.read_text(encoding="utf-8")) == value


@pytest.fixture
def package_logger():
    logger = logging.getLogger("ane_trainer")
    saved = (list(logger.handlers), logger.level, logger.propagate)
    yield logger
    logger.handlers[:], logger.propagate = saved[0], saved[2]
    logger.setLevel(saved[1])


def test_setup_logging_writes_plain_lines_to_stderr_once(package_logger, monkeypatch):
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    utils.setup_logging()
    utils.setup_logging("WARNING")
    logging.getLogger("ane_trainer.data").warning("cache is %s", "cold")
    logging.getLogger("ane_trainer.data").info("not shown")
    assert stream.getvalue() == "WARNING cache is cold\n"


def test_setup_logging_uses_rich_on_a_terminal(package_logger, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    stream = Terminal()
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setenv("TERM", "xterm")
    assert utils.is_interactive()
    utils.setup_logging()
    logging.getLogger("ane_trainer").info("hello")
    assert "hello" in stream.getvalue()
    assert "INFO" in stream.getvalue()


def test_a_native_librarys_line_is_left_out_and_others_are_not(capfd):
    with utils.without_lines("NOISE "):
        os.write(2, b"NOISE one\nreal\nNOISE two\n")
    os.write(2, b"NOISE after\n")
    assert capfd.readouterr().err == "real\nNOISE after\n"


def test_a_loggers_warnings_are_left_out_in_the_block_only(caplog):
    with utils.without_warnings_of("some.package"):
        logging.getLogger("some.package").warning("noise")
        logging.getLogger("some.package").error("real")
    logging.getLogger("some.package").warning("after")
    assert [record.message for record in caplog.records] == ["real", "after"]


def test_collection_waits_and_goes_on():
    assert gc.isenabled()
    with utils.without_collection():
        assert not gc.isenabled()
    assert gc.isenabled()
    gc.disable()
    try:
        with utils.without_collection():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()


def test_what_was_made_without_collection_is_looked_through_once():
    with utils.without_collection():
        kept = [[number] for number in range(10)]
        young = {id(each) for each in gc.get_objects(generation=0)}
        assert all(id(each) in young for each in kept)
    old = {id(each) for each in gc.get_objects(generation=2)}
    assert all(id(each) in old for each in kept)


FREED = """
import os
from ane_trainer import utils

def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

utils.return_memory()
del [bytearray(24 << 20)][0]  # from here on glibc takes blocks of this size for small ones
start, blocks, pins = resident(), [], []
for _ in range(8):
    blocks.append(bytearray(b"1") * (16 << 20))
    pins.append(bytearray(1 << 14))  # behind the block: what keeps it in the process
held = resident() - start
del blocks
utils.return_memory()
print(held, resident() - start, len(pins))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_that_is_free_goes_back_to_the_system() -> None:
    """In a process of its own: one that has run for long has free memory that the blocks would be put into."""
    done = subprocess.run([sys.executable, "-c", FREED], capture_output=True, text=True, check=True)
    held, kept, pins = map(int, done.stdout.split())
    assert held > 100 << 20
    assert kept < 32 << 20
    assert pins == 8
