"""What people found who tried the trainer as new users, and what they expect of one: each with the tests that hold it.

A: data lost, or wrong without a word. B: tracebacks. C: confusing, slow, missing. F: features that other trainers have.
The damaged inputs (E) and the trials of reliability (D) are in `tests/commands/test_damaged_rows.py`.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
RUNS, CHECKPOINT = "training/test_runs.py", "training/test_checkpoint.py"
DAMAGED, MORE = "commands/test_damaged.py", "commands/test_damaged_more.py"
REPORT, CLI, OPENING = "training/test_report.py", "test_cli.py", "training/datasets/test_opening.py"
CORE, PREDICTION, SCHEDULES = "test_core.py", "training/test_prediction.py", "training/test_schedules.py"
OPTIONS, LAST = "training/test_trainer_options.py", "training/test_last_batch.py"

#: Number -> (what was found, where its tests are, their names).
FOUND: dict[str, tuple[str, tuple[str, ...]]] = {
    "A1": (
        "two runs in one folder",
        (
            f"{RUNS}::test_a_second_writer_is_told_the_process",
            f"{RUNS}::test_default_folders_are_each_process_own",
        ),
    ),
    "A2": (
        "an incomplete checkpoint",
        (f"{CHECKPOINT}::test_what_is_not_whole_is_refused_and_changes_nothing",),
    ),
    "A3": (
        "nan",
        (f"{RUNS}::test_no_run_ends_well_with_nan", f"{CORE}::test_weights_that_are_not_finite_stop_the_run"),
    ),
    "A4": ("a failed start", (f"{RUNS}::test_a_failed_start_blocks_nothing",)),
    "A5": (
        "no checkpoint inside an epoch",
        (
            f"{RUNS}::test_checkpoints_come_by_steps_and_some_are_kept",
            f"{RUNS}::test_signals_write_a_checkpoint_as_ctrl_c_does",
        ),
    ),
    "A6": ("a resume that fails changes the run", (f"{RUNS}::test_a_resume_that_fails_touches_nothing",)),
    "A7": ("a run without its model", (f"{RUNS}::test_a_run_holds_its_model_and_works_from_elsewhere",)),
    "A8": (
        "a last, smaller batch",
        (
            f"{LAST}::test_the_last_batch_trains_as_in_pytorch_in_one_program",
            f"{LAST}::test_what_cannot_be_weighed_is_left_out_and_said_once",
        ),
    ),
    "A9": (
        "no checksum",
        (
            f"{CHECKPOINT}::test_one_flipped_bit_is_noticed",
            f"{DAMAGED}::test_one_bit_of_a_run_s_program_is_noticed",
        ),
    ),
    "A10": (
        "predict does not normalise",
        (
            f"{PREDICTION}::test_images_are_predicted_with_the_preprocessing_of_training",
            f"{DAMAGED}::test_bytes_are_pixels_of_the_training_data",
        ),
    ),
    "A11": ("a run folder is code", ("test_findings.py::test_that_a_run_folder_is_code_is_said",)),
    "B1": ("a loss that does not fit", (f"{DAMAGED}::test_a_loss_for_numbers_takes_rows_with_a_single_one",)),
    "B2": (
        "Ctrl-C at the start",
        (
            "training/test_signals.py::test_a_signal_while_importing_says_so_in_one_line",
            f"{CHECKPOINT}::test_a_second_ctrl_c_changes_nothing",
        ),
    ),
    "B3": (
        "common mistakes in Python",
        (
            f"{DAMAGED}::test_batches_that_do_not_do_are_refused",
            f"{DAMAGED}::test_batches_in_other_forms_do",
            f"{LAST}::test_a_number_of_epochs_below_zero_is_refused",
        ),
    ),
    "B4": ("metrics that cannot be read", (f"{RUNS}::test_metrics_that_cannot_be_read_block_nothing",)),
    "B5": ("a configuration that is none", (f"{RUNS}::test_a_configuration_that_is_none_is_said",)),
    "B6": ("foreign scalars", (f"{CHECKPOINT}::test_what_is_not_whole_is_refused_and_changes_nothing",)),
    "B7": (
        "headers and sizes that lie",
        (
            f"{DAMAGED}::test_an_array_that_does_not_do_is_refused",
            f"{DAMAGED}::test_an_impossible_wish_is_refused_and_leaves_nothing",
        ),
    ),
    "B8": (
        "faults of a user's model",
        ("commands/test_blame.py::test_a_fault_in_the_users_file_shows_the_users_line",),
    ),
    "B9": ("a reader that leaves", (f"{REPORT}::test_a_reader_that_leaves_does_not_stop_the_run",)),
    "C1": (
        "own data",
        (
            f"{OPENING}::test_a_folder_of_images_is_divided_by_class_and_normalised",
            f"{OPENING}::test_a_csv_file_to_regress",
            f"{OPENING}::test_npz_files_as_keras_and_numpy_users_write_them",
            f"{OPENING}::test_a_dataset_of_the_hub_in_a_folder",
        ),
    ),
    "C2": (
        "schedule, early stopping, best",
        (
            f"{SCHEDULES}::test_early_stopping_and_best_weights",
            f"{SCHEDULES}::test_options_together_resume_to_the_same_bits",
        ),
    ),
    "C3": (
        "the bar",
        (
            f"{REPORT}::test_the_bar_shows_count_percent_and_time_left",
            f"{REPORT}::test_no_line_is_wider_than_the_terminal_and_no_word_is_broken",
        ),
    ),
    "C4": ("words of ours", (f"{REPORT}::test_plain_lines_have_no_words_that_only_we_know",)),
    "C5": (
        "a slow start",
        (
            f"{CLI}::test_help_errors_and_listings_do_not_import_torch",
            "test_public_api.py::test_importing_all_of_it_takes_less_than_twice_torch",
        ),
    ),
    "C6": ("the time line", (f"{REPORT}::test_the_console_accounts_for_all_of_its_time",)),
    "C7": ("the bare command", (f"{CLI}::test_version_and_help",)),
    "C8": ("cut help", (f"{CLI}::test_a_summary_is_the_beginning_of_the_commands_own_help",)),
    "C9": (
        "no management of runs",
        (
            "commands/test_runs.py::test_the_list_has_every_run_with_its_state",
            "commands/test_runs.py::test_the_page_is_whole_and_needs_nothing_else",
            f"{REPORT}::test_tensorboard_holds_every_number",
        ),
    ),
    "C10": (
        "interrupted runs",
        (
            f"{PREDICTION}::test_an_interrupted_run_is_judged_by_its_checkpoint",
            f"{DAMAGED}::test_weights_beyond_the_engine_and_missing_ones_are_said",
        ),
    ),
    "C11": (
        "check: trains or not",
        ("commands/test_check.py::test_a_model_too_long_for_one_program_and_its_fix",),
    ),
    "C12": (
        "what may change on a resume",
        (f"{RUNS}::test_threads_and_device_may_change_on_resume_and_others_may_not",),
    ),
    "C13": ("noise on stderr", (f"{CLI}::test_plain_output_says_where_it_ran_and_what_to_type_next",)),
    "C14": (
        "advice that does not apply",
        (
            "commands/test_train.py::test_a_number_in_a_message_is_the_number_that_was_typed",
            f"{DAMAGED}::test_an_array_that_does_not_do_is_refused",
        ),
    ),
    "C15": (
        "options without their defaults, one index",
        (
            f"{RUNS}::test_a_run_s_configuration_names_every_option",
            f"{PREDICTION}::test_rows_are_chosen_by_number_and_range",
        ),
    ),
    "C16": (
        "arguments of a model, exports over exports",
        (
            "commands/test_train.py::test_a_model_file_takes_arguments",
            "training/test_exporting.py::test_trainer_export_reads_the_format_from_the_path",
        ),
    ),
    "C17": ("late divergence", (f"{DAMAGED}::test_training_that_goes_astray_says_so",)),
    "F own data by one command": (
        "",
        (f"{OPENING}::test_a_folder_of_images_is_divided_by_class_and_normalised",),
    ),
    "F own model with arguments": ("", ("commands/test_train.py::test_a_model_file_takes_arguments",)),
    "F validation, the test kept apart": (
        "",
        (
            f"{OPENING}::test_a_division_keeps_classes_in_proportion_and_depends_on_the_seed",
            f"{OPENING}::test_validation_of_a_known_dataset_comes_out_of_its_training_part",
        ),
    ),
    "F schedule, warm-up": ("", (f"{SCHEDULES}::test_schedules_are_torch_s",)),
    "F early stopping, best checkpoint": ("", (f"{SCHEDULES}::test_early_stopping_and_best_weights",)),
    "F checkpoint every n steps, on SIGTERM": (
        "",
        (
            f"{RUNS}::test_checkpoints_come_by_steps_and_some_are_kept",
            f"{RUNS}::test_signals_write_a_checkpoint_as_ctrl_c_does",
        ),
    ),
    "F exact resume within an epoch": ("", (f"{CHECKPOINT}::test_an_interrupt_after_any_step_costs_no_bit",)),
    "F augmentation": (
        "",
        (f"{PREDICTION}::test_a_run_with_augmentation_is_resumed_in_the_middle_of_an_epoch_bit_for_bit",),
    ),
    "F clipping, accumulation": ("", (f"{OPTIONS}::test_clipping_and_accumulation_follow_plain_pytorch",)),
    "F callbacks": ("", (f"{OPTIONS}::test_callbacks_by_the_names_of_keras_and_lightning",)),
    "F TensorBoard, W&B, MLflow, CSV": (
        "",
        (
            f"{REPORT}::test_tensorboard_holds_every_number",
            f"{REPORT}::test_other_trackers_where_they_are_installed",
            "commands/test_runs.py::test_metrics_csv_has_the_epochs_of_metrics_jsonl",
        ),
    ),
    "F curves, confusion, per class": (
        "",
        (
            "commands/test_runs.py::test_the_page_is_whole_and_needs_nothing_else",
            "training/test_analysis.py::test_class_scores_are_those_of_scikit_learn",
        ),
    ),
    "F list and compare runs": ("", ("commands/test_runs.py::test_compare_shows_what_differs",)),
    "F search": (
        "",
        ("commands/test_sweep.py::test_a_killed_sweep_goes_on_and_neither_loses_nor_repeats_a_trial",),
    ),
    "F progress with time left": ("", (f"{REPORT}::test_the_bar_shows_count_percent_and_time_left",)),
    "F configuration file": (
        "",
        ("commands/test_runs.py::test_init_writes_all_options_and_train_reads_them",),
    ),
    "F predict on files and folders": (
        "",
        (
            f"{PREDICTION}::test_images_are_predicted_with_the_preprocessing_of_training",
            f"{PREDICTION}::test_answers_as_csv_and_json",
        ),
    ),
    "F export, checked": ("", ("training/test_exporting.py::test_every_format_of_a_run",)),
    "F structured output, error codes": (
        "",
        (
            f"{CLI}::test_errors_have_code_exit_code_and_no_traceback",
            "docs/test_docs.py::test_every_error_code_is_documented_and_no_other",
        ),
    ),
    "F completion": ("", ("test_findings.py::test_completion_is_offered",)),
    "F memory and time before training": ("", (f"{CLI}::test_check_and_estimate",)),
    "F several devices": ("", ("training/test_torchrun.py::test_two_processes_give_the_bits_of_one",)),
    "F a run usable from any folder": ("", (f"{RUNS}::test_a_run_holds_its_model_and_works_from_elsewhere",)),
}


@pytest.mark.parametrize("number", FOUND)
def test_every_finding_has_tests_that_are_there(number: str) -> None:
    for place in FOUND[number][1]:
        file, _, name = place.partition("::")
        assert re.search(rf"^def {name}\(", (TESTS / file).read_text(), re.M), place


def test_all_findings_are_here() -> None:
    wanted = [f"{letter}{n}" for letter, last in (("A", 11), ("B", 9), ("C", 17)) for n in range(1, last + 1)]
    assert [number for number in FOUND if not number.startswith("F ")] == wanted


def test_that_a_run_folder_is_code_is_said() -> None:
    assert "**A run folder is code.**" in (TESTS.parent / "docs" / "training.md").read_text()


def test_completion_is_offered(capsys: pytest.CaptureFixture[str]) -> None:
    from ane_trainer.cli import run_command

    assert run_command(["--help"]) == 0
    assert "--install-completion" in capsys.readouterr().out
