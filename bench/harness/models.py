"""A small Llama with random weights. Nothing here imports logra_kernels."""

from typing import Any

from torch import Tensor, nn
from torch.nn import functional


def llama(
    *,
    blocks: int,
    width: int = 576,
    inner: int | None = None,
    vocabulary: int = 8192,
    key_value_heads: int | None = None,
    **options: Any,
) -> Any:
    """Heads of 64, in evaluation mode."""
    from transformers import LlamaConfig, LlamaForCausalLM

    heads = max(1, width // 64)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=inner or width * 8 // 3,
        num_hidden_layers=blocks,
        num_attention_heads=heads,
        num_key_value_heads=key_value_heads or heads,
        **options,
    )
    return LlamaForCausalLM(config).eval()


def summed_loss(model: nn.Module, ids: Tensor) -> Tensor:
    """Cross entropy of every token given those before it, summed over tokens and examples."""
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1]  # [N, T - 1, V]
    return functional.cross_entropy(
        logits.flatten(0, 1).float(), ids[:, 1:].flatten(), reduction="sum"
    )


def linear_weights(model: nn.Module) -> int:
    """How many weights the linear layers of the model have."""
    return sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.Linear))
