"""Log the training data: the first listing of the paper's Appendix B, with our import.

Run it in this folder: python extraction.py. It makes ./logra/llm, which must not be there yet.
"""

import tiny_model
import torch.nn.functional as F
from torch import nn

import logra_kernels as logix
from logra_kernels import Covariance

model, tokenizer = tiny_model.load()
train_loader = tiny_model.batches(tokenizer, tiny_model.TRAIN, size=16)

run = logix.init(project="llm", config="config.yaml")
run.watch(model, type_filter=[nn.Linear], name_filter=["mlp"])
run.add_lora()
run.setup({"log": "grad", "save": "grad", "statistic": {"grad": Covariance}})

for batch in train_loader:
    data_id = tokenizer.batch_decode(batch["input_ids"], skip_special_tokens=True)
    targets = batch.pop("labels")
    with run(data_id=data_id, mask=batch["attention_mask"]):
        model.zero_grad()
        lm_logits = model(**batch).logits
        shift_logits = lm_logits[..., :-1, :].contiguous()
        shift_labels = targets[..., 1:].contiguous()
        loss = F.cross_entropy(
            shift_logits.view(-1, shift_logits.size(-1)),
            shift_labels.view(-1),
            reduction="sum",
            ignore_index=-100,
        )
        loss.backward()

logix.finalize()
print(f"{len(run.logged_ids)} examples logged in {run.path}")
