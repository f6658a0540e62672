"""Ask which training data mattered: the second listing of the paper's Appendix B, our import.

Run it in this folder, after extraction.py: python influence.py.
"""

import tiny_model
import torch.nn.functional as F
from torch import nn

import logra_kernels as logix

model, tokenizer = tiny_model.load()
test_loader = tiny_model.batches(tokenizer, tiny_model.TEST, size=1)

run = logix.init(project="llm", config="config.yaml")
run.watch(model, type_filter=[nn.Linear], name_filter=["mlp"])
run.initialize_from_log()
log_loader = run.build_log_dataloader(batch_size=64)

run.setup({"log": "grad"})
for batch in test_loader:
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

    test_log = run.get_log()
    # "cosine" is LogIX's name for l-RelatIF
    result = run.compute_influence_all(test_log, log_loader, mode="cosine")

    scores, order = result["influence"][0].sort(descending=True)
    print(f"\n{result['src_ids'][0]}")
    for score, row in list(zip(scores.tolist(), order.tolist(), strict=True))[:3]:
        print(f"  {score:8.3f}  {result['tgt_ids'][row]}")
