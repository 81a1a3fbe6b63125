"""TRL's part of the comparison, which runs in an environment with TRL and without lmcot.

    python trl_side.py WORKLOAD.json RESULT.json --rows 8

It times each step of GRPOTrainer on the prompts of the workload, on the CPU, or where the workload
says so on a GPU with vLLM. The settings do the same work as lmcot's in the least time: no gradient
checkpointing, no checkpoints, one call of generate() for the whole step, and no pass for the old
log-probabilities, which TRL skips if a batch is used once.
"""

from __future__ import annotations

import argparse
import json
import re
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoTokenizer, TrainerCallback
from trl import GRPOConfig, GRPOTrainer


class _Clock(TrainerCallback):
    """Records when steps end."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self.times.append(time.perf_counter())

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.times.append(time.perf_counter())


def increasing(completions: list[str], **_: Any) -> list[float]:
    """The reward of lmcot's toy task for two numbers: 1 if the first is less than the second."""
    numbers = [[int(n) for n in re.findall(r"\d+", text)[:2]] for text in completions]
    return [float(len(found) == 2 and found[0] < found[1]) for found in numbers]


def _sampling(work: dict[str, Any]) -> dict[str, Any]:
    """With vLLM in this process where there is a GPU."""
    if not work.get("gpu"):
        return {"use_vllm": False}
    return {"use_vllm": True, "vllm_mode": "colocate", "vllm_gpu_memory_utilization": 0.3}


def settings(work: dict[str, Any], rows: int, folder: str) -> GRPOConfig:
    """Args: rows: samples per micro-batch."""
    samples = work["samples"] * len(work["steps"][0])
    return GRPOConfig(
        output_dir=folder,
        use_cpu=not work.get("gpu"),
        bf16=False,  # this is autocast; the weights already have their dtype
        model_init_kwargs={"dtype": work["dtype"]},
        per_device_train_batch_size=rows,
        gradient_accumulation_steps=samples // rows,
        num_generations=work["samples"],
        max_completion_length=work["max_new_tokens"],
        temperature=work["temperature"],
        num_iterations=1,
        beta=work["kl"],
        epsilon=work["clip"],
        loss_type="dapo",  # a mean over all tokens of the step, as in lmcot
        scale_rewards="group",
        learning_rate=work["learning_rate"],
        lr_scheduler_type="constant",
        max_grad_norm=1.0,
        adam_epsilon=work["eps"],
        max_steps=len(work["steps"]),
        shuffle_dataset=False,
        gradient_checkpointing=False,
        **_sampling(work),
        save_strategy="no",
        logging_steps=1,
        report_to="none",
        disable_tqdm=True,
        seed=work["seed"],
    )


def main() -> None:
    """Writes the seconds of each step and TRL's log of it."""
    parser = argparse.ArgumentParser(description="Time GRPO steps of TRL.")
    parser.add_argument("workload", type=Path)
    parser.add_argument("result", type=Path)
    parser.add_argument("--rows", type=int, required=True)
    options = parser.parse_args()
    work = json.loads(options.workload.read_text(encoding="utf-8"))
    torch.set_num_threads(work["threads"])
    prompts = [prompt for step in work["steps"] for prompt in step]
    tokenizer = AutoTokenizer.from_pretrained(work["model"])
    if [tokenizer(prompt["text"])["input_ids"] for prompt in prompts] != [
        prompt["ids"] for prompt in prompts
    ]:
        raise RuntimeError("TRL would read other tokens than lmcot")
    clock = _Clock()
    with tempfile.TemporaryDirectory() as folder:
        trainer = GRPOTrainer(
            model=work["model"],
            reward_funcs=increasing,
            args=settings(work, options.rows, folder),
            train_dataset=Dataset.from_list([{"prompt": prompt["text"]} for prompt in prompts]),
            processing_class=tokenizer,
            callbacks=[clock],
        )
        trainer.train()
    logged = trainer.state.log_history[: len(work["steps"])]
    result = {
        "seconds": [after - before for before, after in pairwise(clock.times)],
        "tokens": [one["completions/mean_length"] for one in logged],
        "rewards": [one["reward"] for one in logged],
        "dtype": str(trainer.model.dtype),
    }
    options.result.write_text(json.dumps(result), encoding="utf-8")


if __name__ == "__main__":
    main()
