"""The 157 kinds of damaged or impossible input that were once tried by hand, each with the test that holds it.

The numbers are those of that trial, in its order: files of a run (1 to 42), a cached dataset (43 to 48),
programs (49 to
71), inputs (72 to 90), the command line (91 to 135), data from Python (136 to 157).
"""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from ane_trainer.cli import run_command
from tests import test_core
from tests.ane.dispatch import test_damaged_caches as caches
from tests.commands import test_damaged as damaged
from tests.training import test_checkpoint as checkpoint
from tests.training import test_memory as memory
from tests.training import test_runs as runs
from tests.training import test_signals as signals
from tests.training.datasets import test_fetch as fetch

CHECKPOINT = "test_a_damaged_checkpoint_gives_way_to_the_one_before_with_a_warning"
WHOLE = "test_what_is_not_whole_is_refused_and_changes_nothing"
WEIGHTS, CONFIG = "test_damaged_weights_are_refused", "test_a_changed_configuration_is_refused"
BESIDE = "test_what_only_tells_of_a_run_blocks_nothing_and_its_damage_is_said"
CACHE = "test_a_damaged_file_in_the_cache_is_named_and_fetched_again"
TEXT, PACKAGE = "test_a_damaged_text_is_refused", "test_a_damaged_package_is_refused"
ARRAY, WISH = (
    "test_an_array_that_does_not_do_is_refused",
    "test_an_impossible_wish_is_refused_and_leaves_nothing",
)
BATCH, FORM = "test_batches_that_do_not_do_are_refused", "test_batches_in_other_forms_do"

#: Rows -> (what was tried, where its test is, the test, which of its cases).
ROWS: dict[str, tuple[str, ModuleType, str, tuple[str, ...]]] = {
    "1-4": ("checkpoint truncated, empty, foreign, with a huge header", damaged, CHECKPOINT,
            ("truncated", "empty", "foreign", "huge header")),
    "5-7": ("checkpoint: a bit of the tensors, of the header, a pickle", damaged, CHECKPOINT,
            ("a bit of the tensors", "a bit of the header", "a pickle")),
    "8-9": ("checkpoint missing, a folder", damaged, "test_a_checkpoint_that_is_none_is_refused",
            ("missing", "a folder")),
    "10": ("checkpoint lacks a tensor of the engine", checkpoint, WHOLE,
           ("a weight of the engine", "a moment", "the loss scale", "a unit")),
    "11": ("checkpoint: another shape, no counters, no generator", checkpoint, WHOLE,
           ("a shape", "the counters", "the generator")),
    "12": ("checkpoint: nan", checkpoint, WHOLE, ("nan in a moment", "nan in the model")),
    "13-17": ("checkpoint: epoch -5, as text, no progress, foreign history, foreign state of the data", checkpoint,
              WHOLE,
              ("an epoch below zero", "an epoch as text", "no progress", "a foreign history",
               "a foreign state of the data")),
    "18-20": ("weights truncated, empty, a pickle", damaged, WEIGHTS, ("truncated", "empty", "a pickle")),
    "21-23": ("weights: a key missing, too many, another shape", damaged, WEIGHTS,
              ("a key missing", "an extra key", "a shape")),
    "24": ("weights: nan", damaged, WEIGHTS, ("nan",)),
    "25": ("weights: 1e30", damaged, "test_weights_beyond_the_engine_and_missing_ones_are_said", ()),
    "26-27": ("weights: integers, a flipped bit", damaged, WEIGHTS, ("integers", "a bit")),
    "28": ("weights missing", damaged, "test_weights_beyond_the_engine_and_missing_ones_are_said", ()),
    "29-30": ("config.toml: bytes, 100,000 brackets", damaged, CONFIG, ("bytes", "deep")),
    "31-34": ("config.toml: empty, cut, unknown key, wrong type", damaged, CONFIG,
              ("empty", "cut", "unknown", "a type")),
    "35-36": ("config.toml: another model, another dataset", damaged, CONFIG, ("another model", "another dataset")),
    "37": ("config.toml: another seed", damaged, CONFIG, ("another seed",)),
    "38-39": ("result.json: random, empty", damaged, BESIDE, ("result.json",)),
    "40-42": ("metrics.jsonl: random, missing, half a line", damaged, BESIDE, ("metrics.jsonl",)),
    "43-46": ("cached MNIST: truncated, labels of zeros, changed labels, one byte", fetch, CACHE, ()),
    "47": ("cached MNIST: foreign", fetch, "test_a_source_that_lies_is_not_believed", ()),
    "48": ("cached MNIST: missing", fetch, "test_files_come_from_the_mirror_once_and_then_from_the_cache", ()),
    "49-53": ("program: half, empty, a bit, huge extents, brackets", damaged, TEXT,
              ("half", "empty", "a bit", "huge extents", "brackets")),
    "54-58": ("program: an open string, noise, letters, zeros, a number of 5,000 digits", damaged, TEXT,
              ("an open string", "noise", "letters", "zeros", "a long number")),
    "59-61": ("weights.bin cut, missing, foreign", damaged, "test_damaged_weights_of_a_program_are_refused", ()),
    "62": ("weights.bin: a bit", damaged, "test_one_bit_of_a_run_s_program_is_noticed", ("weights.bin",)),
    "63-65": ("package: manifest foreign, missing, a path outside", damaged, PACKAGE,
              ("manifest foreign", "manifest missing", "a path outside")),
    "66-68": ("package: model cut, foreign, a bit", damaged, PACKAGE,
              ("model cut", "model foreign", "a bit of the model")),
    "69-70": ("package: weights cut, missing", damaged, PACKAGE, ("weights cut", "weights missing")),
    "71": ("package: a file", damaged, "test_a_package_that_another_tool_wrote_anew_is_read", ()),
    "72-76": ("predict --input: another shape, no axes, empty, strings, complex", damaged, ARRAY,
              ("another shape", "no axes", "no examples", "strings", "complex")),
    "77-78": ("predict --input: nan, inf", damaged, ARRAY, ("nan", "inf")),
    "79": ("predict --input: 1e30", test_core, "test_bad_values_are_refused_in_evaluation_too", ()),
    "80-84": ("predict --input: objects, a pickle, random, empty, missing", damaged, ARRAY,
              ("objects", "a pickle", "noise", "empty", "missing")),
    "85": ("predict --input: a header of 23 TiB", damaged, ARRAY, ("23 TiB",)),
    "86": ("predict --input: bytes", damaged, "test_bytes_are_pixels_of_the_training_data", ()),
    "87-89": ("run --input: another shape, objects, an unknown name", damaged,
              "test_an_input_of_a_program_that_does_not_do_is_refused", ("SIM103", "SIM108", "SIM102")),
    "91-93": ("a batch beyond the data, limit 1, a limit below the batch", damaged, WISH,
              ("--batch 4000 --out r", "--limit 1 --out r", "--limit 100 --out r")),
    "94-97": ("lr 0, -1, nan, inf", damaged, WISH, ("--lr 0", "--lr -1", "--lr nan", "--lr inf")),
    "98-99": ("lr as text; epochs 0 and -1", damaged, WISH, ("--lr fast", "--epochs 0", "--epochs -1")),
    "100": ("lr 1e6", damaged, WISH, ("--lr 1e6 --device sim",)),
    "101": ("sgd with lr 50", damaged, "test_training_that_goes_astray_says_so", ()),
    "102-107": ("seed -1, 2^70; batch 0; threads 0; momentum 2; weight decay -1", damaged, WISH,
                ("--seed -1", f"--seed {2**70}", "--batch 0", "--threads 0", "--momentum 2", "--weight-decay -1")),
    "108-110": ("hidden 0, as text, beyond memory", damaged, WISH,
                ("--hidden 0", "--hidden wide", "--hidden 1000000000000")),
    "111-115": ("unknown model, optimizer, activation, loss, chip", damaged, WISH,
                ("--model mpl", "--optimizer adamm", "--activation rel", "--loss mes", "--chip m9")),
    "116-120": ("unknown device, fidelity, precision, dataset, option", damaged, WISH,
                ("--device gpu", "--fidelity exakt", "--precision fp64",
                 "digitz --limit 128 --epochs 1 --device cpu --out r",
                 "--epoch 3 --out r")),
    "121": ("--loss mse", damaged, "test_a_loss_for_numbers_takes_rows_with_a_single_one", ()),
    "122-128": ("model file: syntax, import, class, no Module, arguments, no file, no class", damaged, WISH,
                ("wrong.py:Net", "imports.py:Net", "net.py:Missing", "net.py:three", "net.py:Needs", "none.py:Net",
                 "--model net.py")),
    "129-131": ("a model raises on import, in __init__, in forward", damaged, WISH,
                ("raises.py:Net", "net.py:Init", "net.py:Forward")),
    "132": ("sys.exit(7) in the file", damaged, WISH, ("net.py:Exits", "exits.py:Net")),
    "133-134": ("another number of outputs, another rank", damaged, WISH, ("net.py:One", "net.py:Net")),
    "136-140": ("no data; labels 10, -1, -100, 2^40", damaged, BATCH,
                ("no batches", "label 10", "label -1", "label -100", "label 2^40")),
    "141-142": ("data: nan, inf", damaged, BATCH, ("nan", "inf")),
    "143": ("data: 1e6", test_core,
            "test_largest_fp16_number_passes_and_the_next_is_refused_unless_the_example_shows_it", ()),
    "144-145": ("NumPy batches and a generator train", damaged, FORM, ("numpy", "generator")),
    "146-150": ("another shape, a triple, a dictionary, strings, a lone tensor", damaged, BATCH,
                ("another shape", "a triple", "a dict of batches", "strings", "a lone tensor")),
    "151": ("bytes", damaged, BATCH, ("pixels",)),
    "152": ("float64 trains", damaged, FORM, ("float64",)),
    "153": ("complex numbers", damaged, BATCH, ("complex",)),
    "154": ("labels as floats train, fractions are refused", damaged, BATCH, ("fractions as labels",)),
    "155-156": ("unlike lengths, an empty batch", damaged, BATCH, ("lengths", "an empty batch")),
    "157": ("a label out of range in validation", damaged, "test_validation_batches_that_do_not_do_are_refused",
            ("label 10",)),
}  # fmt: skip
#: Rows whose tests are below.
HERE = {90, 135}

#: What was tried against reliability -> where its test is, its name.
TRIALS: dict[str, tuple[ModuleType, str]] = {
    "kill -9 at random moments, also while a checkpoint is written; SIGTERM, a full disk": (
        runs, "test_an_end_at_any_moment_costs_no_bit"),
    "the same and SIGHUP fifty times, in three trainings": (runs, "test_fifty_ends_cost_no_bit"),
    "kill -9 before the first checkpoint": (runs, "test_a_failed_start_blocks_nothing"),
    "SIGINT after any step": (checkpoint, "test_an_interrupt_after_any_step_costs_no_bit"),
    "SIGINT twice": (checkpoint, "test_a_second_ctrl_c_changes_nothing"),
    "SIGINT while importing and compiling": (signals, "test_a_signal_while_importing_says_so_in_one_line"),
    "SIGINT at sixty moments of the start": (signals, "test_ctrl_c_at_any_moment_of_the_start_says_so_in_one_line"),
    "SIGTERM, SIGHUP": (runs, "test_signals_write_a_checkpoint_as_ctrl_c_does"),
    "a full disk": (runs, "test_a_full_disk_leaves_the_last_checkpoint_whole"),
    "a read-only place, a file as a folder": (test_core, "test_unwritable_place_is_an_environment_fault"),
    "two writers in one folder": (runs, "test_a_second_writer_is_told_the_process"),
    "several runs without a name": (runs, "test_default_folders_are_each_process_own"),
    "checkpoints within an epoch": (runs, "test_checkpoints_come_by_steps_and_some_are_kept"),
    "memory over 5,000 steps": (memory, "test_memory_stays_over_5_000_steps"),
    "damaged caches of datasets": (fetch, CACHE),
    "two fetches of one dataset at once": (fetch, "test_two_fetches_at_once_leave_whole_files"),
    "kill -9 in a fetch": (fetch, "test_a_fetch_that_is_killed_leaves_nothing_half_written"),
    "one empty cache of programs for two processes": (caches, "test_two_processes_may_begin_with_one_empty_cache"),
    "damaged caches of programs": (caches, "test_every_cached_file_may_be_damaged"),
}  # fmt: skip


def numbers(rows: str) -> range:
    first, _, last = rows.partition("-")
    return range(int(first), int(last or first) + 1)


def cases(test: object) -> list[str]:
    """What tells a parametrized test's cases apart: each value as text, words joined."""
    marks = getattr(test, "pytestmark", ())
    values = [value for mark in marks if mark.name == "parametrize" for value in mark.args[1]]
    flat = [part for value in values for part in (value if isinstance(value, tuple) else (value,))]
    return [" ".join(map(str, part)) if isinstance(part, tuple) else str(part) for part in flat]


def test_every_row_has_a_test_that_is_there() -> None:
    for rows, (what, module, name, wanted) in ROWS.items():
        known = cases(getattr(module, name))
        for case in wanted:
            assert any(text == case or text.endswith(f" {case}") for text in known), (rows, what, case)
    covered = [number for rows in ROWS for number in numbers(rows)]
    assert sorted([*covered, *HERE]) == list(range(1, 158))


@pytest.mark.parametrize("tried", TRIALS)
def test_every_trial_of_reliability_has_a_test_that_is_there(tried: str) -> None:
    module, name = TRIALS[tried]
    assert callable(getattr(module, name))


template, folder = damaged.template, damaged.folder


def test_a_program_computes_with_nan(folder: Path) -> None:
    """Row 90: it is told what the program gives for it, as the engine has no nan."""
    np.save("in.npy", np.full((2, 64), np.nan, np.float16))
    assert run_command(("run", "p", "--input", "x=in.npy")) == 0


def test_a_model_file_may_lie_anywhere(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Row 135: the user's own choice; a folder and other files are refused (`test_damaged`)."""
    (folder / "elsewhere").mkdir()
    (folder / "elsewhere" / "own.py").write_text(damaged.OWN)
    (folder / "here").mkdir()
    words = (*damaged.DIGITS, "--model", "here/../elsewhere/own.py:Own")
    assert run_command(words) == 0
    assert "Own" in capsys.readouterr().out
    assert {".:Net", "a.json:Net", "/etc/passwd:Net"} <= {
        text.rpartition(" ")[2] for text in cases(getattr(damaged, WISH))
    }
