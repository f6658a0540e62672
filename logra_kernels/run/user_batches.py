"""The examples of a batch as a user's loader gives it: tensors in dictionaries, tuples, lists."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

_IDS = ("id", "ids", "index", "data_id")  # keys of what names an example, and is no part of it
_IGNORED = -100  # the label of a token that bears no loss


def num_examples(batch: Any) -> int:
    """N: the first axis of the batch's first tensor, else the length of its first list.

    Raises: ValueError if there is neither.
    """
    for leaf in _leaves(batch):
        if isinstance(leaf, Tensor) and leaf.ndim:
            return int(leaf.shape[0])
    for leaf in _leaves(batch):
        if isinstance(leaf, (list, tuple)):
            return len(leaf)
    raise ValueError(
        "batches: expected tensors whose first axis is the examples, or lists of them, got "
        f"{type(batch).__name__}"
    )


def example_alone(batch: Any, place: int, *, trim: bool = True) -> Any:
    """The example at `place` as a batch of one.

    With `trim`, a batch with an "attention_mask" [N, T] loses the example's padding: of every
    tensor [N, T, …] the columns are kept where the mask is not 0.
    """
    count, mask = num_examples(batch), padding_mask(batch)
    kept = None if mask is None or not trim else mask[place] != 0  # [T]
    if kept is not None and not kept.any():
        kept = None  # a text of no token is none that a model takes

    def part(leaf: Any) -> Any:
        if isinstance(leaf, Tensor):
            if leaf.ndim == 0 or leaf.shape[0] != count:
                return leaf
            one = leaf[place : place + 1]
            if kept is not None and one.ndim > 1 and one.shape[1] == len(kept):
                one = one[:, kept.to(one.device)]
            return one
        is_list = isinstance(leaf, (list, tuple)) and len(leaf) == count
        return leaf[place : place + 1] if is_list else leaf

    return _map(batch, part)


def mask_reader(
    mask: str | Callable[[Any], Any] | None,
) -> Callable[[Any], Any]:
    """A function from a batch to its mask [N, T]: by the batch's key, as it is given, or None."""

    def of_key(batch: Any) -> Tensor:
        try:
            found: Tensor = batch[mask]
        except (KeyError, TypeError, IndexError):
            raise ValueError(
                f"mask: the batch, a {type(batch).__name__}, has no {mask!r}"
            ) from None
        return found

    if mask is None:
        return lambda batch: None
    if isinstance(mask, str):
        return of_key
    if callable(mask):
        return mask
    raise ValueError(f"mask: expected the batch's key, or a function of a batch, got {mask!r:.60}")


def padding_mask(batch: Any) -> Tensor | None:
    """The batch's "attention_mask" [N, T], if it has one of two axes."""
    return _entry(batch, "attention_mask", 2)


def tokens_of(batch: Any) -> Tensor | None:
    """The batch's "input_ids" [N, T], if it has them."""
    return _entry(batch, "input_ids", 2)


def counted_tokens(batch: Any, mask: Tensor | None) -> tuple[Tensor, Tensor] | None:
    """(tokens of each example that count [N], tokens that it has [N]), where that can be told.

    A token counts where `mask` [N, T] is 1 and the label, if "labels" has that shape, is not -100.
    """
    padding, labels = padding_mask(batch), _entry(batch, "labels", 2)
    like = next((t for t in (mask, padding, labels) if t is not None), None)
    if like is None or (mask is None and labels is None):
        return None
    counted = torch.ones(like.shape, dtype=torch.bool)
    for tensor, ignored in ((mask, 0), (padding, 0), (labels, _IGNORED)):
        if tensor is not None and tensor.shape == counted.shape:
            counted &= tensor.cpu() != ignored
    whole = padding if padding is not None and padding.shape == counted.shape else None
    have = torch.full((len(counted),), counted.shape[1]) if whole is None else (whole != 0).sum(1)
    return counted.sum(1), have.cpu()


@dataclass
class ReadExamples:
    """What reading a user's batches shows, without the model. Examples have numbers from 0.

    first: the batches that hold the first examples.
    count: how many examples were read; `all_read` if there are no more.
    tokens: of each example, how many tokens count and how many it has; empty if that is not known.
    copies: pairs of an example and the earlier one that it repeats.
    doubled_bos: examples that begin with two BOS tokens, if they have token ids (`has_ids`).
    """

    first: list[Any] = field(default_factory=list)
    count: int = 0
    all_read: bool = True
    tokens: list[tuple[int, int]] = field(default_factory=list)
    copies: list[tuple[int, int]] = field(default_factory=list)
    doubled_bos: list[int] = field(default_factory=list)
    has_ids: bool = False


def read_examples(
    batches: Iterable[Any],
    mask_of: Callable[[Any], Any],
    alone: Callable[[Any, int], Any],
    bos_token_id: int | None,
    first: int,
    most: int,
) -> ReadExamples:
    """Read batches until `most` examples were read; keep those with the first `first` examples.

    Raises: ValueError if there is no batch, or a batch without tensors and lists.
    """
    seen, numbers = ReadExamples(), dict[bytes, int]()
    for batch in batches:
        if seen.count >= most:
            seen.all_read = False
            break
        if seen.count < first:
            seen.first.append(batch)
        mask = mask_of(batch)
        told = isinstance(mask, Tensor) and mask.ndim == 2  # one mask, not one for each part
        counted = counted_tokens(batch, mask if told else None)
        if counted is not None:
            seen.tokens += list(zip(*(part.tolist() for part in counted), strict=True))
        for place in range(num_examples(batch)):
            one = alone(batch, place)
            earlier = numbers.setdefault(digest(one), seen.count)
            if earlier != seen.count:
                seen.copies.append((seen.count, earlier))
            ids = tokens_of(one)
            seen.has_ids |= ids is not None
            if ids is not None and ids.flatten()[:2].tolist() == [bos_token_id] * 2:
                seen.doubled_bos.append(seen.count)
            seen.count += 1
    if not seen.first:
        raise ValueError("batches: expected at least one batch, got none")
    return seen


def digest(example: Any) -> bytes:
    """A hash of an example alone: its tokens and labels if it has tokens, else all but its id."""
    if isinstance(example, Mapping):
        keys = [key for key in ("input_ids", "labels") if key in example]
        if "input_ids" not in example:
            keys = [key for key in example if key not in _IDS]
        example = [example[key] for key in keys]
    found = hashlib.sha256()
    for leaf in _leaves(example):
        if isinstance(leaf, Tensor):
            found.update(f"{leaf.dtype} {list(leaf.shape)}".encode())
            found.update(leaf.detach().cpu().flatten().view(torch.uint8).numpy().tobytes())
        else:
            found.update(repr(leaf).encode())
    return found.digest()


def _entry(batch: Any, key: str, axes: int) -> Tensor | None:
    found = batch.get(key) if isinstance(batch, Mapping) else None
    return found if isinstance(found, Tensor) and found.ndim == axes else None


def _leaves(batch: Any) -> Iterator[Any]:
    found: list[Any] = []
    _map(batch, found.append)
    return iter(found)


def _map(batch: Any, change: Callable[[Any], Any]) -> Any:
    """The same structure of dictionaries, tuples and lists of tensors, its leaves changed.

    A list without tensors is a leaf, with an entry for each example; so is a tuple of such entries.
    """
    if isinstance(batch, Mapping):
        changed = {key: _map(value, change) for key, value in batch.items()}
        kind: Any = type(batch)
        return changed if kind is dict else kind(changed)
    inside = (Tensor,) if isinstance(batch, list) else (Tensor, Mapping, list, tuple)
    if isinstance(batch, (list, tuple)) and any(isinstance(inner, inside) for inner in batch):
        parts = [_map(inner, change) for inner in batch]
        kind = type(batch)
        return kind(*parts) if hasattr(kind, "_fields") else kind(parts)
    return change(batch)
