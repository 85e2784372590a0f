"""Task files: the four forms, what is labelled, and every input that is refused."""

from __future__ import annotations

import ast
import gzip
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from task_files import CONVERSATION, labelled_text, load, refused
from toy_tokenizers import CHAT, CHATTER, TAGGED_CHAT, TOKENIZER, VOCAB, byte_tokenizer, word_tokenizer
from transformers import ByT5Tokenizer

from qkov_dist.data import text_files
from qkov_dist.data.builtin import MAX_SAMPLES, builtin_samples
from qkov_dist.data.samples import IGNORED, task_fingerprint

# What is labelled


def test_text_labels_every_token_that_can_be_predicted(file: Callable[..., Path]) -> None:
    task = load(file({"text": "ab w"}))
    (sample,) = task.samples
    assert sample.input_ids.tolist() == [VOCAB["<s>"], VOCAB["ab"], VOCAB["Ġw"]]
    assert sample.labels.tolist() == [IGNORED, VOCAB["ab"], VOCAB["Ġw"]]
    assert (sample.input_ids.dtype, sample.labels.dtype) == (np.int64, np.int64)
    assert (task.name, sample.id, sample.text) == ("math", "math-1", "ab w")
    assert (sample.num_tokens, np.count_nonzero(sample.labels != -100)) == (3, 2)


def test_completion_alone_is_labelled_and_the_text_reads_on(file: Callable[..., Path]) -> None:
    task = load(file({"prompt": "x + y =", "completion": " w12"}))
    assert labelled_text(task) == " w12"
    assert task.samples[0].text == "x + y = w12"
    together = TOKENIZER("x + y = w12")["input_ids"]
    assert task.samples[0].input_ids.tolist() == together


def test_token_across_the_boundary_counts_as_completion(file: Callable[..., Path]) -> None:
    task = load(file({"prompt": "x1", "completion": "2y"}))
    assert labelled_text(task) == "12y"


def test_letter_of_several_bytes_is_labelled_whole(file: Callable[..., Path]) -> None:
    task = load(file({"prompt": "é", "completion": "→é"}))
    assert labelled_text(task) == "→é"
    assert np.count_nonzero(task.samples[0].labels != -100) == 5


def test_empty_prompt_is_a_text(file: Callable[..., Path]) -> None:
    task = load(file({"prompt": "", "completion": "ab w"}, {"text": "ab w"}))
    assert task.samples[0].labels.tolist() == task.samples[1].labels.tolist()


def test_appended_end_token_belongs_to_the_completion(file: Callable[..., Path]) -> None:
    tokenizer = byte_tokenizer(after="</s>")
    task = load(file({"prompt": "a", "completion": "c"}), tokenizer)
    assert labelled_text(task, tokenizer) == "c</s>"


class SlowWithBoth(ByT5Tokenizer):
    """Without offsets; the same token stands before and after a text."""

    def build_inputs_with_special_tokens(self, ids: list[int], *_: Any) -> list[int]:
        return [self.eos_token_id, *ids, self.eos_token_id]


@pytest.mark.parametrize(
    ("tokenizer", "front", "back"),
    [
        (TOKENIZER, "<s>", ""),
        (byte_tokenizer(after="</s>"), "<s>", "</s>"),
        (byte_tokenizer(before="</s> <s>"), "</s><s>", ""),
        (SlowWithBoth(), "</s>", "</s>"),
    ],
    ids=["fast", "with its end", "two tokens", "slow"],
)
def test_special_tokens_that_a_text_has_come_once(
    file: Callable[..., Path], tokenizer: Any, front: str, back: str
) -> None:
    def both(before: str, after: str) -> list[Any]:
        rows = [{"text": f"{before}ab w{after}"}, {"prompt": f"{before}ab", "completion": f" w{after}"}]
        return list(load(file(*rows), tokenizer, vocab_size=400).samples)

    plain, num_front = both("", ""), len(tokenizer(front, add_special_tokens=False)["input_ids"])
    for before, after in ((front, ""), ("", back), (front, back)):
        for expected, sample in zip(plain, both(before, after), strict=True):
            assert sample.input_ids.tolist() == expected.input_ids.tolist()
            assert sample.labels.tolist() == expected.labels.tolist()
    assert (plain[0].labels[:num_front] == IGNORED).all()
    assert (plain[0].labels[num_front:] != IGNORED).all()


def test_tokenizer_without_offsets_tokenizes_apart(file: Callable[..., Path]) -> None:
    tokenizer = ByT5Tokenizer()
    assert not tokenizer.is_fast
    task = load(file({"prompt": "ab", "completion": "cd"}), tokenizer, vocab_size=400)
    assert labelled_text(task, tokenizer) == "cd</s>"
    assert task.samples[0].input_ids.tolist() == tokenizer("abcd")["input_ids"]


def test_assistant_turns_by_rendering_one_message_more(file: Callable[..., Path]) -> None:
    task = load(file({"messages": CONVERSATION}), CHATTER)
    assert labelled_text(task, CHATTER) == "yes ab<|end|>no<|end|>"
    assert task.samples[0].text == "<|user|>hi<|end|><|assistant|>yes ab<|end|><|user|>so<|end|><|assistant|>no<|end|>"
    assert VOCAB["<s>"] not in task.samples[0].input_ids


def test_assistant_turns_as_the_template_marks_them(file: Callable[..., Path]) -> None:
    tokenizer = byte_tokenizer(TAGGED_CHAT)
    task = load(file({"messages": CONVERSATION}), tokenizer)
    assert labelled_text(task, tokenizer) == "yes abno"
    path = file({"messages": CONVERSATION})
    encoded = tokenizer.apply_chat_template(CONVERSATION, return_assistant_tokens_mask=True, return_dict=True)
    assert ((load(path, tokenizer).samples[0].labels != IGNORED) == np.array(encoded["assistant_masks"])).all()


def test_marked_turn_that_ends_between_tokens_ends_there(file: Callable[..., Path]) -> None:
    tokenizer = word_tokenizer(TAGGED_CHAT.replace("{{ message['content'] }}", " {{ message['content'] }} "))
    task = load(file({"messages": CONVERSATION}), tokenizer)
    assert labelled_text(task, tokenizer) == "yes ? no"


def test_assistant_turns_of_a_tokenizer_without_offsets(file: Callable[..., Path]) -> None:
    tokenizer = ByT5Tokenizer()
    tokenizer.chat_template = CHAT
    task = load(file({"messages": CONVERSATION}), tokenizer, vocab_size=400, max_positions=None)
    assert labelled_text(task, tokenizer) == "yes ab<|end|>no<|end|>"


def test_generation_prompt_that_the_turn_does_not_keep(file: Callable[..., Path]) -> None:
    tokenizer = byte_tokenizer(CHAT.replace("<|assistant|>{% endif %}", "<|assistant|>Think{% endif %}"))
    assert labelled_text(load(file({"messages": CONVERSATION}), tokenizer), tokenizer) == "yes ab<|end|>no<|end|>"


def test_given_ids_and_labels(file: Callable[..., Path]) -> None:
    rows = [{"input_ids": [5, 6, 7], "labels": [5, -100, 9]}, {"input_ids": [5, 6, 7]}]
    first, second = load(file(*rows)).samples
    assert first.labels.tolist() == [-100, -100, 9]
    assert second.labels.tolist() == [-100, 6, 7]
    assert first.text == TOKENIZER.decode([5, 6, 7])
    assert load(file(*rows), None).samples[0].text == ""


def test_padding_of_given_ids_is_taken_off(file: Callable[..., Path]) -> None:
    rows = [
        {"input_ids": [5, 6, 7], "attention_mask": [1, 1, 1], "labels": None, "token_type_ids": [0, 0, 0]},
        {"input_ids": [2, 2, 5, 6, 7, 2], "attention_mask": [0, 0, 1, 1, 1, 0], "labels": [-100, -100, 5, -100, 7, 9]},
    ]
    first, second = load(file(*rows)).samples
    assert (first.input_ids.tolist(), first.labels.tolist()) == ([5, 6, 7], [-100, 6, 7])
    assert (second.input_ids.tolist(), second.labels.tolist()) == ([5, 6, 7], [-100, -100, 7])


def test_null_is_as_good_as_no_key(file: Callable[..., Path]) -> None:
    """Tables give every row the columns of all."""
    empty = dict.fromkeys(("text", "prompt", "completion", "messages", "tools", "input_ids", "labels"))
    task = load(file({**empty, "text": "ab w"}, {**empty, "prompt": "ab", "completion": " w"}))
    assert [sample.text for sample in task.samples] == ["ab w", "ab w"]


def test_masked_labels_are_unshifted(file: Callable[..., Path]) -> None:
    path = file({"input_ids": [5, 6, 7], "labels": [8, -100, -100]})
    assert load(path, objective="masked").samples[0].labels.tolist() == [8, -100, -100]
    assert "at least one labelled token" in str(refused(path))


# Reading


def test_blank_lines_count_and_ids_follow_the_lines(file: Callable[..., Path]) -> None:
    task = load(file({"text": "a b"}, "", "  \t", {"text": "c d", "id": "own"}, {"text": "e f", "id": 7}, ""))
    assert [sample.id for sample in task.samples] == ["math-1", "own", "7"]


def test_first_samples_only_and_later_lines_unread(file: Callable[..., Path]) -> None:
    path = file({"text": "a b"}, {"text": "c d"}, "broken")
    assert [sample.text for sample in load(path, max_samples=2).samples] == ["a b", "c d"]
    assert refused(path, max_samples=3).where == f"{path}:3"


def test_windows_line_ends_and_byte_order_mark(tmp_path: Path) -> None:
    path = tmp_path / "dos.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "a b"}\r\n\r\n{"text": "c d"}\r\n')
    assert [sample.id for sample in load(path).samples] == ["math-1", "math-3"]


def test_gzip(tmp_path: Path) -> None:
    path = tmp_path / "task.jsonl.gz"
    path.write_bytes(gzip.compress(b'{"text": "a b"}\n{"text": "c d"}'))
    assert [sample.text for sample in load(path).samples] == ["a b", "c d"]


def test_max_tokens_cuts_the_end(file: Callable[..., Path]) -> None:
    (sample,) = load(file({"prompt": "abc", "completion": "defgh"}), max_tokens=5).samples
    assert sample.num_tokens == 5
    assert TOKENIZER.decode(sample.labels[sample.labels != IGNORED].tolist()) == "de"
    assert sample.text == "<s>abcde"


def test_max_tokens_makes_long_samples_acceptable(file: Callable[..., Path]) -> None:
    path = file({"text": "x" * 100})
    assert load(path, max_tokens=64).samples[0].num_tokens == 64
    assert load(path, max_positions=None).samples[0].num_tokens == 101


# What is refused, and where


@pytest.mark.parametrize(
    ("row", "key", "got"),
    [
        ({"text": ""}, ": text", "empty text"),
        ({"text": 3}, ": text", "int"),
        ({"text": None}, ": text", "NoneType"),
        ({"text": ["a"]}, ": text", "list"),
        ('{"text": "\\ud800 a"}', ": text", "half a surrogate pair at character 0"),
        ({"prompt": "a", "completion": ""}, ": completion", "empty text"),
        ({"prompt": 1, "completion": "b"}, ": prompt", "int"),
        ({"prompt": "a"}, "", "prompt"),
        ({"completion": "a"}, "", "completion"),
        ({"labels": [1]}, "", "labels"),
        ({"text": "a", "prompt": "b", "completion": "c"}, "", "text, prompt, completion"),
        ({"text": "a", "input_ids": [1]}, "", "text, input_ids"),
        ({"id": "x"}, "", "no such key"),
        ({}, "", "no such key"),
        ({"text": "ab", "id": True}, ": id", "True"),
        ({"text": "ab", "id": ""}, ": id", "''"),
        ({"text": "ab", "id": "a\nb"}, ": id", "'a\\nb'"),
        ({"text": "ab", "id": "a\0"}, ": id", "'a\\x00'"),
        ({"text": "ab", "id": None}, ": id", "None"),
        ({"text": "ab", "id": 1.5}, ": id", "1.5"),
        ({"input_ids": []}, ": input_ids", "an empty list"),
        ({"input_ids": "12"}, ": input_ids", "str"),
        ({"input_ids": [1, True]}, ": input_ids", "True at position 1"),
        ({"input_ids": [1, 2.0]}, ": input_ids", "2.0 at position 1"),
        ({"input_ids": [1, -1]}, ": input_ids", "-1 at position 1"),
        ({"input_ids": [1, 2, len(VOCAB)]}, ": input_ids", f"{len(VOCAB)} at position 2"),
        ({"input_ids": [1, 10**30]}, ": input_ids", f"{10**30} at position 1"),
        ({"input_ids": [1, -100]}, ": input_ids", "-100 at position 1"),
        ({"input_ids": [1, 2], "labels": [1]}, ": labels", "1"),
        ({"input_ids": [1, 2], "labels": [1, -99]}, ": labels", "-99 at position 1"),
        ({"input_ids": [1, 2], "labels": [1, 10**6]}, ": labels", "1000000 at position 1"),
        ({"input_ids": [1, 2], "attention_mask": [1]}, ": attention_mask", "[1]"),
        ({"input_ids": [1, 2, 3], "attention_mask": [1, 0, 1]}, ": attention_mask", "[1, 0, 1]"),
        ({"input_ids": [1, 2], "attention_mask": [0, 0]}, ": attention_mask", "[0, 0]"),
        ({"input_ids": [1, 2], "attention_mask": [1, 2]}, ": attention_mask", "[1, 2]"),
        ({"input_ids": [1, 2], "attention_mask": [True, True]}, ": attention_mask", "True"),
        ({"input_ids": [1, 2], "token_type_ids": [0, 1]}, ": token_type_ids", "other values"),
        ({"text": "ab", "attention_mask": [1, 1]}, "", "text, attention_mask"),
        ({"text": "ab", "tools": []}, "", "text, tools"),
        ({"text": None, "prompt": None}, "", "text, prompt"),
        ({"input_ids": [1, 2], "labels": [1, False]}, ": labels", "False at position 1"),
        ({"input_ids": [1, 2], "labels": [1, -100]}, "", "none among 2 tokens"),
        ({"input_ids": [1]}, "", "none among 1 tokens"),
        ({"input_ids": [1, 2], "labels": [-100, -100]}, "", "none among 2 tokens"),
        ({"messages": "hi"}, ": messages", "str"),
        ({"messages": ["hi"]}, ": messages.0", "str"),
        ({"messages": []}, ": messages", "no message with the role 'assistant'"),
        ({"messages": CONVERSATION[:1]}, ": messages", "no message with the role 'assistant'"),
        ({"messages": [{"role": "assistant"}]}, ": messages.0.content", "NoneType"),
        ({"messages": [{"role": "", "content": "a"}]}, ": messages.0.role", "empty text"),
        ({"messages": [{"content": "a"}]}, ": messages.0.role", "NoneType"),
        ({"messages": [{"role": "assistant", "content": 1}]}, ": messages.0.content", "int"),
        ({"messages": [{"role": "assistant", "content": [1]}]}, ": messages.0.content.0", "1"),
        (
            {"messages": [{"role": "assistant", "content": [{"type": "image"}]}]},
            ": messages.0.content.0",
            "one of type 'image'",
        ),
        (
            {"messages": [{"role": "assistant", "content": [{"type": "text"}]}]},
            ": messages.0.content.0.text",
            "NoneType",
        ),
        (
            {"messages": [{"role": "assistant", "content": None, "tool_calls": "f()"}]},
            ": messages.0.tool_calls",
            "'f()'",
        ),
        ({"messages": CONVERSATION, "tools": "f()"}, ": tools", "'f()'"),
        ({"messages": CONVERSATION, "tools": ["f"]}, ": tools", "['f']"),
        ({"prompt": CONVERSATION[:1], "completion": "yes"}, ": completion", "str"),
        ({"prompt": "hi", "completion": CONVERSATION[1:2]}, ": prompt", "str"),
        ({"prompt": CONVERSATION[:1], "completion": CONVERSATION[:1]}, ": completion", "no message with the role"),
        ("[1, 2]", "", "list"),
        ('"text"', "", "str"),
        ("null", "", "NoneType"),
        ("{", "", "Expecting property name enclosed in double quotes at column 2"),
        ('{"text": "a"} {"text": "b"}', "", "Extra data at column 15"),
        ('{"text": "a", "text": "b"}', "", "a key twice among ['text', 'text']"),
        ("[" * 100_000, "", "maximum recursion depth exceeded"),
        ("1" * 5000, "", "Exceeds the limit (4300 digits) for integer string conversion"),
    ],
)
def test_bad_rows_name_the_line(file: Callable[..., Path], row: object, key: str, got: str) -> None:
    path = file({"text": "fine"}, "", row)
    error = refused(path, CHATTER)
    assert error.where == f"{path}:3{key}"
    assert error.got.startswith(got)


def test_unknown_key_names_the_nearest(file: Callable[..., Path]) -> None:
    path = file({"text": "fine"}, {"prompt": "a", "completon": "b"})
    error = refused(path)
    assert error.where == f"{path}:2: completon"
    assert error.remedy == "The nearest valid key is 'completion'."


def test_unknown_key_near_none_is_told_all_that_there_are(file: Callable[..., Path]) -> None:
    remedy = refused(file({"question": "a", "completion": "b"})).remedy
    assert remedy.startswith("Valid keys are text, prompt, completion, tools, messages, ")


def test_repeated_id_names_both_lines(file: Callable[..., Path]) -> None:
    path = file({"text": "ab", "id": "x"}, {"text": "ab", "id": "math-3"}, {"text": "ab"})
    error = refused(path)
    assert error.where == f"{path}:3: id"
    assert error.got == f"'math-3' as at {path}:2"
    assert refused(file({"text": "ab", "id": 5}, {"text": "ab", "id": "5"})).where == f"{path}:2: id"


def test_too_long_for_the_model_names_max_tokens(file: Callable[..., Path]) -> None:
    path = file({"text": "fine"}, {"text": "x" * 64})
    error = refused(path)
    assert (error.where, error.got) == (f"{path}:2", "65 tokens")
    assert "64 tokens" in error.expected
    assert "max_tokens" in error.remedy
    assert refused(path, max_tokens=65).where == f"{path}:2"


def test_cut_that_leaves_no_label_names_the_setting(file: Callable[..., Path]) -> None:
    path = file({"prompt": "abcdef", "completion": "g"})
    error = refused(path, max_tokens=4)
    assert error.where == f"{path}:1"
    assert "max_tokens: 4" in error.got
    assert "max_tokens of task 'math'" in error.remedy


def test_tokenizer_of_another_model(file: Callable[..., Path]) -> None:
    path = file({"text": "ab"})
    error = refused(path, vocab_size=6)
    assert error.where == f"{path}:1: input_ids"
    assert "[0, 6)" in error.expected


def test_model_without_tokenizer(file: Callable[..., Path]) -> None:
    path = file({"input_ids": [1, 2]}, {"text": "ab"})
    assert refused(path, None).where == f"{path}:2"


def test_masked_models_need_given_labels(file: Callable[..., Path]) -> None:
    path = file({"text": "ab"})
    assert refused(path, objective="masked").where == f"{path}:1"
    path = file({"input_ids": [1, 2]})
    assert refused(path, objective="masked").where == f"{path}:1: labels"


def test_no_chat_template(file: Callable[..., Path]) -> None:
    path = file({"text": "ab"}, {"messages": CONVERSATION})
    error = refused(path)
    assert (error.where, error.got) == (f"{path}:2: messages", "none")


@pytest.mark.parametrize(
    ("template", "got"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{% for m in messages %}", "Unexpected end of template"),
        ("{{ messages[0]['content'] + 3 }}", "can only concatenate str"),
        ("{{ messages[9]['content']['x'] }}", "list object has no element 9"),
        ("{{ messages | length }}{{ messages[0]['content'] }}{{ add_generation_prompt }}", "other text"),
    ],
)
def test_template_that_does_not_take_the_messages(file: Callable[..., Path], template: str, got: str) -> None:
    path = file({"messages": CONVERSATION})
    error = refused(path, byte_tokenizer(template))
    assert error.where == f"{path}:1: messages"
    assert got in error.got


def test_marked_template_that_marks_nothing(file: Callable[..., Path]) -> None:
    path = file({"messages": CONVERSATION})
    tokenizer = byte_tokenizer(
        "{{ messages[0]['content'] }}{% if false %}{% generation %}{% endgeneration %}{% endif %}"
    )
    assert refused(path, tokenizer).got == "none among 2 tokens"


def test_missing_file_and_directory(tmp_path: Path) -> None:
    error = refused(tmp_path / "none.jsonl")
    assert (error.where, error.got) == (str(tmp_path / "none.jsonl"), "No such file or directory")
    assert (refused(tmp_path).where, refused(tmp_path).got) == (str(tmp_path), "Is a directory")


@pytest.mark.parametrize("content", ["", "\n\n", " "])
def test_empty_file(file: Callable[..., Path], content: str) -> None:
    path = file(content)
    assert (refused(path).where, refused(path).expected) == (str(path), "at least one sample")


def test_broken_gzip(tmp_path: Path) -> None:
    path = tmp_path / "task.jsonl.gz"
    path.write_bytes(b'{"text": "a b"}\n')
    assert "gzip" in refused(path).expected
    assert refused(path).where == str(path)
    noise = json.dumps({"text": "".join(chr(97 + i * i % 23) for i in range(50))}) + "\n"
    whole = gzip.compress("".join(noise.replace("a", str(i), 1) for i in range(3000)).encode())
    path.write_bytes(whole[: len(whole) // 2])
    error = refused(path, max_positions=None)
    assert error.where.startswith(f"{path}:")
    assert "end-of-stream" in error.got
    path.write_bytes(whole[:30] + bytes(40) + whole[70:])
    assert "a readable gzip file" in refused(path, max_positions=None).expected


def test_not_utf8_names_line_and_byte(tmp_path: Path) -> None:
    path = tmp_path / "latin.jsonl"
    path.write_bytes(b'{"text": "fine"}\n{"text": "caf\xe9"}\n')
    error = refused(path)
    assert error.where == f"{path}:2"
    assert error.got == "byte 0xe9 at byte 13 of the line"


def test_endless_line(file: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_files, "MAX_LINE_BYTES", 20)
    path = file({"text": "fine"}, {"text": "x" * 100})
    assert refused(path).where == f"{path}:2"


# Built-in tasks


@pytest.mark.parametrize("path", ["builtin:arithmetic", "builtin:python"])
def test_builtin_tasks_are_deterministic_and_distinct(path: str) -> None:
    assert len(list(builtin_samples(path))) == 100
    rows = list(builtin_samples(path, MAX_SAMPLES))
    assert list(builtin_samples(path, 50)) == rows[:50]
    assert len({(row["prompt"], row["completion"]) for row in rows}) == MAX_SAMPLES >= 500


def test_builtin_sums_are_right() -> None:
    number = r"\d+(?:\.\d+)?"
    expression = rf"{number}(?: [-+*] {number})*"
    for row in builtin_samples("builtin:arithmetic", 500):
        chains = re.findall(rf"{expression}(?: = {expression})+", row["completion"])
        assert chains or "place value" in row["prompt"]
        for chain in chains:
            values = [eval(side) for side in chain.split(" = ")]
            assert values == pytest.approx([values[0]] * len(values)), chain


def test_builtin_functions_run() -> None:
    for row in builtin_samples("builtin:python", 300):
        tree = ast.parse(row["prompt"] + row["completion"])
        (function,) = tree.body
        assert isinstance(function, ast.FunctionDef)
        assert ast.get_docstring(function)
        scope: dict[str, Any] = {}
        exec(compile(tree, "<sample>", "exec"), scope)
        if function.name == "term":
            assert scope["term"](2) > scope["term"](0)
        if function.name.startswith("clamp_"):
            assert scope[function.name](10**6) >= scope[function.name](-(10**6))


def test_builtin_tasks_load() -> None:
    task = load("builtin:python", max_samples=3, max_tokens=150, max_positions=150)
    assert [sample.id for sample in task.samples] == ["math-1", "math-2", "math-3"]
    assert all((sample.labels != -100).any() for sample in task.samples)


def test_builtin_tasks_have_limits() -> None:
    assert "builtin:python" in refused("builtin:pyhton").expected
    error = refused("builtin:python", max_samples=MAX_SAMPLES + 1)
    assert (error.where, error.got) == ("builtin:python", f"max_samples: {MAX_SAMPLES + 1}")


# Fingerprint


def test_fingerprint_sees_ids_and_labels_only(file: Callable[..., Path]) -> None:
    rows = [{"input_ids": [5, 6, 7]}, {"input_ids": [8, 9]}]
    base = task_fingerprint(load(file(*rows)))
    assert task_fingerprint(load(file(*({**row, "id": f"x{i}"} for i, row in enumerate(rows))), None)) == base
    others = [
        [{"input_ids": [5, 6, 8]}, {"input_ids": [8, 9]}],
        [{"input_ids": [5, 6, 7], "labels": [5, -100, 7]}, {"input_ids": [8, 9]}],
        [{"input_ids": [8, 9]}, {"input_ids": [5, 6, 7]}],
        [{"input_ids": [5, 6]}, {"input_ids": [7, 8, 9]}],
        rows[:1],
    ]
    prints = [task_fingerprint(load(file(*other))) for other in others]
    assert len({base, *prints}) == 1 + len(others)
