"""Language models as they come, and what they are tuned on: models, tokenizers, rows of tokens, generated answers.

A model is a folder, a GGUF file or a name on the Hugging Face hub. Data is a text, JSON lines, or a dataset of the
hub; a record is {"text"}, {"prompt", "completion"} (also question and answer, instruction and output) or {"messages"}.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import logging as plain_logging
import struct
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from ane_trainer.ane.errors import DataError, MissingDependency
from ane_trainer.training.datasets.batches import ArrayExamples, Batches
from ane_trainer.training.datasets.description import DataDescription
from ane_trainer.training.datasets.hub import read_hub
from ane_trainer.training.datasets.splits import VAL_SPLIT, Splits
from ane_trainer.training.datasets.text import SUFFIXES, read_text
from ane_trainer.training.language.own_loss import IGNORED

#: The names that records have for what is asked and what is to be answered.
_ASKED = ("prompt", "instruction", "question", "input")
_ANSWERED = ("completion", "response", "answer", "output")
#: Tokens of a row where none are asked for: of running text, and at most of records.
_TEXT_ROW, _LONGEST_ROW = 128, 512
#: Questions that are answered together at most.
_ROWS = 16

Messages = list[dict[str, str]]


class Tokenizer(Protocol):
    """What is used of the tokenizers of transformers."""

    eos_token_id: int | None
    pad_token_id: int | None
    chat_template: str | None

    def __call__(self, text: str, *, add_special_tokens: bool = True) -> Mapping[str, list[int]]: ...

    def apply_chat_template(
        self, conversation: list[Mapping[str, str]], *, tokenize: bool, add_generation_prompt: bool
    ) -> str: ...

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = False) -> str: ...

    def save_pretrained(self, save_directory: str) -> object: ...


@dataclass(frozen=True)
class Record:
    """A text, or a conversation whose assistant's turns are to be learned."""

    text: str = ""
    messages: tuple[Mapping[str, str], ...] = ()


@dataclass(frozen=True)
class RowOptions:
    """How records become rows: tokens of a row (None: as the data needs), rows that run on over records, the chat
    template, the share and number of records that are held out, records at most, rows of a batch, seed.
    """

    length: int | None = None
    packed: bool | None = None
    chat: bool = True
    val_split: float = VAL_SPLIT
    limit: int | None = None
    batch_size: int = 4
    seed: int = 0


# Models ------------------------------------------------------------------------------------------------------


def load_language_model(name: str) -> tuple[nn.Module, Tokenizer]:
    """(model in single precision, tokenizer) of a folder, a GGUF file or a name on the hub.

    DataError DATA119 for what is none of these or cannot be read; MissingDependency without transformers.
    """
    try:
        import transformers
    except ImportError as error:
        raise MissingDependency(
            f"{name}: needs transformers ({error}). Install it: pip install 'ane_trainer[lm]'."
        ) from None
    path, more = Path(name).expanduser(), dict[str, str]()
    if path.suffix.lower() == ".gguf" and not path.is_file():
        raise DataError(f"{name}: needs a GGUF file; there is none. Check the path.", code="DATA119")
    if path.suffix.lower() == ".gguf":
        path, more = path.parent, {"gguf_file": path.name}
    elif path.is_dir() and not (path / "config.json").exists() and len(found := [*path.glob("*.gguf")]) == 1:
        more = {"gguf_file": found[0].name}
    source = str(path) if path.exists() else name
    try:
        with _quiet():
            model = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32, **more)
            tokenizer = transformers.AutoTokenizer.from_pretrained(source, **more)
    except ImportError as error:
        raise MissingDependency(f"{name}: {error}. Install it: pip install 'ane_trainer[lm]'.") from None
    except (OSError, ValueError, KeyError, IndexError, OverflowError, EOFError, struct.error) as error:
        said = (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
        raise DataError(
            f"{name}: needs a causal language model: a folder with config.json, a GGUF file, or a name on the hub; "
            f"{said}. Check the path, or the network.",
            code="DATA119",
        ) from None
    if more:
        _forget_quantization(cast(nn.Module, model))
    return cast(nn.Module, model), cast(Tokenizer, tokenizer)


def _forget_quantization(model: nn.Module) -> None:
    """A GGUF model was dequantized when it was read: let it be saved as any other."""
    for holder, attribute in ((model.config, "quantization_config"), (model, "hf_quantizer")):
        vars(holder).pop(attribute, None)
    for attribute in ("is_quantized", "quantization_method"):
        vars(model).pop(attribute, None)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the progress bars and advice of transformers, within the block."""
    logging = importlib.import_module("transformers.utils.logging")
    before, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    hub = plain_logging.getLogger("huggingface_hub")  # a line for each of its tries to connect
    hub_level = hub.level
    hub.setLevel(plain_logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        hub.setLevel(hub_level)
        logging.set_verbosity(before)
        if bars:
            logging.enable_progress_bar()


# Records -----------------------------------------------------------------------------------------------------


def find_records(data: str) -> Path:
    """The file of records. DataError DATA101 if there is none."""
    path = Path(data).expanduser()
    if not data.startswith("hf:") and not path.is_file():
        raise DataError(
            f"{data}: needs a file of text or JSON lines, or hf:NAME; there is none. Check the path.",
            code="DATA101",
        )
    return path


def read_records(data: str) -> list[Record]:
    """The records of FILE.txt, FILE.jsonl or hf:NAME. DataError DATA115, DATA120 for what cannot be read."""
    if data.startswith("hf:"):
        found = read_hub(data.removeprefix("hf:"))
        part = found.get("train", next(iter(found.values())))
        return [record_of(row, f"{data}, row {number}") for number, row in enumerate(part, 1)]
    path = find_records(data)
    text = read_text(path)
    if path.suffix.lower() in SUFFIXES:
        return [Record(text=text)]
    records = []
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip():
            try:
                row = json.loads(line)
            except (json.JSONDecodeError, RecursionError) as error:
                raise DataError(
                    f"{path}, line {number}: needs a JSON object; {error}. Write one record a line.",
                    code="DATA120",
                ) from None
            records.append(record_of(row, f"{path}, line {number}"))
    return records


def record_of(row: object, where: str) -> Record:
    """A record out of JSON. DataError DATA120 for an object without a text, prompt and completion, or messages."""
    if isinstance(row, Mapping):
        messages = row.get("messages", row.get("conversations"))
        if isinstance(messages, list) and messages and all(map(_is_message, messages)):
            return Record(messages=tuple({"role": m["role"], "content": m["content"]} for m in messages))
        answer = next((row[name] for name in _ANSWERED if isinstance(row.get(name), str)), None)
        asked = [row[name] for name in _ASKED if isinstance(row.get(name), str) and row[name]]
        if answer is not None and asked:
            turns = (("user", "\n".join(asked)), ("assistant", answer))
            return Record(messages=tuple({"role": role, "content": text} for role, text in turns))
        if isinstance(row.get("text"), str):
            return Record(text=row["text"])
    got = f"keys {', '.join(map(str, row))}" if isinstance(row, Mapping) else type(row).__name__
    raise DataError(
        f'{where}: needs "text", "prompt" and "completion", or "messages" of role and content; got {got}. '
        "Rename the keys.",
        code="DATA120",
    )


def _is_message(value: object) -> bool:
    return isinstance(value, Mapping) and all(isinstance(value.get(key), str) for key in ("role", "content"))


# Rows --------------------------------------------------------------------------------------------------------


def tokens_of(record: Record, tokenizer: Tokenizer, chat: bool) -> tuple[list[int], list[int]]:
    """(token numbers, labels): of a conversation only the assistant's turns have labels that count."""
    end = [tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else []
    if not record.messages:
        ids = [*tokenizer(record.text)["input_ids"], *end]
        return ids, list(ids)
    if not (chat and tokenizer.chat_template):
        return _plain_turns(record, tokenizer, end)
    messages: Messages = [dict(message) for message in record.messages]
    ids = _templated(tokenizer, messages)
    labels = [IGNORED] * len(ids)
    for place, message in enumerate(messages):
        if message["role"] == "assistant":
            before = _templated(tokenizer, messages[:place], asked=True)
            after = _templated(tokenizer, messages[: place + 1])
            if ids[: len(before)] == before and ids[: len(after)] == after:
                labels[len(before) : len(after)] = ids[len(before) : len(after)]
    return ids, labels


def _templated(tokenizer: Tokenizer, messages: Sequence[Mapping[str, str]], asked: bool = False) -> list[int]:
    text = tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=asked)
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def _plain_turns(record: Record, tokenizer: Tokenizer, end: list[int]) -> tuple[list[int], list[int]]:
    ids: list[int] = []
    labels: list[int] = []
    for message in record.messages:
        answers = message["role"] == "assistant"
        part = tokenizer(message["content"] + ("" if answers else "\n"), add_special_tokens=not ids)[
            "input_ids"
        ]
        part = [*part, *end] if answers else part
        ids += part
        labels += part if answers else [IGNORED] * len(part)
    return ids, labels


def open_rows(data: str, tokenizer: Tokenizer, options: RowOptions) -> tuple[Splits, list[Record]]:
    """(rows of tokens for training and validation, the records held out). DataError DATA104 for too few.

    x and y of a batch are the token numbers and the labels [B, T]; the model moves labels by one itself.
    """
    records = read_records(data)[: options.limit]
    texts = all(not record.messages for record in records)
    order = np.random.Generator(np.random.PCG64([options.seed, 8])).permutation(len(records))
    count = round(len(records) * options.val_split)
    taken = set(order[: max(count, 1 if options.val_split and len(records) > 1 else 0)].tolist())
    parts = {
        "train": [tokens_of(r, tokenizer, options.chat) for n, r in enumerate(records) if n not in taken],
        "val": [tokens_of(r, tokenizer, options.chat) for n, r in enumerate(records) if n in taken],
    }
    packed = texts if options.packed is None else options.packed
    longest = max((len(ids) for part in parts.values() for ids, _ in part), default=0)
    length = options.length or (_TEXT_ROW if packed else min(-(-longest // 8) * 8, _LONGEST_ROW))
    if len(records) == 1 and options.val_split:  # one text: its end is held out
        ids, labels = parts["train"][0]
        cut = round(len(ids) * (1 - options.val_split) / length) * length
        parts = {"train": [(ids[:cut], labels[:cut])], "val": [(ids[cut:], labels[cut:])]}
    arrays = {name: rows_of(part, length, packed, tokenizer) for name, part in parts.items()}
    rows = {name: len(x) for name, (x, _) in arrays.items() if len(x)}
    if rows.get("train", 0) < options.batch_size:
        raise DataError(
            f"{data}: needs {options.batch_size} rows of {length} tokens for a batch; got {rows.get('train', 0)}. "
            "Give more data, or smaller --batch-size or --context.",
            code="DATA104",
        )
    cut_off = 0 if packed else sum(len(ids) > length for part in parts.values() for ids, _ in part)
    notes = (f"{cut_off:,} records are longer than {length} tokens and end there",) if cut_off else ()
    description = DataDescription(
        Path(data).name, "text", "next-token", (length,), source=data, examples=rows, notes=notes
    )
    batches = {
        name: Batches(
            ArrayExamples(*arrays[name]), description, split=name, batch_size=options.batch_size, seed=options.seed,
            shuffle=name == "train",
        )
        for name in rows
    }  # fmt: skip
    held_out = [record for number, record in enumerate(records) if number in taken and record.messages]
    return Splits(batches["train"], batches.get("val"), None, description), held_out


def rows_of(
    parts: Sequence[tuple[list[int], list[int]]], length: int, packed: bool, tokenizer: Tokenizer
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """(token numbers, labels) [N, T]: a record a row, or, packed, one stream of all records cut into rows.

    What a row lacks is filled at its end with tokens that have no label: causal attention keeps them from the others.
    """
    if packed:
        stream = [token for ids, _ in parts for token in ids], [label for _, own in parts for label in own]
        starts = range(0, len(stream[0]), length)
        parts = [(stream[0][n : n + length], stream[1][n : n + length]) for n in starts]
    filler = next((t for t in (tokenizer.pad_token_id, tokenizer.eos_token_id) if t is not None), 0)
    x = np.full((len(parts), length), filler, np.int64)
    y = np.full((len(parts), length), IGNORED, np.int64)
    for row, (ids, labels) in enumerate(parts):
        x[row, : len(ids)], y[row, : len(ids)] = ids[:length], labels[:length]
    kept = (y[:, 1:] != IGNORED).any(axis=1)
    return x[kept], y[kept]


# Answers -----------------------------------------------------------------------------------------------------


def asked_and_expected(record: Record) -> tuple[Messages, str]:
    """The messages before the last answer, and that answer."""
    messages = [dict(message) for message in record.messages]
    last = max(n for n, message in enumerate(messages) if message["role"] == "assistant")
    return messages[:last], messages[last]["content"]


def answers_of(
    model: nn.Module,
    tokenizer: Tokenizer,
    asked: Sequence[Messages | str],
    *,
    tokens: int = 48,
    chat: bool = True,
) -> list[str]:
    """What the model answers to each, the likeliest token at a time, by plain PyTorch on the host.

    Questions of one length are answered together: a token of one reads all weights, and one of many no more.
    """
    given = [_question(tokenizer, each, chat) for each in asked]
    found = [""] * len(given)
    for length in sorted(set(map(len, given))):
        alike = [n for n, ids in enumerate(given) if len(ids) == length]
        for part in (alike[n : n + _ROWS] for n in range(0, len(alike), _ROWS)):
            texts = _generated(model, tokenizer, [given[n] for n in part], tokens)
            for n, text in zip(part, texts, strict=True):
                found[n] = text
    return found


def _question(tokenizer: Tokenizer, asked: Messages | str, chat: bool) -> list[int]:
    if isinstance(asked, str):
        asked = [{"role": "user", "content": asked}]
    if chat and tokenizer.chat_template:
        return _templated(tokenizer, asked, asked=True)
    return tokenizer("".join(message["content"] + "\n" for message in asked))["input_ids"]


@torch.no_grad()
def _generated(model: nn.Module, tokenizer: Tokenizer, rows: Sequence[list[int]], tokens: int) -> list[str]:
    given = torch.tensor(rows)
    filler = tokenizer.pad_token_id or tokenizer.eos_token_id  # behind an answer that ends before others
    was_training = model.training
    model.eval()
    try:
        with _quiet():
            generate = cast(Callable[..., torch.Tensor], model.generate)
            out = generate(
                input_ids=given, attention_mask=torch.ones_like(given), max_new_tokens=tokens, do_sample=False,
                pad_token_id=filler,
            )  # fmt: skip
    finally:
        model.train(was_training)
    texts = []
    for row in out[:, given.shape[1] :].tolist():
        while row and row[-1] == filler:
            row.pop()
        texts.append(tokenizer.decode(row, skip_special_tokens=True).strip())
    return texts
