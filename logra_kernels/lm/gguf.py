"""A Llama model in a GGUF file, written out as an ordinary Hugging Face folder.

transformers reads GGUF files too, but takes half a minute and returns a model that it refuses to
save. Reading the tensors with `gguf` takes seconds, and the folder that is written loads in less
than one.
"""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

# GGUF's name of a block's tensor -> transformers' name inside model.layers.<block>.
BLOCK_TENSORS = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
TOP_TENSORS = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}


def undo_rotary_permutation(weight: np.ndarray, num_heads: int) -> np.ndarray:
    """Reorder the rows of a query or key projection from llama.cpp's layout to transformers'.

    llama.cpp keeps the two halves of a rotary pair side by side, transformers half a head apart:
    weight [num_heads * head_dim, I], rows (head, pair, half) -> rows (head, half, pair).
    """
    rows, columns = weight.shape
    split = weight.reshape(num_heads, rows // num_heads // 2, 2, columns)
    return np.ascontiguousarray(split.swapaxes(1, 2)).reshape(rows, columns)


def hugging_face_name(gguf_name: str) -> str:
    """`blk.3.ffn_up.weight` -> `model.layers.3.mlp.up_proj.weight`.

    Raises:
        ValueError: a name that no Llama model has.
    """
    if gguf_name in TOP_TENSORS:
        return TOP_TENSORS[gguf_name]
    parts = gguf_name.split(".")
    if len(parts) == 4 and parts[0] == "blk" and parts[2] in BLOCK_TENSORS:
        return f"model.layers.{parts[1]}.{BLOCK_TENSORS[parts[2]]}.{parts[3]}"
    raise ValueError(f"GGUF file: tensor {gguf_name!r} has no place in a Llama model")


def read_gguf_llama(
    path: str | os.PathLike[str], progress: Callable[[str], None] | None = None
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Read a Llama model's configuration and weights; quantised weights are dequantised to float32.

    Args:
        path: the `.gguf` file.
        progress: called with each tensor's name before it is read.
    Returns:
        the contents of transformers' `config.json`, and the tensors under transformers' names.
    Raises:
        ValueError: the file holds another architecture.
        ImportError: the package `gguf` is not installed.
    """
    import gguf

    reader = gguf.GGUFReader(os.fspath(path))
    facts = {name: field.contents() for name, field in reader.fields.items() if len(field.data) < 2}
    if facts.get("general.architecture") != "llama":
        got = facts.get("general.architecture")
        raise ValueError(f"{path}: expected a GGUF file of architecture 'llama', got {got!r}")
    heads = facts["llama.attention.head_count"]
    key_value_heads = facts.get("llama.attention.head_count_kv", heads)

    tensors: dict[str, np.ndarray] = {}
    for tensor in reader.tensors:
        if progress is not None:
            progress(tensor.name)
        weight = gguf.dequantize(tensor.data, tensor.tensor_type).astype(np.float32, copy=False)
        if tensor.name.endswith("attn_q.weight"):
            weight = undo_rotary_permutation(weight, heads)
        elif tensor.name.endswith("attn_k.weight"):
            weight = undo_rotary_permutation(weight, key_value_heads)
        tensors[hugging_face_name(tensor.name)] = np.ascontiguousarray(weight)

    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": tensors["model.embed_tokens.weight"].shape[0],
        "hidden_size": facts["llama.embedding_length"],
        "intermediate_size": facts["llama.feed_forward_length"],
        "num_hidden_layers": facts["llama.block_count"],
        "num_attention_heads": heads,
        "num_key_value_heads": key_value_heads,
        "max_position_embeddings": facts["llama.context_length"],
        "rms_norm_eps": facts["llama.attention.layer_norm_rms_epsilon"],
        "rope_theta": facts.get("llama.rope.freq_base", 10000.0),
        "tie_word_embeddings": "lm_head.weight" not in tensors,
        "bos_token_id": facts.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": facts.get("tokenizer.ggml.eos_token_id"),
        "pad_token_id": facts.get("tokenizer.ggml.padding_token_id"),
        "torch_dtype": "float32",
    }
    return config, tensors


def convert_gguf(
    path: str | os.PathLike[str],
    folder: str | os.PathLike[str],
    progress: Callable[[str], None] | None = None,
) -> Path:
    """Write a GGUF file's Llama model and tokenizer as a Hugging Face folder.

    The folder appears complete or not at all.

    Args:
        path: the `.gguf` file.
        folder: where the model goes; must not exist.
        progress: called with what is being read or written.
    Returns:
        the folder: config.json, model.safetensors (float32), and the tokenizer's files.
    """
    from safetensors.numpy import save_file
    from transformers import AutoTokenizer

    path, folder = Path(path), Path(folder)
    config, tensors = read_gguf_llama(path, progress)
    unfinished = folder.with_name(folder.name + ".unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    if progress is not None:
        progress("the tokenizer")
    tokenizer = AutoTokenizer.from_pretrained(
        path.parent, gguf_file=path.name, local_files_only=True
    )
    tokenizer.save_pretrained(unfinished)
    (unfinished / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    save_file(tensors, unfinished / "model.safetensors", metadata={"format": "pt"})
    unfinished.rename(folder)
    return folder
