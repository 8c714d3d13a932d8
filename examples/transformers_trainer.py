"""A small Llama, trained by the Trainer of transformers: as it is, with the losses patched, and with the linear loss.

The three runs start from the same seed, each in a process of its own, so that its peak memory is its own.
"""

import argparse
import multiprocessing
import statistics
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from typing import Any

import torch
import transformers
from corpus import token_ids
from figures import add_output, write
from train import resident_megabytes
from transformers import LlamaConfig, LlamaForCausalLM, PrinterCallback, Trainer, TrainerCallback, TrainingArguments

import fusedloss
from fusedloss.integrations.transformers import LinearLoss

VOCABULARY, LENGTH, BATCH, FEATURES = 32_000, 64, 8, 64
# Forked, a process has imported torch and transformers already.
PROCESSES = multiprocessing.get_context("fork" if sys.platform == "linux" else None)
SIDES = ["transformers", "patched", "linear"]


class Clock(TrainerCallback):
    """The time of the steps, and of the loss in them: its forward, and its backward down to what it was given."""

    def __init__(self) -> None:
        self.steps: list[float] = []
        self.losses: list[float] = []
        self.curve: list[float] = []

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self.began = time.perf_counter()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.steps.append(time.perf_counter() - self.began)

    def timed(self, loss: Any) -> Any:
        """``loss``, called with logits by name as a model does, or with outputs as the Trainer does."""

        def call(*arguments: Any, **options: Any) -> Any:
            given = arguments[0].hidden_states[-1] if arguments else options["logits"]
            start = time.perf_counter()
            value = loss(*arguments, **options)
            forward = time.perf_counter() - start
            self.curve.append(value.item())
            value.register_hook(lambda _: setattr(self, "backward_began", time.perf_counter()))
            given.register_hook(lambda _: self.losses.append(forward + time.perf_counter() - self.backward_began))
            return value

        return call


def trained(side: str, ids: list[int], steps: int) -> dict[str, Any]:
    transformers.logging.set_verbosity_error()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=FEATURES, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=LENGTH, tie_word_embeddings=True,
    )  # fmt: skip
    model, clock, options = LlamaForCausalLM(config), Clock(), {}
    if side == "linear":
        options["compute_loss_func"] = clock.timed(LinearLoss(model))
    else:
        model.loss_function = clock.timed(model.loss_function)
    rows = torch.tensor(ids).view(-1, LENGTH)
    before = resident_megabytes()
    with tempfile.TemporaryDirectory() as folder:
        told = TrainingArguments(
            output_dir=folder, use_cpu=True, report_to=[], disable_tqdm=True, save_strategy="no", seed=0,
            logging_strategy="no", per_device_train_batch_size=BATCH, max_steps=steps, learning_rate=3e-3,
        )  # fmt: skip
        examples = [{"input_ids": row, "labels": row} for row in rows]
        trainer = Trainer(model=model, args=told, train_dataset=examples, callbacks=[clock], **options)
        trainer.remove_callback(PrinterCallback)
        with fusedloss.patch("torch", "transformers") if side == "patched" else nullcontext() as patched:
            trainer.train()
    return {
        "curve": clock.curve,
        "step": statistics.median(clock.steps) * 1e3,
        "loss": statistics.median(clock.losses) * 1e3,
        "peak": resident_megabytes() - before,
        "report": str(patched.report()) if patched else "",
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=60)
    add_output(parser)
    options = parser.parse_args()
    steps = options.steps
    ids = token_ids(VOCABULARY, steps * BATCH * LENGTH).tolist()
    runs = {}
    for side in SIDES:
        with ProcessPoolExecutor(1, PROCESSES) as process:
            runs[side] = process.submit(trained, side, ids, steps).result()
    base = runs["transformers"]
    heads = ["losses of", "step ms", "loss ms", "of the step", "peak MB", "step", "curve differs"]
    print("".join(f"{head:>14s}" for head in heads))
    off = []
    for side, run in runs.items():
        differs = max(abs(a - b) / b for a, b in zip(run["curve"], base["curve"], strict=True))
        run["differs"] = differs
        numbers = [side, f"{run['step']:.1f}", f"{run['loss']:.1f}", f"{run['loss'] / run['step']:.0%}"]
        numbers += [f"{run['peak']:.0f}", f"{base['step'] / run['step']:.2f}x", f"{differs:.1e}"]
        print("".join(f"{number:>14s}" for number in numbers))
        if not differs <= 1e-5:
            off.append(side)
    print(
        f"\nloss from {base['curve'][0]:.3f} to {base['curve'][-1]:.3f}; linear: the loss with the product of the head"
    )
    print(f"patched, {runs['patched']['report']}")
    names = ("step", "loss", "peak", "differs")
    sides = {side: {name: run[name] for name in names} for side, run in runs.items()}
    write(options.output, {"vocabulary": VOCABULARY, "tokens": LENGTH * BATCH, "features": FEATURES, "sides": sides})
    if off:
        print(f"the loss curves differ by more than 1e-5 relative: {', '.join(off)}")
    return 1 if off else 0


if __name__ == "__main__":
    sys.exit(main())
