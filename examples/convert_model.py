"""Convert every second layer of a language model to RACE attention and continue training.

    python examples/convert_model.py

The model is a LlamaForCausalLM of Hugging Face transformers, built from a configuration and first
trained for a while with softmax. It takes the place of a pretrained model, since only text is
downloaded. Then two copies continue training: in one the second, fourth, ... layer is converted by
`racecore.adapters.transformers.convert`, the other is unchanged. Finally the converted model
continues a text with `new_cache`, character by character, and the result is compared with one pass
over the whole text. Writes
`convert_model.json` and `.png`; `--quick` takes seconds.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import pathlib
from typing import Any

import data_sets
import numpy as np
import pictures
import torch
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM

import racecore.adapters.transformers as race


@dataclasses.dataclass(frozen=True)
class Plan:
    """Sizes of the model and numbers of training steps."""

    before: int = 500
    after: int = 300
    context: int = 256
    batch: int = 8
    dim: int = 128
    heads: int = 4
    layers: int = 4
    rate: float = 2e-3
    evaluations: int = 6
    validation_windows: int = 48
    seed: int = 0


def new_model(n_characters: int, plan: Plan) -> LlamaForCausalLM:
    """Make a model with random weights."""
    torch.manual_seed(plan.seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=n_characters,
            hidden_size=plan.dim,
            intermediate_size=3 * plan.dim,
            num_hidden_layers=plan.layers,
            num_attention_heads=plan.heads,
            num_key_value_heads=plan.heads,
            max_position_embeddings=4 * plan.context,
            bos_token_id=None,
            eos_token_id=None,
            pad_token_id=None,
            attn_implementation="sdpa",
        )
    )


def pieces(text: torch.Tensor, starts: Any, length: int) -> torch.Tensor:
    """Cut pieces [B, T] out of a text."""
    return torch.stack([text[start : start + length] for start in starts])


@torch.no_grad()
def validation_loss(model: LlamaForCausalLM, text: torch.Tensor, plan: Plan) -> float:
    """Return the loss, in nats a character, over pieces evenly spaced in the text."""
    starts = np.linspace(0, len(text) - plan.context, plan.validation_windows).astype(int)
    batches = [
        pieces(text, part, plan.context) for part in np.split(starts, len(starts) // plan.batch)
    ]
    return float(np.mean([model(batch, labels=batch).loss.item() for batch in batches]))


def train(
    model: LlamaForCausalLM, text: torch.Tensor, steps: int, plan: Plan, name: str, rate: float
) -> list[Any]:
    """Train; return the validation losses, including the loss before the first step."""
    training, validation = text[: len(text) * 9 // 10], text[len(text) * 9 // 10 :]
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.95), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, rate, total_steps=steps, pct_start=0.1, final_div_factor=10
    )
    rng = np.random.default_rng([plan.seed, steps])
    curve = [(0, validation_loss(model, validation, plan))]
    every = max(steps // plan.evaluations, 1)
    for step in (bar := tqdm(range(1, steps + 1), desc=f"{name:<28}", unit="step")):
        batch = pieces(
            training, rng.integers(len(training) - plan.context, size=plan.batch), plan.context
        )
        loss = model(batch, labels=batch).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % every == 0 or step == steps:
            curve.append((step, validation_loss(model, validation, plan)))
            bar.set_postfix(validation=f"{curve[-1][1]:.3f}")
    return curve


@torch.no_grad()
def write(
    model: LlamaForCausalLM, prompt: torch.Tensor, n_new: int
) -> tuple[torch.Tensor, int, float]:
    """Continue a prompt [T], the likeliest character each time.

    Returns the new characters, the number of them on which one pass over prompt and answer agrees,
    and the largest difference of logits.
    """
    cache = race.new_cache(model)
    told = [model(prompt[None], cache=cache).logits[0, -1]]
    new = [told[-1].argmax()]
    while len(new) < n_new:
        told.append(model(new[-1].view(1, 1), cache=cache).logits[0, -1])
        new.append(told[-1].argmax())
    answer = torch.stack(new)
    again = model(torch.cat([prompt, answer])[None], use_cache=False).logits[
        0, len(prompt) - 1 : -1
    ]
    return (
        answer,
        int((again.argmax(dim=-1) == answer).sum()),
        (again - torch.stack(told)).abs().max().item(),
    )


def compare(text: bytes, plan: Plan) -> dict[str, Any]:
    """Pretrain, convert, train both copies, and print the results."""
    characters, codes = np.unique(np.frombuffer(text, np.uint8), return_inverse=True)
    codes = torch.from_numpy(codes.astype(np.int64))
    print(f"{len(text):,} characters, {len(characters)} different ones; {plan}")
    model = new_model(len(characters), plan)
    pretraining = train(model, codes, plan.before, plan, "softmax", plan.rate)
    converted = copy.deepcopy(model)
    layers = race.convert(
        converted, range(1, plan.layers, 2), n_planes=4, n_tables=4, learn_planes=True
    )
    on = train(converted, codes, plan.after, plan, f"layers {layers} converted", plan.rate / 2)
    control = train(model, codes, plan.after, plan, "softmax continues", plan.rate / 2)
    print("\nvalidation loss, nats a character     converted   softmax throughout")
    print(f"{'before':<36} {pretraining[-1][1]:10.3f} {pretraining[-1][1]:20.3f}")
    print(f"{f'layers {layers} converted, untrained':<36} {on[0][1]:10.3f}")
    ends = on[-1][1], control[-1][1]
    print(
        f"{f'after {plan.after} more steps':<36} {ends[0]:10.3f} {ends[1]:20.3f}   "
        f"{ends[0] / ends[1] - 1:+.1%}"
    )

    prompt, n_new = codes[-plan.context :][: plan.context // 2], plan.context
    answer, n_same, difference = write(converted.eval(), prompt, n_new)
    as_text = [characters[part.numpy()].tobytes().decode() for part in (prompt[-60:], answer)]
    print(f"\n{as_text[0]}|{as_text[1]}\n")
    print(
        f"step by step and all at once: {n_same} of {n_new} characters the same, logits differ by "
        f"{difference:.1e} at most"
    )
    return {
        "pretraining": pretraining,
        "converted": on,
        "control": control,
        "layers": layers,
        "text": as_text,
        "same": [n_same, n_new],
        "difference": difference,
    }


def main() -> None:
    """Read the command line, run, and write the results."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="a few seconds, on generated text")
    parser.add_argument("--threads", type=int, help="of PyTorch and racecore")
    parser.add_argument(
        "--out", type=pathlib.Path, default=pathlib.Path("convert_model"), help="without a suffix"
    )
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    plan = Plan()
    if arguments.quick:
        plan = dataclasses.replace(
            plan, before=30, after=15, context=32, dim=32, evaluations=3, validation_windows=8
        )
    print(pictures.machine())
    results = compare(
        data_sets.sentences(20_000) if arguments.quick else data_sets.wikipedia(), plan
    )
    on, control = (
        [(plan.before + step, loss) for step, loss in results[name]]
        for name in ("converted", "control")
    )
    lines = {
        "softmax throughout": results["pretraining"][1:] + control[1:],
        "every second layer RACE": on,
    }
    pictures.draw(arguments.out, lines, "training steps", "validation loss, nats a character")
    pictures.record(arguments.out, plan, results)


if __name__ == "__main__":
    main()
