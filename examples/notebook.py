# %% [markdown]
# # Steering in a notebook
#
# The Python API on the pocket model: extract, fit, look, apply. The cells are those of a script as
# well: `python examples/notebook.py` takes about a minute on two cores, and less the second time,
# as every step finds what was computed before.

# %%
from __future__ import annotations

import json
from pathlib import Path
from typing import Final

from pipeline.evaluation.generate import ChatPrompt, generate
from pipeline.evaluation.judges import is_refusal
from pipeline.notebook import extract, fit, load_model, measure, steer
from steering_service.core.direction import Direction

EXAMPLES: Final = Path(__file__).resolve().parent
OUT: Final = Path("steerage-demo")  # what `make demo` has extracted is found


def main() -> None:
    # Worker processes import this file: what is computed is guarded, as in any script.

    # %% Open a cache, fit, look.
    run = extract(EXAMPLES / "refusal.toml", str(OUT / "store"))
    found = fit(run, "difference_of_means")
    print(found, "\n")

    # %% Apply: harmful requests in jailbreak wrappers that the directions were not fitted on.
    direction = found.direction(found.best(heads=False))
    model, tokenizer = load_model(run)
    prompts = jailbroken(num=12)

    def answers() -> list[str]:
        return generate(model, tokenizer, prompts, max_new_tokens=24)

    plain = answers()
    with steer(model, direction, strength=0.4):
        steered = answers()
    # A control of the same norm should do nothing.
    with steer(model, found.control(direction.site), strength=0.4):
        control = answers()
    show("plain", plain)
    show("steered", steered)
    show("steered at random", control)

    # %% Directions are values: add, scale, make orthogonal, measure, save and load them.
    probe = fit(run, "probe").direction(direction.site)
    mixed = direction.unit() + probe.unit()
    apart = probe.orthogonal_to(direction)
    for item in (direction, probe, measure(run, mixed), measure(run, apart)):
        print(item, f"AUROC {item.scores['auroc_test']:.3f}")
    mixed.save(OUT / "mixed.safetensors")
    assert Direction.load(OUT / "mixed.safetensors").digest == mixed.digest


def jailbroken(num: int) -> list[ChatPrompt]:
    """Test prompts in wrappers."""
    lines = (EXAMPLES / "pocket_data" / "jailbreaks.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    return [ChatPrompt(row["prompt"]) for row in rows if row["split"] == "test"][:num]


def show(title: str, answers: list[str]) -> None:
    phrases = json.loads((EXAMPLES / "pocket_data" / "refusal_phrases.json").read_text())
    num = sum(is_refusal(answer, phrases) for answer in answers)
    print(f"{title}: {num} of {len(answers)} refused, such as: {answers[0]!r}\n")


if __name__ == "__main__":
    main()
