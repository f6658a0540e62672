"""Conversations: templates, who wrote what, and which tokens bear the loss."""

import re
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from tiny_lm import make_model, make_tokenizer, write_jsonl

from logra_kernels.lm import chat
from logra_kernels.lm.causal_lm import CausalLM
from logra_kernels.lm.corpus import Corpus, Example, TokenSettings

transformers = pytest.importorskip("transformers")

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA3 = (
    "<s>{% for m in messages %}[{{ m.role }}]\n\n{{ m.content | trim }}<eot>{% endfor %}"
    "{% if add_generation_prompt %}[assistant]\n\n{% endif %}"
)
MISTRAL = (
    "<s>{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
    "{% elif m.role == 'assistant' %} {{ m.content }}</s>"
    "{% else %}{{ raise_exception('no role ' + m.role) }}{% endif %}{% endfor %}"
)
# As Qwen3's: the last answer has a place for thoughts, the earlier ones have not.
QWEN3 = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and loop.last %}<think>\n\n</think>\n\n{% endif %}"
    "{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Writes how many messages there are before the first one.
COUNTING = "{{ messages | length }}" + CHATML

TALK = [
    {"role": "user", "content": "hi"},
    {"role": "assistant", "content": "hello"},
    {"role": "user", "content": "bye"},
    {"role": "assistant", "content": "see you"},
]
SHAREGPT = [
    {"from": {"user": "human", "assistant": "gpt"}[m["role"]], "value": m["content"]} for m in TALK
]


def with_template(template: str | None) -> Any:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


def read(path: Path, tokenizer: Any, **options: Any) -> list[Example]:
    return list(Corpus(path, tokenizer, TokenSettings(), **options))


def answers(example: Example, tokenizer: Any) -> list[str]:
    """The runs of tokens that bear the loss, as text."""
    bears = [i >= example.loss_start for i in range(len(example.tokens))]
    for start, end in example.no_loss:
        bears[start:end] = [False] * (end - start)
    runs = re.findall("1+", "".join("01"[b] for b in bears).replace("0", " "))
    assert sum(map(len, runs)) == sum(bears)
    found, start = [], 0
    for run in runs:
        start = next(i for i in range(start, len(bears)) if bears[i])
        found.append(tokenizer.decode(example.tokens[start : start + len(run)]))
        start += len(run)
    return found


@pytest.mark.parametrize(
    ("template", "wanted"),
    [
        (CHATML, ["hello<|im_end|>", "see you<|im_end|>"]),
        (LLAMA3, ["hello<eot>", "see you<eot>"]),
        (MISTRAL, [" hello</s>", " see you</s>"]),
        (QWEN3, ["hello<|im_end|>", "<think>\n\n</think>\n\nsee you<|im_end|>"]),
        (None, ["hello", "see you"]),
    ],
)
def test_the_loss_is_on_what_the_assistant_wrote(
    tmp_path: Path, template: str | None, wanted: list[str]
) -> None:
    tokenizer = with_template(template)
    path = write_jsonl(tmp_path / "a.jsonl", [{"messages": TALK}])
    (example,) = read(path, tokenizer)
    assert answers(example, tokenizer) == wanted
    assert Example.from_metadata(example.id, example.metadata()) == example


def test_the_first_question_is_the_title(tmp_path: Path) -> None:
    long = {"role": "user", "content": "What\n is  this? " + "x" * 80}
    rows = [{"messages": TALK}, {"messages": [long, TALK[1]]}, {"messages": TALK[1:2]}]
    path = write_jsonl(tmp_path / "a.jsonl", [{**row, "name": "own"} for row in rows])
    tokenizer = with_template(CHATML)
    titles = [example.title for example in read(path, tokenizer)]
    assert titles == ["hi", "What is this? " + "x" * 66, ""]
    assert {example.title for example in read(path, tokenizer, title_field="name")} == {"own"}


def test_an_assistant_that_speaks_first(tmp_path: Path) -> None:
    tokenizer = with_template(CHATML)
    path = write_jsonl(tmp_path / "a.jsonl", [{"messages": TALK[1:]}])
    (example,) = read(path, tokenizer)
    assert answers(example, tokenizer) == ["hello<|im_end|>", "see you<|im_end|>"]


def test_all_tokens_by_choice(tmp_path: Path) -> None:
    tokenizer = with_template(CHATML)
    path = write_jsonl(tmp_path / "a.jsonl", [{"messages": TALK}])
    (example,) = read(path, tokenizer, chat_loss="all")
    assert (example.loss_start, example.no_loss) == (1, ())
    assert example.text == tokenizer.apply_chat_template(TALK, tokenize=False)
    prints = [Corpus(path, tokenizer, TokenSettings(), chat_loss=loss) for loss in chat.CHAT_LOSSES]
    assert prints[0].fingerprint()["chat"]["loss"] != prints[1].fingerprint()["chat"]["loss"]


def test_a_plain_text_where_there_is_no_template(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"messages": TALK}])
    (example,) = read(path, with_template(None))
    assert example.text == "User: hi\n\nAssistant: hello\n\nUser: bye\n\nAssistant: see you"


def test_the_forms_of_a_conversation_agree(tmp_path: Path) -> None:
    tokenizer = with_template(CHATML)
    write_jsonl(tmp_path / "a.jsonl", [{"messages": TALK, "id": 7}])
    write_jsonl(tmp_path / "b.jsonl", [{"conversations": SHAREGPT, "id": 7}])
    write_jsonl(tmp_path / "c.jsonl", [{"text": "no", "talk": TALK, "id": 7}])
    table = pyarrow.Table.from_pylist([{"messages": [{**m, "name": None} for m in TALK], "id": 7}])
    pyarrow.parquet.write_table(table, tmp_path / "d.parquet")
    (first,) = read(tmp_path / "a.jsonl", tokenizer, id_field="id")
    assert read(tmp_path / "b.jsonl", tokenizer, id_field="id") == [first]
    assert read(tmp_path / "d.parquet", tokenizer, id_field="id") == [first]
    (third,) = read(tmp_path / "c.jsonl", tokenizer, id_field="id", messages_field="talk")
    assert third.metadata() == {**first.metadata(), "fields": {"text": "no"}}


def test_a_field_text_comes_first(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": "plain", "messages": TALK}])
    assert [e.text for e in read(path, with_template(CHATML))] == ["plain"]


def test_special_tokens_of_the_template_are_not_doubled(tmp_path: Path) -> None:
    """The template writes <s>, which the tokenizer puts before every text as well."""
    import tokenizers

    tokenizer = with_template(LLAMA3)
    tokenizer.backend_tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 0)]
    )
    assert tokenizer("a")["input_ids"][0] == 0
    path = write_jsonl(tmp_path / "a.jsonl", [{"messages": TALK}])
    (example,) = read(path, tokenizer)
    assert example.tokens.count(0) == 1
    # The plain form has one too, from the tokenizer.
    tokenizer.chat_template = None
    (example,) = read(path, tokenizer)
    assert example.tokens.count(0) == 1


def test_a_cut_conversation_with_no_answer_left_is_counted(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"messages": TALK}, {"messages": TALK[:2]}])
    tokenizer = with_template(None)
    corpus = Corpus(path, tokenizer, TokenSettings(max_tokens=26))
    assert [answers(e, tokenizer) for e in corpus] == [["hello"], ["hello"]]
    corpus = Corpus(path, tokenizer, TokenSettings(max_tokens=8))
    with pytest.raises(ValueError, match="holds no text"):
        list(corpus)
    assert corpus.num_skipped == 2
    # Split, the pieces with a part of an answer are kept, and keep their numbers. The first token
    # of a piece (here the e of "see") has nothing before it, and is not predicted.
    pieces = list(Corpus(path, tokenizer, TokenSettings(max_tokens=13, long="split"), limit=3))
    assert [(e.id, answers(e, tokenizer)) for e in pieces] == [
        ("0#1", ["hello"]),
        ("0#3", ["se"]),
        ("0#4", [" you"]),
    ]


def test_the_loss_is_summed_over_the_answers_only(tmp_path: Path) -> None:
    """Against the log-probabilities of the answers' tokens, one by one, in float64.

    1e-5: the model runs in float32, whose sums of 20 terms of about 6 err by about 1e-6 of them.
    """
    import torch

    folder = make_model(tmp_path / "model")
    with_template(CHATML).save_pretrained(folder)
    lm = CausalLM.load(folder)
    path = write_jsonl(tmp_path / "a.jsonl", [{"messages": TALK}, {"messages": TALK[:2]}])
    examples = read(path, lm.tokenizer)
    with torch.no_grad():
        got = lm.summed_loss(lm.collate(examples))
        wanted = 0.0
        for example in examples:
            logits = lm.model(input_ids=torch.tensor([example.tokens])).logits[0].double()
            logs = logits.log_softmax(-1)
            for i in range(example.loss_start, len(example.tokens)):
                if not any(start <= i < end for start, end in example.no_loss):
                    wanted -= float(logs[i - 1, example.tokens[i]])
    assert float(got) == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("hi", "messages: expected a list of messages, got str"),
        ([], "messages: expected a list of messages, got an empty list"),
        (["hi"], r'messages\[0\]: expected "role" and "content", or "from" and "value", got str'),
        ([{"who": "me"}], r'messages\[0\]: expected "role" and .*, got the keys who'),
        ([*TALK, {"role": "user"}], r"messages\[4\]\.content: expected a string, got nothing"),
        ([{"role": "user", "content": 3}], r"messages\[0\]\.content: expected a string, got int"),
        ([{"from": 1, "value": "x"}], r"messages\[0\]\.from: expected a string, got int"),
        (
            [{"role": "judge", "content": "x"}],
            "messages: the chat template refuses .* no role judge",
        ),
    ],
)
def test_bad_conversations_are_named(tmp_path: Path, value: Any, message: str) -> None:
    rows = [{"messages": TALK}, {"messages": value}]
    path = write_jsonl(tmp_path / "a.jsonl", rows)
    with pytest.raises(ValueError, match=rf"data: .*a\.jsonl, line 2: {message}"):
        read(path, with_template(MISTRAL))


def test_a_template_that_changes_earlier_turns_is_refused(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"messages": TALK}])
    tokenizer = with_template(COUNTING)
    with pytest.raises(ValueError, match=r"line 1: messages: the chat template .* --chat-loss all"):
        read(path, tokenizer)
    assert len(read(path, tokenizer, chat_loss="all")) == 1


def test_conversations_have_no_text_field(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"messages": TALK, "q": "x"}])
    with pytest.raises(ValueError, match="messages_field: a conversation has no text_field"):
        read(path, with_template(CHATML), messages_field="messages", prompt_field="q")
    with pytest.raises(ValueError, match="chat_loss: all is for conversations, but there are none"):
        read(write_jsonl(path, [{"text": "ab"}]), with_template(CHATML), chat_loss="all")
    with pytest.raises(ValueError, match="no field 'messages' "):
        read(write_jsonl(path, [{"a": "b"}]), with_template(CHATML), messages_field="messages")
