"""What `accelerate launch` runs in test_neighbours: a few updates on a global batch of four, losses to a file."""

import json
import sys
from pathlib import Path

import torch
from accelerate import Accelerator
from models import convert, ids, shake
from torch.utils.data import DataLoader

folder = Path(sys.argv[1])
accelerator = Accelerator(cpu=True)
model = shake(convert(folder / "base")).train()
optimizer = torch.optim.AdamW(model.recurrence.parameters(), lr=0.03)
loader = DataLoader(ids(4, 9).repeat(5, 1), batch_size=4 // accelerator.num_processes)
model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
losses = []
for tokens in loader:
    loss = model(input_ids=tokens, labels=tokens).loss
    accelerator.backward(loss)
    optimizer.step()
    optimizer.zero_grad()
    losses.append(accelerator.reduce(loss.detach(), "mean").item())
if accelerator.is_main_process:
    assert accelerator.num_processes == 1 or accelerator.distributed_type == "MULTI_CPU"
    (folder / f"{accelerator.num_processes}.json").write_text(json.dumps(losses))
accelerator.end_training()
