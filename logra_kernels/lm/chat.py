"""Conversations as text: the model's chat template, and which characters the assistant wrote."""

from collections.abc import Sequence
from typing import Any

CHAT_FIELDS = ("messages", "conversations")
CHAT_LOSSES = ("assistant", "all")
ASSISTANT = "assistant"
# ShareGPT's keys and roles, beside those of OpenAI.
KEYS = (("role", "content"), ("from", "value"))
ROLES = {"human": "user", "gpt": ASSISTANT}
# Stands for an answer, to see what a template writes after one.
MARK = "logra-mark"

Message = dict[str, Any]
Spans = tuple[tuple[int, int], ...]  # of characters: where the loss is


def conversation(value: Any, place: str) -> list[Message]:
    """Messages {"role", "content", …} of a field that holds OpenAI's or ShareGPT's form.

    Raises:
        ValueError: it holds something else; the message begins with `place`.
    """
    if not isinstance(value, list) or not value:
        got = "an empty list" if value == [] else type(value).__name__
        raise ValueError(f"{place}: expected a list of messages, got {got}")
    return [_message(entry, f"{place}[{number}]") for number, entry in enumerate(value)]


def _message(entry: Any, place: str) -> Message:
    keys = entry if isinstance(entry, dict) else {}
    told, said = next((pair for pair in KEYS if pair[0] in keys), ("", ""))
    if not told:
        got = f"the keys {', '.join(keys)}" if keys else type(entry).__name__
        raise ValueError(
            f'{place}: expected "role" and "content", or "from" and "value", got {got}'
        )
    role, content = entry[told], entry.get(said)
    if not isinstance(role, str):
        raise ValueError(f"{place}.{told}: expected a string, got {type(role).__name__}")
    # What calls a tool may say nothing; a list holds parts of text and pictures.
    allowed = str if not entry.get("tool_calls") else (str, type(None))
    if not isinstance(content, allowed) and not isinstance(content, list):
        got = "nothing" if said not in entry else type(content).__name__
        raise ValueError(f"{place}.{said}: expected a string, got {got}")
    # A Parquet column gives every message every key.
    more = {k: v for k, v in entry.items() if k not in (told, said) and v is not None}
    return {**more, "role": ROLES.get(role, role), "content": content}


def topic(messages: Sequence[Message]) -> str:
    """What the user says first, on one line of at most 80 characters; "" if nobody asks."""
    said = (m["content"] for m in messages if m["role"] == "user" and isinstance(m["content"], str))
    return " ".join(next(said, "").split())[:80].rstrip()


def has_template(tokenizer: Any) -> bool:
    """Whether the tokenizer brings a chat template."""
    return bool(getattr(tokenizer, "chat_template", None))


def write(
    messages: Sequence[Message], tokenizer: Any, loss: str, place: str
) -> tuple[str, Spans | None]:
    """A conversation as text, and the spans of characters that bear the loss; None for all.

    With the loss on the assistant's tokens there is a span for each of its messages. With a chat
    template it begins where a generation would, and ends with the template's end of a turn. Without
    one the text is "Role: content" for each message, an empty line between two, and a span is an
    answer's content.

    Raises:
        ValueError: the template refuses the messages, or changes earlier turns, so that what the
            assistant wrote cannot be told; the message begins with `place`.
    """
    if not has_template(tokenizer):
        text, answers = _plain(messages, place)
        return text, answers if loss == ASSISTANT else None
    text = _render(messages, tokenizer, place)
    return text, _answers(text, messages, tokenizer, place) if loss == ASSISTANT else None


def _answers(text: str, messages: Sequence[Message], tokenizer: Any, place: str) -> Spans:
    """Where the assistant's messages stand in the text that the template made of all."""
    if all(message["role"] != ASSISTANT for message in messages):
        return ()
    end = _end_of_turn(tokenizer, place)
    spans: list[tuple[int, int]] = []
    for number, message in enumerate(messages):
        if message["role"] != ASSISTANT:
            continue
        head = _head(text, messages[:number], message, tokenizer, place)
        found = text.find(end, len(head)) if end else -1
        last = number == len(messages) - 1
        if not text.startswith(head) or (found < 0 and not last):
            raise ValueError(
                f"{place}: the chat template writes the first {number} messages otherwise than"
                " without those that follow, so the assistant's tokens cannot be told; use"
                " --chat-loss all"
            )
        spans.append((len(head), len(text) if found < 0 else found + len(end)))
    return tuple(spans)


def _head(
    text: str, before: Sequence[Message], message: Message, tokenizer: Any, place: str
) -> str:
    """What the template writes before an answer; nothing can be rendered before the first."""
    if before:
        return _render(before, tokenizer, place, add_generation_prompt=True)
    content = message["content"]
    return text[: max(0, text.find(content.strip()))] if isinstance(content, str) else ""


def ask(question: str, tokenizer: Any, place: str) -> str:
    """A question in the chat template, up to where the answer begins.

    Raises:
        ValueError: the template refuses it; the message begins with `place`.
    """
    messages = [{"role": "user", "content": question}]
    return _render(messages, tokenizer, place, add_generation_prompt=True)


def _render(messages: Sequence[Message], tokenizer: Any, place: str, **options: Any) -> str:
    from jinja2 import TemplateError

    try:
        return str(tokenizer.apply_chat_template(list(messages), tokenize=False, **options))
    except (TemplateError, TypeError, KeyError, ValueError) as error:
        raise ValueError(f"{place}: the chat template refuses the messages: {error}") from error


def _end_of_turn(tokenizer: Any, place: str) -> str:
    """What the template writes after an answer, without the white space at its end."""
    pair = [{"role": "user", "content": "a"}, {"role": ASSISTANT, "content": MARK}]
    return _render(pair, tokenizer, place).rpartition(MARK)[2].rstrip()


def _plain(messages: Sequence[Message], place: str) -> tuple[str, Spans]:
    text, spans = "", []
    for number, message in enumerate(messages):
        content = message["content"]
        if not isinstance(content, str):
            raise ValueError(
                f"{place}[{number}]: expected a string, for the tokenizer has no chat template,"
                f" got {type(content).__name__}"
            )
        text += f"{message['role'].capitalize()}: "
        if message["role"] == ASSISTANT:
            spans.append((len(text), len(text) + len(content)))
        text += content + ("\n\n" if number < len(messages) - 1 else "")
    return text, tuple(spans)
