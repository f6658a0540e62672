"""The short form of the paper's Figure 3: one program logs, and asks.

Run it in this folder: python figure3.py. It makes ./logra/figure3, which must not be
there yet.
"""

import tiny_model
from torch import Tensor
from torch.nn import functional

import logra_kernels as logix


def loss_of(batch: dict[str, Tensor]) -> Tensor:
    """The summed next-token cross entropy of a batch."""
    labels = batch["labels"][:, 1:].flatten()
    logits = model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
    return functional.cross_entropy(logits.flatten(0, 1), labels, reduction="sum")


def ids_of(batch: dict[str, Tensor]) -> list[str]:
    """The texts of a batch, which are the ids of its examples."""
    return tokenizer.batch_decode(batch["input_ids"], skip_special_tokens=True)


model, tokenizer = tiny_model.load()
run = logix.init(project="figure3", config="config.yaml")
run.watch(model, name_filter=["mlp"])
run.add_lora()
run.setup({"stat": "kfac", "save": "grad"})

for batch in tiny_model.batches(tokenizer, tiny_model.TRAIN, size=16):
    with run(data_id=ids_of(batch), mask=batch["attention_mask"]):
        loss_of(batch).backward()
run.finalize()

run.setup({"log": "grad"})
(test,) = tiny_model.batches(tokenizer, tiny_model.TEST, size=len(tiny_model.TEST))
with run(data_id=ids_of(test), mask=test["attention_mask"]):
    loss_of(test).backward()
result = run.compute_influence_all()
print(list(result["influence"].shape), "scores; the best example for each query:")
for query, row in zip(result["src_ids"], result["influence"].argmax(dim=1), strict=True):
    print(f"  {query}: {result['tgt_ids'][row]}")
