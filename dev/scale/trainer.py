"""Continues a checkpoint with Hugging Face's Trainer, alone or in several processes that each hold the whole model.

    python3 dev/scale/trainer.py out/grown --data train.txt --val val.txt --out out/more
    torchrun --nproc-per-node 2 dev/scale/trainer.py ...        on N nodes: as fsdp.py
"""
import tempfile

import torch
from transformers import Trainer, TrainingArguments

from common import arguments, evaluate, load, save, windows


def main():
    a = arguments(__doc__)
    train, val = windows(a.data, a.seq, a.vocab), windows(a.val, a.seq, a.vocab)
    with tempfile.TemporaryDirectory() as scratch:
        trainer = Trainer(
            model=load(a.model), train_dataset=[{"input_ids": w, "labels": w} for w in train],
            args=TrainingArguments(
                output_dir=scratch, max_steps=a.steps, per_device_train_batch_size=a.batch, learning_rate=a.lr,
                lr_scheduler_type="constant", adam_beta2=0.95, weight_decay=0.1, max_grad_norm=1.0,
                save_strategy="no", report_to=[], disable_tqdm=True, use_cpu=not torch.cuda.is_available(),
                ddp_find_unused_parameters=False))
        for step in 0, a.steps:
            if step:
                trainer.train()     # with labels the class adds its balance loss, where config.json asks for one
            loss = evaluate(trainer.model, val, a.batch, trainer.args.device)
            if trainer.is_world_process_zero():
                print(f"step {step}: val loss {loss:.6f}", flush=True)
        if trainer.is_world_process_zero():
            save(a.model, a.out, trainer.accelerator.unwrap_model(trainer.model).state_dict())
        trainer.accelerator.wait_for_everyone()
        trainer.accelerator.end_training()


main()
